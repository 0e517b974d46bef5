"""Let cuDNN try its algorithms for each new convolution: ``torch.backends.cudnn.benchmark``.

It gains little over cuDNN's own choice and makes the first call slower. Each trial asks the
allocator for the largest workspace that any algorithm wants and, where that is more than the
process may have, halves what it asks for until it gets it (``generate_and_filter_plans`` in
ATen/native/cudnn/Conv_v8.cpp): a first call may fill the budget, and a budget that torch is held to
is kept.

What is chosen depends on what was measured, so two processes may round differently, and not even
two runs of one plan are promised to agree: this is ``high`` and not ``exact``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.workload import Component, Workload
from pipefit.strategies.parameters import unknown_parameter
from pipefit.strategies.strategy import Kind, Quality, Undo

TRIALS_NOTE = (
    "In the first call cuDNN's trials take what memory the budget leaves; what workspace the "
    "algorithms that they choose keep is not predicted."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CudnnBenchmark:
    """The switch, for the whole process."""

    name: str = "cudnn_benchmark"
    kind: Kind = "process"
    quality: Quality = Quality.HIGH

    def traits(self, module: Any) -> dict[str, Any]:
        """Nothing: which convolutions run the trace says."""
        return {}

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """One option, where there is a convolution and an NVIDIA GPU."""
        if gpu.compute_capability is None:
            return ()
        return ({},) if any(k.kind == "conv" for k in workload.kernels) else ()

    def refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """Parameters; where it changes nothing it does no harm."""
        return unknown_parameter(self.name, parameters, ())

    def placement(self, parameters: Mapping[str, Any]) -> None:
        """Weights stay where they are."""

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Set the switch; undo sets it back to what it was."""
        from torch.backends import cudnn

        before = cudnn.benchmark
        cudnn.benchmark = True
        return lambda: setattr(cudnn, "benchmark", before)
