"""What a trace says about a component before a strategy is tried: its convolutions' shapes."""

from __future__ import annotations

from collections.abc import Iterator

from pipefit.cost_models.workload import Component, Kernel, Workload


def kernels_of(component: Component, workload: Workload) -> Iterator[Kernel]:
    """Yield the kernels of *component* in the order of launching, those of repeated calls once."""
    calls = [event for event in workload.root if event[0] == "c"]
    seen: set[int] = set()
    for phase in workload.phases:
        if phase.component == component.name:
            for ordinal in phase.calls:
                yield from _kernels(workload, calls[ordinal][1], seen)


def _kernels(workload: Workload, routine: int, seen: set[int]) -> Iterator[Kernel]:
    if routine in seen:
        return
    seen.add(routine)
    for event in workload.routines[routine].events:
        if event[0] == "k":
            yield workload.kernels[event[1]]
        elif event[0] == "c":
            yield from _kernels(workload, event[1], seen)


def num_conv_spatial_dims(kernel: Kernel) -> int:
    """Return 1, 2 or 3 for a convolution: its shape is five figures and three times that many."""
    return (len(kernel.shape) - 5) // 3


def largest_picture_px(component: Component, workload: Workload) -> int:
    """Return the longer side of the largest map that a convolution of *component* reads or writes.

    0 where it has no convolution. Autoencoders that fold pixels into channels see less than the
    picture; the call's own height and width count too.
    """
    sides = [0]
    for kernel in kernels_of(component, workload):
        if kernel.kind == "conv" and (dims := num_conv_spatial_dims(kernel)) >= 2:
            read, written = kernel.shape[5 : 5 + dims], kernel.shape[5 + dims : 5 + 2 * dims]
            sides += [*read[-2:], *written[-2:]]
    if len(sides) > 1:
        sides += [
            side
            for side in (workload.call.get("height"), workload.call.get("width"))
            if isinstance(side, int)
        ]
    return max(sides)


def batch_of(component: Component, workload: Workload) -> int:
    """Return the batch that the component's first convolution sees; 1 where it has none."""
    for kernel in kernels_of(component, workload):
        if kernel.kind == "conv":
            return kernel.shape[0]
    return 1


def is_called_by_forward(component: Component, workload: Workload) -> bool:
    """Whether the call enters *component*, and never by another way, as it does autoencoders."""
    entries = {phase.entry for phase in workload.phases if phase.component == component.name}
    return entries == {"forward"}
