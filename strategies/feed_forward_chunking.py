"""Let feed-forward layers work on a part of the tokens, or of the batch, at a time.

The hidden layer of a transformer's block is four times as wide as its tokens, eight times where it
is gated; a part at a time, only that part of it exists. diffusers' blocks have this built in
(``set_chunk_feed_forward``); ``enable_forward_chunking`` of some models does nothing but set all of
them, so blocks are asked, not models. Two block classes have the method and never look at it.

One chunk size holds for all blocks, and it has to divide what each of them sees: the lengths at
every resolution of a UNet, the frames in blocks over time. What does not divide is an error in the
middle of the call, so sizes are read off the traced call.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.timeline import Timeline
from pipefit.cost_models.workload import Component, Routine, Workload, returned_bytes
from pipefit.strategies.live import CHUNKING_ATTRIBUTES, attribute_restorer, reads_flag
from pipefit.strategies.parameters import unknown_parameter
from pipefit.strategies.strategy import Kind, Quality, Undo
from pipefit.strategies.traced import entered_routines, kernels_below, routines_of

LAYERS = ("ff", "ff_in", "ff_context")
"""Names of the layers that blocks call in parts (models/attention.py, diffusers 0.42.1)."""

WANTED_CHUNKS = 4
"""Parts of the longest input above which more gain little: a quarter of the hidden layer is no more
than what the block holds besides. Our choice."""

MOST_CHUNKS = 16
"""Parts of any one input above which launches cost more than the memory is worth. Our choice."""

LEAST_SAVED_SHARE = 0.1
"""Share of a component's peak that must go with the hidden layers for the option to be tried. Our
choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForwardChunking:
    """``chunk_size`` rows of dimension ``dim`` at a time: 0 is the batch, 1 the tokens.

    Blocks over time divide their frames, whatever ``dim`` is.
    """

    name: str = "feed_forward_chunking"
    kind: Kind = "compute"
    quality: Quality = Quality.HIGH

    def traits(self, module: Any) -> dict[str, Any]:
        """Which of its block classes work in parts, and whether they obey ``dim`` (else: 1)."""
        return {
            "chunked_blocks": {
                type(block).__name__: "dim" in _parameters_of(block.set_chunk_feed_forward)
                for block in _blocks(module)
            }
        }

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """The size with the most parts, where the hidden layers are a good part of the peak."""
        if self.refusal(component, {"chunk_size": 1}):
            return ()
        inputs = list(_inputs(component, workload))
        best = max((_sizes(inputs, dim) for dim in (0, 1)), key=lambda found: found[0])
        num_chunks, parameters = best
        if num_chunks < 2 or _saved_share(component, workload, gpu) < LEAST_SAVED_SHARE:
            return ()
        return (parameters,)

    def refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """Components without such blocks, and sizes that are no size."""
        wrong = unknown_parameter(self.name, parameters, ("chunk_size", "dim"))
        if wrong:
            return wrong
        if not component.traits.get("chunked_blocks"):
            return f"{component.class_name} has no feed-forward layer that works in parts."
        size, dim = parameters.get("chunk_size"), parameters.get("dim", 0)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            return f"feed_forward_chunking:chunk_size is a number from 1 up, but was {size!r}."
        if isinstance(dim, bool) or dim not in (0, 1):
            return f"feed_forward_chunking:dim is 0 (batch) or 1 (tokens), but was {dim!r}."
        return None

    def placement(self, parameters: Mapping[str, Any]) -> None:
        """Weights stay where they are."""

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Set every block; undo gives each the size and dimension that it had."""
        with ExitStack() as undo:
            for block in _blocks(getattr(pipe, str(component))):
                undo.callback(attribute_restorer(block, CHUNKING_ATTRIBUTES))
                block.set_chunk_feed_forward(parameters["chunk_size"], dim=parameters.get("dim", 0))
            return undo.pop_all().close


def _blocks(module: Any) -> list[Any]:
    return [
        part
        for part in module.modules()
        if hasattr(part, "set_chunk_feed_forward")
        and reads_flag(type(part), CHUNKING_ATTRIBUTES[0])
    ]


def _parameters_of(method: Any) -> Mapping[str, Any]:
    return inspect.signature(method).parameters


def _inputs(component: Component, workload: Workload) -> Iterator[tuple[int, int, bool]]:
    """Yield batch and tokens of each input of a feed-forward layer, and whether ``dim`` holds."""
    obeys = component.traits["chunked_blocks"]
    for number in routines_of(component, workload):
        routine = workload.routines[number]
        for layer in _layers(routine, obeys):
            for kernel in kernels_below(workload, layer):
                # Matrix products count rows alone; what comes behind the first has all dimensions.
                if kernel.kind not in ("gemm", "attention", "conv") and len(kernel.shape) == 3:
                    yield kernel.shape[0], kernel.shape[1], obeys[routine.module_class]
                    break


def _layers(routine: Routine, classes: Mapping[str, Any]) -> list[int]:
    if routine.module_class not in classes:
        return []
    return [event[1] for event in routine.events if event[0] == "c" and event[2] in LAYERS]


def _sizes(inputs: Sequence[tuple[int, int, bool]], dim: int) -> tuple[int, dict[str, int]]:
    """Return into how many parts at the most *dim* can be divided, and the parameters for it.

    0 where it cannot, or where some block would have to work in far too many parts.
    """
    lengths = [(tokens if dim or not obeys else batch) for batch, tokens, obeys in inputs]
    if not lengths:
        return 0, {}
    # Half of an even batch has to be divisible too: guidance may be split.
    halves = [batch // 2 for batch, _, obeys in inputs if not dim and obeys and batch % 2 == 0]
    common, longest = math.gcd(*lengths, *halves), max(lengths)
    fitting = [size for size in range(1, common + 1) if common % size == 0]
    enough = [size for size in fitting if longest // size >= WANTED_CHUNKS]
    chunk_size = max(enough, default=1)
    num_chunks = longest // chunk_size
    return (num_chunks if num_chunks <= MOST_CHUNKS else 0), {"chunk_size": chunk_size, "dim": dim}


def _saved_share(component: Component, workload: Workload, gpu: Gpu) -> float:
    """Return which part of the component's peak goes if feed-forward layers need their output only.

    No chunk size saves more.
    """
    classes = component.traits["chunked_blocks"]
    numbers = list(routines_of(component, workload))
    layers = {layer for n in numbers for layer in _layers(workload.routines[n], classes)}
    lean = list(workload.routines)
    for layer in layers:
        sizes = dict(zip(lean[layer].returns, returned_bytes(workload, layer), strict=True))
        events = tuple(("a", number, sizes[number]) for number in sorted(sizes))
        lean[layer] = replace(lean[layer], events=events)
    entered = entered_routines(component, workload)
    peaks = []
    for routines in (workload.routines, tuple(lean)):
        timeline = Timeline(replace(workload, routines=routines), gpu)
        peaks.append(
            max(
                timeline.outcome(n, (0,) * workload.routines[n].num_outside).peak.peak_bytes
                for n in entered
            )
        )
    return 1 - peaks[1] / peaks[0] if peaks[0] else 0.0
