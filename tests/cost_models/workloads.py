"""Small workloads written by hand, and components read off real modules, for tests."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.units import GIB
from pipefit.cost_models.workload import (
    Component,
    Event,
    Kernel,
    ModuleInfo,
    Phase,
    Routine,
    TensorInfo,
    Workload,
)

GPU = Gpu(
    name="rtx-3090",
    architecture="ampere",
    compute_capability=(8, 6),
    total_bytes=24 * GIB,
    free_bytes=24 * GIB,
)


def component_of(name: str, module: Any) -> Component:
    """Describe a real module as the trace would."""
    import torch

    leaf_layers = (
        torch.nn.modules.conv._ConvNd,
        torch.nn.Linear,
        torch.nn.Embedding,
    )
    tensors = []
    first_path: dict[int, str] = {}
    named = [
        *(
            (path, tensor, False)
            for path, tensor in module.named_parameters(remove_duplicate=False)
        ),
        *((path, tensor, True) for path, tensor in module.named_buffers(remove_duplicate=False)),
    ]
    for path, tensor, is_buffer in named:
        tied_to = first_path.setdefault(id(tensor), path)
        tensors.append(
            TensorInfo(
                path=path,
                num_bytes=tensor.numel() * tensor.element_size(),
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                is_buffer=is_buffer,
                tied_to=None if tied_to == path else tied_to,
            )
        )
    return Component(
        name=name,
        class_name=type(module).__name__,
        library=type(module).__module__.partition(".")[0],
        tensors=tuple(tensors),
        modules=tuple(
            ModuleInfo(
                path=path,
                class_name=type(child).__name__,
                is_leaf_layer=isinstance(child, leaf_layers),
                is_block_list=isinstance(child, (torch.nn.ModuleList, torch.nn.Sequential)),
                is_container=isinstance(
                    child, (torch.nn.ModuleList, torch.nn.Sequential, torch.nn.ModuleDict)
                ),
            )
            for path, child in module.named_modules()
        ),
    )


def linear_stack(name: str, layer_bytes: list[int], top_bytes: int = 0) -> Component:
    """Return a component whose ``blocks`` are one-tensor layers, and a ``head`` beside them."""
    modules = [
        ModuleInfo(path="", class_name="Stack"),
        ModuleInfo(path="blocks", class_name="ModuleList", is_block_list=True, is_container=True),
    ]
    tensors = []
    for i, num_bytes in enumerate(layer_bytes):
        modules.append(ModuleInfo(path=f"blocks.{i}", class_name="Linear", is_leaf_layer=True))
        tensors.append(tensor(f"blocks.{i}.weight", num_bytes))
    if top_bytes:
        modules.append(ModuleInfo(path="head", class_name="Linear", is_leaf_layer=True))
        tensors.append(tensor("head.weight", top_bytes))
    return Component(
        name=name,
        class_name="Stack",
        library="tests",
        tensors=tuple(tensors),
        modules=tuple(modules),
    )


def tensor(path: str, num_bytes: int, **more: Any) -> TensorInfo:
    """Return a bfloat16 vector of *num_bytes*."""
    return TensorInfo(
        path=path, num_bytes=num_bytes, dtype="bfloat16", shape=(num_bytes // 2,), **more
    )


def routine(
    *events: Event, returns: tuple[int, ...] = (), entry: str = "forward", num_outside: int = 0
) -> Routine:
    """Return a routine of a class that does not matter."""
    return Routine(
        module_class="Any", entry=entry, events=events, returns=returns, num_outside=num_outside
    )


def workload(
    components: list[Component],
    routines: list[Routine],
    root: list[Event],
    phases: list[tuple[str, str, int]],
    kernels: tuple[Kernel, ...] = (),
    **more: Any,
) -> Workload:
    """Return a workload; phases are (component, entry, calls), their calls one after the other."""
    ends = list(accumulate(calls for _, _, calls in phases))
    return Workload(
        pipeline="by-hand",
        pipeline_class="ByHand",
        call={},
        components=tuple(components),
        kernels=kernels,
        routines=tuple(routines),
        root=tuple(root),
        phases=tuple(
            Phase(
                name=component,
                component=component,
                entry=entry,
                calls=tuple(range(end - calls, end)),
            )
            for (component, entry, calls), end in zip(phases, ends, strict=True)
        ),
        **more,
    )
