"""The shims replace what is there, and do what it does."""

from __future__ import annotations

import importlib

import diffusers
import pytest
import torch

from pipefit.planner.shims import MADE_FOR_DIFFUSERS, SHIMS, shimmed


@pytest.mark.parametrize(("module", "attribute"), [shim[:2] for shim in SHIMS])
def test_what_a_shim_replaces_exists(module: str, attribute: str) -> None:
    owner, name = attribute.split(".")
    found = getattr(importlib.import_module(module), owner, None)
    assert name in vars(found or object), (
        f"{module}.{attribute} is gone in diffusers {diffusers.__version__}; the shim "
        f"was written for {MADE_FOR_DIFFUSERS}: see whether it is still needed."
    )


def test_the_causal_mask_equals_diffusers_own() -> None:
    block = importlib.import_module(SHIMS[0][0]).HunyuanVideo15AttnBlock
    arguments = (3, 4, torch.float32, "cpu", 2)
    wanted = block.prepare_causal_attention_mask(*arguments)
    original = vars(block)["prepare_causal_attention_mask"]
    with shimmed():
        assert vars(block)["prepare_causal_attention_mask"] is not original
        assert torch.equal(block.prepare_causal_attention_mask(*arguments), wanted)
    assert vars(block)["prepare_causal_attention_mask"] is original


def test_continuous_timesteps_equal_diffusers_own() -> None:
    scheduler = diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True
    )
    scheduler.set_timesteps(5, device="cpu")
    wanted = scheduler.timesteps
    with shimmed():
        scheduler.set_timesteps(5, device="cpu")
    assert torch.equal(scheduler.timesteps, wanted)
