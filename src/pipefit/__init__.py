"""pipefit fits diffusion pipelines into the GPU you have.

>>> from pipefit import auto_optimize  # doctest: +SKIP
>>> auto_optimize(pipe, vram_budget="8GB")  # doctest: +SKIP

What is listed in ``__all__`` is public. Everything is imported on first use, so that neither
``import pipefit`` nor the command line pays for torch before it is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipefit.errors import (
        ApplyFailed,
        InvalidRequest,
        NoPlanFits,
        PipefitError,
        PlanMismatch,
        TraceError,
        UnknownName,
        UnsupportedPipeline,
    )
    from pipefit.planner.api import apply, auto_optimize, plan, predict
    from pipefit.planner.load import load
    from pipefit.planner.probe import probe

__version__ = "0.1.0"

__all__ = [
    "ApplyFailed",
    "InvalidRequest",
    "NoPlanFits",
    "PipefitError",
    "PlanMismatch",
    "TraceError",
    "UnknownName",
    "UnsupportedPipeline",
    "apply",
    "auto_optimize",
    "load",
    "plan",
    "predict",
    "probe",
]

_HOME_OF = {
    "apply": "pipefit.planner.api",
    "auto_optimize": "pipefit.planner.api",
    "load": "pipefit.planner.load",
    "plan": "pipefit.planner.api",
    "predict": "pipefit.planner.api",
    "probe": "pipefit.planner.probe",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pipefit' has no attribute {name!r}")
    module = importlib.import_module(_HOME_OF.get(name, "pipefit.errors"))
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
