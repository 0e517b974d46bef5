"""The context rule against what processes were seen to hold, per GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipefit.cost_models.context import DEFAULT_CONTEXT_BYTES, THREADS_PER_SM, context_bytes
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.units import GIB, MIB
from pipefit.planner.catalog import find_gpu, gpu_names

PUBLISHED_MIB = {
    "t4": (135, 140),
    "rtx-2080-ti": (197, 197),
    "rtx-3090": (304, 304),
    "rtx-4090": (461, 504),
    "l40": (507, 507),
    "a100-80gb": (409, 522),
    "rtx-5090": (595, 619),
}
"""Lowest and highest of the figures that cost_models/context.py lists with their sources."""


@pytest.mark.parametrize("name", PUBLISHED_MIB)
def test_the_rule_stays_within_a_tenth_of_what_was_published(name: str) -> None:
    lowest, highest = PUBLISHED_MIB[name]
    assert 0.9 * lowest * MIB <= context_bytes(find_gpu(name)) <= 1.1 * highest * MIB


def test_the_rule_is_near_the_runs_that_it_was_not_fitted_to() -> None:
    """Z-Image-Turbo on an RTX 5090: driver's figure minus replayed reserved memory."""
    assert 0.55 * GIB <= context_bytes(find_gpu("rtx-5090")) <= 0.66 * GIB


def test_every_nvidia_gpu_of_the_catalogue_has_a_known_number_of_threads() -> None:
    gpus = [gpu for gpu in map(find_gpu, gpu_names()) if gpu.compute_capability]
    assert {gpu.compute_capability for gpu in gpus} <= set(THREADS_PER_SM)
    assert max(map(context_bytes, gpus)) == DEFAULT_CONTEXT_BYTES


def test_a_measured_context_wins_and_an_unknown_gpu_gets_the_default() -> None:
    unknown = Gpu(name="any", total_bytes=GIB, free_bytes=GIB)
    assert context_bytes(unknown) == DEFAULT_CONTEXT_BYTES
    assert context_bytes(replace(unknown, context_bytes=5)) == 5
    assert context_bytes(replace(unknown, architecture="cpu")) == 0
