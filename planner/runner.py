"""``pipefit run``: loads a pipeline, applies the best plan, runs the call, writes the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from pipefit.errors import InvalidRequest
from pipefit.planner.load import load
from pipefit.planner.output import check_suffix, default_suffix, write_output
from pipefit.planner.plan import Plan
from pipefit.strategies.strategy import Option


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
    with_: Sequence[Option] = (),
    **wishes: Any,
) -> Run:
    """Load the pipeline *name* by the best plan for *call*, run it and write what it returns.

    *wishes* go to :func:`pipefit.planner.load.load`. Without *out* the file is called after
    the pipeline and lies in the current folder.

    Raises:
        InvalidRequest: if the pipeline cannot be loaded or the file cannot hold the result.
    """
    if out is not None:
        check_suffix(out)
    if any(option.strategy == "latent_output" for option in with_):
        raise InvalidRequest(
            "With latent_output a call returns what waits to be decoded, which no file holds: "
            "leave it out, or use pipefit.load."
        )
    pipe = load(name, call=call, dtype=dtype, device=device, with_=with_, **wishes)
    arguments = dict(call)
    if seed is not None:
        arguments["generator"] = torch.Generator("cpu").manual_seed(seed)
    try:
        output = pipe(**arguments)
    except (TypeError, ValueError) as error:  # as pipelines refuse arguments
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise InvalidRequest(
            f"{type(pipe).__name__} refused the call ({said}): check the prompt and --set."
        ) from error
    target = out or Path(Path(name).name + default_suffix(output))
    return Run(
        plan=pipe.pipefit.plan,
        files=tuple(write_output(output, target, sample_hz=_sample_hz(pipe))),
    )


def _sample_hz(pipe: DiffusionPipeline) -> int | None:
    """Return the rate of the sound that the pipeline makes, where a component states it."""
    for component in pipe.components.values():
        config = getattr(component, "config", None)
        for key in ("sampling_rate", "sample_rate"):
            if isinstance(rate := getattr(config, key, None), int):
                return rate
    return None
