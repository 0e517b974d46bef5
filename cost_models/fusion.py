"""What a compiler makes of a recorded call: fewer kernels that move fewer bytes.

A call that ``torch.compile`` or ``torch.jit.trace`` turned into one graph is recorded flat, with
the buffers that each operator reads and writes. Convolutions, matrix products and attention stay
the library kernels that they are. Whatever lies between two of them becomes one kernel, which reads
each of its inputs once and writes what somebody reads later. What one would get wrong: the bytes of
a fused kernel are those of its *distinct* inputs; added up operator by operator, as in eager
execution, what lies between the products of FLUX.1 would be five times as much.

The rule has no constant. Compiled calls of FLUX.1, CogVideoX, SDXL, SSD-1B and SD 1.5 that others
published come out 0 to 8 % too long by it (docs/compile.md). It is the most that inductor fuses: a
normalisation of much data takes it two kernels.

Buffers stay those of the eager call. Inductor's own plan of an autoencoder needs half as much, but
that is not where a compiled call peaks: it is while inductor times kernels, which it does in the
first call. Before the graph runs, each convolution and product that ``max-autotune`` tries stands
here once, launched as ``tried``; what such trials allocate is the business of workspace.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipefit.cost_models.workload import Kernel, Launcher

FUSABLE: Mapping[Launcher, Collection[str]] = {
    "compiled": ("norm", "elementwise", "copy", "index", "reduce"),
    "captured": ("norm", "elementwise", "copy", "index", "reduce"),
    "traced": ("elementwise",),
}
"""Kinds of kernels that are fused with their neighbours. TorchScript's fuser (NNC,
torch/csrc/jit/tensorexpr) is taken to do pointwise operators alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """One launch of a flat call, with what it touches: (buffer, bytes of it).

    Buffers of the call have their number; negative ones are anybody else's.
    """

    kernel: Kernel
    reads: tuple[tuple[int, int], ...]
    writes: tuple[tuple[int, int], ...]


Step = tuple[Any, ...]
"""An event of a routine; a launch is ``("k", Kernel)`` here, its number is the recorder's."""


def graph_steps(
    recorded: Sequence[Any], alive: Collection[int], launcher: Launcher, *, is_tried: bool = False
) -> list[Step]:
    """Return what happens in a call that is one graph, whose kernels *launcher* launches.

    *recorded* are the events of the eager call, launches as :class:`Operator`; *alive* are its
    buffers that outlive it. *is_tried*: each different convolution and product is timed first.
    """
    groups = _groups(recorded, FUSABLE[launcher])
    last = {
        buffer: place
        for place, group in sorted(groups.items())
        for one in group
        for buffer, _ in (*one.reads, *one.writes)
    }
    steps: list[Step] = [("k", kernel) for kernel in _trials(recorded)] if is_tried else []
    for place, one in enumerate(recorded):
        if not isinstance(one, Operator):
            steps.append(one)
        elif group := groups.get(place):
            kernel = group[0].kernel
            if len(group) > 1:
                later = {n for n, end in last.items() if end > place}
                kernel = _fused(group, later.union(alive))
            if kernel.write_bytes:  # else it makes what nobody reads
                steps.append(("k", replace(kernel, launcher=launcher)))
    return steps


def _trials(recorded: Sequence[Any]) -> list[Kernel]:
    """Return what inductor chooses kernels for: the results are remembered by shape."""
    kernels = (one.kernel for one in recorded if isinstance(one, Operator))
    chosen = dict.fromkeys(kernel for kernel in kernels if kernel.kind in ("conv", "gemm"))
    return [replace(kernel, launcher="tried") for kernel in chosen]


def _groups(recorded: Sequence[Any], fusable: Collection[str]) -> dict[int, list[Operator]]:
    """Return the operators that become one launch, by the place of the last of them."""
    groups: dict[int, list[Operator]] = {}
    before = -1
    for place, one in enumerate(recorded):
        if isinstance(one, Operator):
            group = groups.pop(before, []) if one.kernel.kind in fusable else []
            groups[place] = [*group, one]
            before = place if one.kernel.kind in fusable else -1
        elif one[0] not in ("a", "f", "x"):
            before = -1  # the host waits, or weights change: no graph goes across
    return groups


def _fused(group: Sequence[Operator], later: Collection[int]) -> Kernel:
    reads: dict[int, int] = {}
    writes: dict[int, int] = {}
    for one in group:
        for buffer, num_bytes in one.reads:
            if one.kernel.kind == "index":  # of a table only the rows that are written
                num_bytes = min(num_bytes, one.kernel.write_bytes)
            if buffer not in writes:
                reads[buffer] = max(reads.get(buffer, 0), num_bytes)
        for buffer, num_bytes in one.writes:
            writes[buffer] = max(writes.get(buffer, 0), num_bytes)
    largest = max(group, key=lambda one: one.kernel.write_bytes).kernel
    return Kernel(
        kind="elementwise",
        name="fused",
        dtype=largest.dtype,
        read_bytes=sum(reads.values()),
        # Others' buffers (negative numbers) are read by somebody.
        write_bytes=sum(n for buffer, n in writes.items() if buffer < 0 or buffer in later),
        shape=largest.shape,
    )
