"""What a trace says about a component before a strategy is tried: its convolutions' shapes."""

from __future__ import annotations

import math
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


def kernels_below(workload: Workload, routine: int) -> Iterator[Kernel]:
    """Yield the kernels of *routine* and of what it calls, those of repeated calls once."""
    yield from _kernels(workload, routine, set())


def entered_routines(component: Component, workload: Workload) -> tuple[int, ...]:
    """Return the distinct routines by which the pipeline itself calls *component*."""
    calls = [event[1] for event in workload.root if event[0] == "c"]
    phases = (phase for phase in workload.phases if phase.component == component.name)
    return tuple(dict.fromkeys(calls[ordinal] for phase in phases for ordinal in phase.calls))


def routines_of(component: Component, workload: Workload) -> tuple[int, ...]:
    """Return the distinct routines of *component*, called by the pipeline or by each other."""
    waiting = list(entered_routines(component, workload))
    found = dict.fromkeys(waiting)
    while waiting:
        for event in workload.routines[waiting.pop()].events:
            if event[0] == "c" and event[1] not in found:
                found[event[1]] = None
                waiting.append(event[1])
    return tuple(found)


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


def largest_batch_of(component: Component, workload: Workload) -> int:
    """Return the largest batch that a convolution of *component* sees, in whichever of its calls.

    An autoencoder may encode one picture and decode many frames.
    """
    kernels = kernels_of(component, workload)
    return max((kernel.shape[0] for kernel in kernels if kernel.kind == "conv"), default=1)


def common_batch_of(component: Component, workload: Workload) -> int:
    """Return a multiple of the batch that *component* is called with; 1 where nothing tells it.

    The batch itself, as a rule: layers fold frames, or positions, into it, so it is what the
    batches of all convolutions and attentions have in common.
    """
    batches = [
        kernel.shape[0]
        for kernel in kernels_of(component, workload)
        if kernel.kind in ("conv", "attention")
    ]
    return math.gcd(*batches) if batches else 1


def is_called_by_forward(component: Component, workload: Workload) -> bool:
    """Whether the call enters *component*, and never by another way, as it does autoencoders."""
    entries = {phase.entry for phase in workload.phases if phase.component == component.name}
    return entries == {"forward"}


def changed_bytes(before: Component, after: Component) -> int:
    """Return the bytes of tensors of *before* that *after* holds in another dtype, or not at all.

    Tied tensors count once, with the place that comes first.
    """
    stored = {tensor.path: tensor.dtype for tensor in after.tensors}
    return sum(
        tensor.num_bytes
        for tensor in before.tensors
        if tensor.tied_to is None and stored.get(tensor.path) != tensor.dtype
    )
