"""Replayed peaks of whole calls against the real hooks on a virtual GPU, block by block."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.end_to_end.small_runs import options_where_possible, untouched
from tests.small_pipelines import SMALL_PIPELINES, small_call

from pipefit.cost_models.allocator import BLOCK_STEP_BYTES, block_bytes
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.memory import simulate
from pipefit.cost_models.prediction import Choice
from pipefit.cost_models.workload import Workload
from pipefit.planner.apply import apply_options
from pipefit.planner.trace import trace, weightless
from pipefit.planner.virtual import Buffer, Observer, VirtualMachine, buffer_of
from pipefit.strategies import strategy, traits_of
from pipefit.strategies.live import module_components
from pipefit.strategies.strategy import Option

NO_LIBRARIES = Gpu(name="cpu", architecture="cpu", total_bytes=1 << 40, free_bytes=1 << 40)
"""Without workspaces, which no operator shows."""


def by_group(**parameters: Any) -> Callable[[Any], list[Option]]:
    return lambda pipe: options_where_possible(
        pipe, "group_offload", parameters, otherwise="resident"
    )


# Not sequential offload: the virtual machine has no tensors on meta, where accelerate drops them.
PLACEMENTS: dict[str, Callable[[Any], list[Option]]] = {
    "resident": lambda pipe: [
        Option(strategy="resident", component=name) for name in module_components(pipe)
    ],
    "model_offload": lambda pipe: [Option(strategy="model_offload")],
    "leaves": by_group(offload_type="leaf_level"),
    "leaves, streamed": by_group(offload_type="leaf_level", use_stream=True),
    "blocks": by_group(offload_type="block_level", num_blocks_per_group=1),
    "blocks, streamed": by_group(
        offload_type="block_level", num_blocks_per_group=1, use_stream=True
    ),
}
QUICK = ("stable_diffusion_xl", "flux")
# A trace has the caller's pictures on the GPU; in these runs they come from the CPU.
WITH_PICTURES = ("stable_diffusion_xl_img2img", "stable_diffusion_xl_controlnet")
NAMES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in SMALL_PIPELINES
    if name not in WITH_PICTURES
]


class Blocks(Observer):
    """Adds up what is on the GPU, in the allocator's blocks."""

    def __init__(self) -> None:
        self.live_bytes = self.peak_bytes = 0

    def allocated(self, buffer: Buffer) -> None:
        self.live_bytes += block_bytes(buffer.num_bytes)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def freed(self, buffer: Buffer) -> None:
        self.live_bytes -= block_bytes(buffer.num_bytes)


def on_virtual_gpu(pipe: Any, machine: VirtualMachine) -> Any:
    twin = weightless(pipe, machine)
    for module in module_components(twin).values():
        for buffer in module.buffers():
            buffer_of(buffer).value = None  # see test_virtual_gpu.py
    return twin


def peak_of_real_hooks(pipe: Any, name: str, options: list[Option]) -> int:
    blocks = Blocks()
    with VirtualMachine(blocks) as machine, torch.no_grad():
        twin = on_virtual_gpu(pipe, machine)
        with apply_options(twin, options, torch.device("cuda", 0)):
            gc.collect()
            blocks.peak_bytes = blocks.live_bytes
            twin(**small_call(name))
            return blocks.peak_bytes


def predicted_peak(found: Workload, options: list[Option]) -> int:
    choices = {}
    for component in found.components:
        option = next(o for o in options if o.component in (component.name, None))
        placement = strategy(option.strategy).placement(option.parameters)
        choices[component.name] = Choice(placement=placement)
    return max(phase.allocated_bytes for phase in simulate(found, choices, NO_LIBRARIES))


@pytest.mark.parametrize("name", NAMES)
def test_whole_calls_allocate_what_the_replay_says(name: str) -> None:
    pipe, _ = untouched(name)
    found = trace(pipe, small_call(name), name=name, traits=traits_of)
    for placement, make in PLACEMENTS.items():
        options = make(pipe)
        real, predicted = peak_of_real_hooks(pipe, name, options), predicted_peak(found, options)
        assert abs(predicted - real) <= BLOCK_STEP_BYTES, placement
