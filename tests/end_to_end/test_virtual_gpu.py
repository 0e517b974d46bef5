"""The real hooks on a virtual GPU: there, unlike on the CPU, a tensor can be in the wrong place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest
import torch
from tests.end_to_end.small_runs import block_level_options, options_where_possible, untouched
from tests.small_pipelines import SMALL_PIPELINES, small_call

from pipefit.planner.apply import apply_options
from pipefit.planner.trace import weightless
from pipefit.planner.virtual import Observer, VirtualMachine, buffer_of
from pipefit.strategies.live import module_components
from pipefit.strategies.strategy import Option

GPU = torch.device("cuda", 0)

PLACEMENTS: dict[str, Callable[[Any], list[Option]]] = {
    "model_offload": lambda pipe: [Option(strategy="model_offload")],
    "sequential_offload": lambda pipe: [Option(strategy="sequential_offload")],
    "group_offload by leaf": lambda pipe: options_where_possible(
        pipe, "group_offload", {"offload_type": "leaf_level"}
    ),
    "group_offload by block": block_level_options,
    "some group offload, the rest resident": lambda pipe: options_where_possible(
        pipe,
        "group_offload",
        {"offload_type": "block_level", "num_blocks_per_group": 1},
        otherwise="resident",
    ),
}

QUICK = ("stable_diffusion_xl", "flux")
NAMES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in SMALL_PIPELINES
]


def on_virtual_gpu(name: str, stack: ExitStack) -> Any:
    """Return the pipeline *name* without weights on a virtual GPU that *stack* keeps open."""
    machine: AbstractContextManager[Any] = VirtualMachine(Observer())
    stack.enter_context(machine)
    stack.enter_context(torch.no_grad())
    twin = weightless(untouched(name)[0], machine)
    for module in module_components(twin).values():
        for buffer in module.buffers():
            # A buffer whose values are known comes back from the GPU as a real tensor, and a real
            # tensor cannot become a virtual one in place.
            buffer_of(buffer).value = None
    return twin


def places(pipe: Any) -> set[str]:
    return {
        str(tensor.device)
        for module in module_components(pipe).values()
        for tensor in (*module.parameters(), *module.buffers())
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_two_calls_find_every_tensor_where_it_is_needed(name: str, placement: str) -> None:
    with ExitStack() as stack:
        pipe = on_virtual_gpu(name, stack)
        with apply_options(pipe, PLACEMENTS[placement](pipe), GPU):
            away = places(pipe) - {str(GPU)}
            for _ in range(2):
                pipe(**small_call(name))
        assert away & {"cpu", "meta"}
        assert places(pipe) == {str(GPU)}


def test_blocks_of_an_autoencoder_that_names_none_would_stay_on_the_cpu() -> None:
    with ExitStack() as stack:
        vae = on_virtual_gpu("cogvideox", stack).vae
        vae.enable_group_offload(GPU, offload_type="block_level", num_blocks_per_group=1)
        latents = torch.zeros(1, 4, 1, 6, 8, device=GPU)
        with pytest.raises(RuntimeError, match="same device"):
            vae.decode(latents)
