"""``pipefit run``: loads a pipeline, applies the best plan, runs the call, writes the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from pipefit.errors import InvalidRequest, UnknownName
from pipefit.planner import api
from pipefit.planner.build import DTYPES
from pipefit.planner.catalog import pipeline_entry
from pipefit.planner.output import check_suffix, default_suffix, write_output
from pipefit.planner.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What ran, and the files that it left."""

    plan: Plan
    files: tuple[Path, ...]


def run_pipeline(
    name: str,
    *,
    call: Mapping[str, Any],
    dtype: Mapping[str, str] | None = None,
    out: Path | None = None,
    seed: int | None = None,
    device: str | None = None,
    **wishes: Any,
) -> Run:
    """Load the pipeline *name*, apply the best plan for *call*, run it and write what it returns.

    *wishes* go to :func:`pipefit.planner.api.auto_optimize`. Without *out* the file is called after
    the pipeline and lies in the current folder.

    Raises:
        InvalidRequest: if the pipeline cannot be loaded or the file cannot hold the result.
    """
    if out is not None:
        check_suffix(out)
    pipe = load_pipeline(name, dtype)
    arguments = dict(call)
    if seed is not None:
        arguments["generator"] = torch.Generator("cpu").manual_seed(seed)
    with api.auto_optimize(pipe, call=call, device=device, **wishes) as applied:
        output = pipe(**arguments)
    target = out or Path(Path(name).name + default_suffix(output))
    return Run(
        plan=applied.plan,
        files=tuple(write_output(output, target, sample_hz=_sample_hz(pipe))),
    )


def load_pipeline(name: str, dtype: Mapping[str, str] | None = None) -> DiffusionPipeline:
    """Return the pipeline with its weights on the CPU, in the dtypes asked for or recommended.

    Raises:
        InvalidRequest: if it is neither in a folder nor on the hub, or cannot be read.
    """
    source, recommended = name, {}
    if not Path(name).exists():
        try:
            entry = pipeline_entry(name)
        except UnknownName as error:
            if "/" not in name:
                raise error
        else:
            source = name if "/" in name else entry["repository"]
            recommended = entry["dtype"]
    chosen = (
        {**recommended, **(dtype or {})} if "default" not in (dtype or {}) else dict(dtype or {})
    )
    for value in chosen.values():
        if value not in DTYPES:
            raise UnknownName("dtype", value, DTYPES)
    try:
        return DiffusionPipeline.from_pretrained(
            source, torch_dtype={part: DTYPES[value] for part, value in chosen.items()} or None
        )
    except (OSError, ValueError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise InvalidRequest(
            f"The pipeline {source!r} could not be loaded ({said}): "
            "name a folder with model_index.json, or a hub id that can be reached."
        ) from error


def _sample_hz(pipe: DiffusionPipeline) -> int | None:
    """Return the rate of the sound that the pipeline makes, where a component states it."""
    for component in pipe.components.values():
        config = getattr(component, "config", None)
        for key in ("sampling_rate", "sample_rate"):
            if isinstance(rate := getattr(config, key, None), int):
                return rate
    return None
