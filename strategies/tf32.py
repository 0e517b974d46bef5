"""Compute fp32 matrix products in TF32: ``torch.backends.cuda.matmul.allow_tf32 = True``.

TF32 keeps fp32's range and rounds the factors to ten bits. Only products of fp32 tensors change,
and only on NVIDIA GPUs from compute capability 8.0 on. Convolutions do it already, because
``torch.backends.cudnn.allow_tf32`` is on by default; it is switched on with it all the same.

torch has two ways to say it, and reading the old switch raises once the new one
(``fp32_precision``) was written. So the old one is written, which writes both, wherever it can be
read, and else the new one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.workload import Component, Workload
from pipefit.strategies.parameters import unknown_parameter
from pipefit.strategies.strategy import Kind, Quality, Undo

FIRST_TF32_CAPABILITY = (8, 0)
"""Ampere, the first with such units (CUDA C++ programming guide, "Arithmetic instructions")."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tf32:
    """Both of torch's switches, for the whole process."""

    name: str = "tf32"
    kind: Kind = "process"
    quality: Quality = Quality.HIGH

    def traits(self, module: Any) -> dict[str, Any]:
        """Nothing: which products are in fp32 the trace says."""
        return {}

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """One option, where the GPU has TF32 and something is multiplied in fp32."""
        capability = gpu.compute_capability
        if capability is None or capability < FIRST_TF32_CAPABILITY:
            return ()
        if any(k.kind == "gemm" and k.dtype == "float32" for k in workload.kernels):
            return ({},)
        return ()

    def refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """Parameters; where it changes nothing it does no harm."""
        return unknown_parameter(self.name, parameters, ())

    def placement(self, parameters: Mapping[str, Any]) -> None:
        """Weights stay where they are."""

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Switch both on; undo leaves either way of asking with its former answer."""
        import torch

        with ExitStack() as undo:
            _switch_on(torch.backends.cuda.matmul, torch.backends.cuda.matmul, undo)
            _switch_on(torch.backends.cudnn, torch.backends.cudnn.conv, undo)
            return undo.pop_all().close


def _switch_on(old: Any, new: Any, undo: ExitStack) -> None:
    """Set ``old.allow_tf32`` or ``new.fp32_precision``; what is on already stays untouched."""
    precision = new.fp32_precision
    try:
        allowed = old.allow_tf32
    except RuntimeError:  # somebody wrote the new one
        if precision != "tf32":
            undo.callback(setattr, new, "fp32_precision", precision)
            new.fp32_precision = "tf32"
        return
    if not allowed:
        # The new one last: the old one writes "ieee" where nothing had been said.
        undo.callback(setattr, new, "fp32_precision", precision)
        undo.callback(setattr, old, "allow_tf32", False)
        old.allow_tf32 = True
