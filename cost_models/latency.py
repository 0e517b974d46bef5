"""Predicts seconds for a GPU that nobody has measured: from a trace, without running anything.

A call takes the sum of its launches (:mod:`~pipefit.cost_models.roofline`), or what the host needs
to issue them, whichever is longer; and then comes what the placement of the weights adds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

from pipefit.cost_models.blocks import Blocks
from pipefit.cost_models.clock import MAX_STEP_LAUNCHES, Issue, Run, Step, steps_of
from pipefit.cost_models.devices import (
    block_calls,
    place_of,
    places_of,
    split_host_bytes,
    split_parts,
    streamed_parts,
    travelled_bytes,
)
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.placement import (
    GroupOffload,
    ModelOffload,
    OnHost,
    Placement,
    Resident,
    SequentialOffload,
    Split,
    Streaming,
)
from pipefit.cost_models.residency import Group, Groups, offload_groups, sequential_groups
from pipefit.cost_models.roofline import (
    DEFAULT_FLAGS,
    Attention,
    Flags,
    host_kernel_seconds,
    host_launches,
    is_wait,
    kernel_seconds,
)
from pipefit.cost_models.streaming import (
    CallTimes,
    Window,
    cut_of,
    parts_of,
    split_call_seconds,
)
from pipefit.cost_models.transfers import (
    COPY_LATENCY_S,
    FRESH_HOST_BYTES_PER_S,
    GROUP_SYNC_S,
    SEQUENTIAL_TENSOR_S,
    TRANSFER_SPREAD,
    LinkRates,
    link_rates,
    pin_bytes_per_s,
)
from pipefit.cost_models.workload import (
    LIBRARY_KINDS,
    Component,
    Event,
    Kernel,
    Phase,
    Workload,
    calls_in_order,
    returned_bytes,
)

SERVER_LAUNCH_S = 53e-6
"""Host time per launch, module calls and views around it included, beside data-centre GPUs."""
DESKTOP_LAUNCH_S = 31e-6
"""The same beside desktop GPUs, whose hosts clock higher (RTX 4090 Stable Diffusion 1.5 rows)."""
GRAPH_S = 3.4
"""Seconds that inductor takes for a graph, and ``WRITTEN_KERNEL_S`` for each kernel that it writes.

FLUX.1-dev on an H100: 67.4 s for the transformer in one graph, 9.6 s for its two kinds of blocks;
https://docs.pytorch.org/devlogs/inductor/2026-05-11-torch-compile-and-diffusers. Two figures for
two constants; they give 70 s for SDXL's UNet, for which 40 to 90 s are reported. With cold caches,
on a server; what ``max-autotune`` tries out comes on top and is not known.
"""
WRITTEN_KERNEL_S = 0.18
CUDNN_TRIALS = 10
"""Algorithms tried for each new convolution: the default of
``torch.backends.cudnn.benchmark_limit``."""
RUNS_PER_TRIAL = 2
"""A warm-up and a timed run (``time_sorted_plan`` in cudnn-frontend, ``CUDNN_FIND_SAMPLE_ONCE``,
which ATen/native/cudnn/Conv_v8.cpp asks for). That slow algorithms are no slower than the chosen
one is assumed, so this is the least that a first call takes."""

NINETIETH_PERCENTILE_ERROR = 0.30
"""|predicted / real - 1| of nine in ten predictions for a GPU and a pipeline that were not fitted
(one source left out: median 0.14, ninetieth percentile 0.30). A prediction's range is this wide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutineCost:
    """One call of a routine, everything that it calls included."""

    gpu_s: float
    """Sum over the launches, as if the host were infinitely fast."""
    num_launches: float
    """By what they cost the host, in launches from a module's Python."""


_Part = tuple[int | None, RoutineCost | None]
"""A call of a routine, or a run of launches, or neither: the host waits for the GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementTime:
    """A component's calls within one pipeline call, with what its placement adds."""

    call_s: float
    first_call_s: float
    """The first pipeline call after applying, where nothing has been prefetched yet."""
    low_s: float
    high_s: float
    """Nine in ten later calls lie between these two: see ``NINETIETH_PERCENTILE_ERROR``."""
    h2d_bytes: int
    d2h_bytes: int


# --- calls ----------------------------------------------------------------------------------------


def launch_seconds(gpu: Gpu) -> float:
    """Return the host time per launch of eager PyTorch; 0 where the CPU stands for a GPU."""
    if gpu.architecture == "cpu":
        return 0.0
    return SERVER_LAUNCH_S if gpu.server else DESKTOP_LAUNCH_S


_Parts = dict[
    tuple[int, tuple[str, ...]],
    tuple[list[tuple[int | None, int]], tuple[tuple[Event, ...], ...]],
]
"""Routine and paths of blocks -> the parts of a call, each with its block and the number of what is
launched there, and what that is. The same on every GPU; tiles consist of the same again."""


class _Known:
    """What has been worked out about routines, by their number, and about the calls of blocks."""

    def __init__(self, parts: _Parts) -> None:
        self.parts = parts
        self.host_s: dict[int, float] = {}
        self.kernels: dict[tuple[int, Attention], RoutineCost] = {}
        self.routines: dict[tuple[int, Attention], RoutineCost] = {}
        self.call_s: dict[tuple[int, Attention], float] = {}
        self.cut: dict[tuple[int, Attention], Sequence[_Part]] = {}
        self.runs: dict[tuple[int, Attention], tuple[Run, ...]] = {}
        self.compiling_s: dict[frozenset[int], float] = {}
        self.waiting: dict[int, bool] = {}
        self.executions: dict[int, Mapping[str, int]] = {}
        self.windows: dict[object, tuple[Window, ...]] = {}
        self.equal_windows: dict[tuple[Window, ...], tuple[Window, ...]] = {}
        """Equal ones as one object, so that it can be a key by its identity."""
        self.call_times: dict[object, CallTimes] = {}


class LatencyModel:
    """Times of one workload on one GPU; remembers each routine, so that a search may ask often."""

    def __init__(
        self,
        workload: Workload,
        gpu: Gpu,
        flags: Flags = DEFAULT_FLAGS,
        *,
        num_cores: int = 1,
        like: LatencyModel | None = None,
        beside: LatencyModel | None = None,
    ) -> None:
        """*like* is a model of the same GPU and flags, of a workload with the same table of
        routines: what it remembers is remembered together. *beside* is one of any GPU."""
        self.workload = workload
        self.gpu = gpu
        self.flags = flags
        self.num_cores = num_cores
        """Those of the host, for what it computes itself."""
        self._launch_s = launch_seconds(gpu)
        parts: _Parts = {} if beside is None else beside._known.parts
        self._known: _Known = _Known(parts) if like is None else like._known
        self._component_groups: dict[tuple[str, Placement], Groups] = {}
        self._call_times: dict[object, CallTimes] = {}
        self._order = calls_in_order(workload)
        self._root_routines = [event[1] for event in workload.root if event[0] == "c"]

    def routine_cost(self, routine: int, attention: Attention = "native") -> RoutineCost:
        """Return what one call of ``workload.routines[routine]`` costs the GPU."""
        key = (routine, attention)
        if key not in self._known.routines:
            events = self.workload.routines[routine].events
            parts = [self._kernel_cost(e[1], attention) for e in events if e[0] == "k"]
            parts += [self.routine_cost(e[1], attention) for e in events if e[0] == "c"]
            self._known.routines[key] = _total(parts)
        return self._known.routines[key]

    def call_seconds(self, routine: int, attention: Attention = "native") -> float:
        """Return the time of one component call: the host issues, the GPU follows.

        Where the host is slower the GPU waits for it, and the host gets no further ahead than its
        queue allows: a tiled decoder computes while the host waits, and then the host glues tiles
        together row by row while the GPU waits.
        """
        key = (routine, attention)
        if key not in self._known.call_s:
            issue = Issue()
            issue.go(steps_of(self._runs(("c", routine), attention), self._launch_s))
            self._known.call_s[key] = issue.done_s
        return self._known.call_s[key]

    def _parts(self, routine: int, attention: Attention) -> Sequence[_Part]:
        """Cut a routine into runs of launches, the calls between them, and waits of the host."""
        key = (routine, attention)
        found = self._known.cut.get(key)
        if found is not None:
            return found
        parts: list[_Part] = []
        run: list[RoutineCost] = []
        num_launches = 0.0

        def end_run() -> None:
            nonlocal num_launches
            if run:
                parts.append((None, _total(run)))
                run.clear()
                num_launches = 0.0

        def add(cost: RoutineCost) -> None:
            # A run is taken to be the same all through, so it must not hold all of a decoder and
            # all that follows.
            nonlocal num_launches
            run.append(cost)
            num_launches += cost.num_launches
            if num_launches > MAX_STEP_LAUNCHES:
                end_run()

        for event in self.workload.routines[routine].events:
            if event[0] == "k":
                if is_wait(self.workload.kernels[event[1]]):
                    end_run()
                    parts.append((None, None))
                else:
                    add(self._kernel_cost(event[1], attention))
            elif event[0] == "c":
                cost = self.routine_cost(event[1], attention)
                if cost.num_launches <= MAX_STEP_LAUNCHES and not self._waits(event[1]):
                    add(cost)
                else:
                    end_run()
                    parts.append((event[1], None))
        end_run()
        self._known.cut[key] = parts
        return parts

    def _waits(self, routine: int) -> bool:
        """Whether the host waits for the GPU somewhere in *routine*."""
        found = self._known.waiting.get(routine)
        if found is None:
            found = self._known.waiting[routine] = any(
                is_wait(self.workload.kernels[event[1]])
                if event[0] == "k"
                else event[0] == "c" and self._waits(event[1])
                for event in self.workload.routines[routine].events
            )
        return found

    def compiling_seconds(self, routines: Iterable[int]) -> float:
        """Return what compiling costs the first call of *routines*; equal graphs are made once."""
        key = frozenset(routines)
        if key not in self._known.compiling_s:
            self._known.compiling_s[key] = self._compiling_seconds(key)
        return self._known.compiling_s[key]

    def _compiling_seconds(self, routines: Iterable[int]) -> float:
        graphs: set[tuple[str, tuple[Kernel, ...]]] = set()
        seen: set[int] = set()
        waiting = list(routines)
        while waiting:
            number = waiting.pop()
            if number in seen:
                continue
            seen.add(number)
            routine = self.workload.routines[number]
            kernels = tuple(self.workload.kernels[e[1]] for e in routine.events if e[0] == "k")
            if any(kernel.launcher in ("compiled", "captured") for kernel in kernels):
                graphs.add((routine.module_class, kernels))
            waiting += [event[1] for event in routine.events if event[0] == "c"]
        num_written = sum(k.kind not in LIBRARY_KINDS for _, kernels in graphs for k in kernels)
        return GRAPH_S * len(graphs) + WRITTEN_KERNEL_S * num_written

    def own_seconds(self) -> float:
        """Return the time of the pipeline's own kernels between its component calls."""
        cost = _total(
            [self._kernel_cost(e[1], "native") for e in self.workload.root if e[0] == "k"]
        )
        return max(cost.gpu_s, cost.num_launches * self._launch_s)

    def trial_seconds(self, routines: Iterable[int]) -> float:
        """Return what cuDNN's trials add to the first call of *routines*.

        Once for each different convolution, however often it runs.
        """
        if not self.flags.cudnn_benchmark or self.gpu.compute_capability is None:
            return 0.0
        reached, waiting = set[int](), list(routines)
        while waiting:
            routine = waiting.pop()
            if routine not in reached:
                reached.add(routine)
                events = self.workload.routines[routine].events
                waiting += [event[1] for event in events if event[0] == "c"]
        kernels = {
            event[1]
            for routine in reached
            for event in self.workload.routines[routine].events
            if event[0] == "k" and self.workload.kernels[event[1]].kind == "conv"
        }
        return (
            CUDNN_TRIALS
            * RUNS_PER_TRIAL
            * math.fsum(self._kernel_cost(index, "native").gpu_s for index in sorted(kernels))
        )

    def executions(self, routine: int) -> Mapping[str, int]:
        """Return how often one call of *routine* calls each submodule, by path; "" is itself."""
        if routine not in self._known.executions:
            counts: Counter[str] = Counter({"": 1})
            for event in self.workload.routines[routine].events:
                if event[0] != "c" or event[2].startswith("/"):
                    continue
                for path, times in self.executions(event[1]).items():
                    # Path "" is another method of the same module, not a second call of it.
                    if event[2] or path:
                        counts[".".join(filter(None, (event[2], path)))] += times
            self._known.executions[routine] = counts
        return self._known.executions[routine]

    def placement_seconds(
        self,
        component: Component,
        calls: Sequence[tuple[int, int]],
        placement: Placement,
        *,
        attention: Attention = "native",
        num_onloads: int = 1,
        num_offloads: int = 1,
    ) -> PlacementTime:
        """Return the time of *component*'s *calls* (routine, how often) within one pipeline call.

        *num_onloads* and *num_offloads* say how often model offload moves the whole component, see
        :func:`~pipefit.cost_models.residency.model_offload_residency`; others ignore them.

        Raises:
            InvalidRequest: if the GPU lacks a figure that the estimate needs.
        """
        once = _Transfer()
        if isinstance(placement, ModelOffload):
            once = _component_moves(component, link_rates(self.gpu), num_onloads, num_offloads)
        times = [
            (
                self._compute_s(routine, attention, placement),
                self._transfer(component, routine, placement),
                count,
            )
            for routine, count in calls
        ]

        def total_s(compute_factor: float, transfer_factor: float) -> float:
            return once.exposed_s * transfer_factor + math.fsum(
                count
                * (
                    max(compute_s * compute_factor, transfer.hidden_s * transfer_factor)
                    + transfer.exposed_s * transfer_factor
                )
                for compute_s, transfer, count in times
            )

        call_s = total_s(1, 1)
        # Nothing is prefetched in the first forward: it records the order of the groups.
        unprefetched_s = next((min(c, t.hidden_s) for c, t, count in times if count), 0.0)
        return PlacementTime(
            call_s=call_s,
            first_call_s=call_s + unprefetched_s,
            low_s=total_s(1 / (1 + NINETIETH_PERCENTILE_ERROR), 1 / TRANSFER_SPREAD),
            high_s=total_s(1 / (1 - NINETIETH_PERCENTILE_ERROR), TRANSFER_SPREAD),
            h2d_bytes=once.h2d_bytes + sum(t.h2d_bytes * count for _, t, count in times),
            d2h_bytes=once.d2h_bytes + sum(t.d2h_bytes * count for _, t, count in times),
        )

    def _compute_s(self, routine: int, attention: Attention, placement: Placement) -> float:
        """Return the time of a call, its copies left out."""
        if isinstance(placement, OnHost):
            return self._host_seconds(routine)
        if (
            isinstance(placement, GroupOffload)
            and placement.offload_type == "leaf_level"
            and not placement.use_stream
        ):
            # The host waits for the GPU at every layer, so that neither hides behind the other.
            cost = self.routine_cost(routine, attention)
            return cost.gpu_s + cost.num_launches * self._launch_s
        return self.call_seconds(routine, attention)

    def _host_seconds(self, routine: int) -> float:
        """Return how long the host's cores compute for one call of *routine*."""
        found = self._known.host_s.get(routine)
        if found is None:
            found = self._known.host_s[routine] = math.fsum(
                host_kernel_seconds(self.workload.kernels[event[1]], self.num_cores)
                if event[0] == "k"
                else self._host_seconds(event[1])
                for event in self.workload.routines[routine].events
                if event[0] in ("k", "c")
            )
        return found

    def _transfer(self, component: Component, routine: int, placement: Placement) -> _Transfer:
        """What one call of *routine* copies."""
        match placement:
            case OnHost():
                return _results_in(returned_bytes(self.workload, routine), link_rates(self.gpu))
            case Resident() | ModelOffload() | Streaming() | Split():
                return _Transfer()
            case SequentialOffload():
                groups = self._groups(component, placement)
                return _sequential_loads(groups, self.executions(routine), link_rates(self.gpu))
            case GroupOffload():
                return _group_loads(
                    self._groups(component, placement),
                    self.executions(routine),
                    link_rates(self.gpu),
                    placement,
                    is_forward=self.workload.routines[routine].entry == "forward",
                )
        assert_never(placement)

    def streaming_seconds(
        self,
        phase: Phase,
        placement: Streaming,
        replaced: Mapping[int, int],
        *,
        attention: Attention = "native",
        with_range: bool = True,
    ) -> PlacementTime:
        """Return the time of a phase's calls in one pipeline call, their weights streamed.

        *replaced* are the routines of a traced variant in place of those of the pipeline's frame.
        Without *with_range* the two bounds are that time too.

        Raises:
            InvalidRequest: if the GPU lacks a figure that the estimate needs.
        """

        def total_s(compute_factor: float, transfer_factor: float) -> float:
            later_s: dict[int, float] = {}
            seconds = []
            for call in phase.calls:
                routine, is_cold = self._root_routines[call], self._is_cold(call, placement)
                found_s = None if is_cold else later_s.get(routine)
                if found_s is None:
                    found_s = self._streamed_call_s(
                        call, placement, replaced, attention, compute_factor, transfer_factor
                    )
                    if not is_cold:
                        later_s[routine] = found_s
                seconds.append(found_s)
            return math.fsum(seconds)

        call_s = low_s = high_s = total_s(1, 1)
        if with_range:
            low_s = total_s(1 / (1 + NINETIETH_PERCENTILE_ERROR), 1 / TRANSFER_SPREAD)
            high_s = total_s(1 / (1 - NINETIETH_PERCENTILE_ERROR), TRANSFER_SPREAD)
        cut = cut_of(self.workload.component(phase.component), placement)
        streamed = cut.streamed(placement.resident_blocks)
        stay = [cut.blocks[i].num_bytes for i in cut.called if i not in streamed]
        stay.append(cut.rest_bytes)
        num_cold = sum(self._is_cold(call, placement) for call in phase.calls)
        return PlacementTime(
            call_s=call_s,
            first_call_s=call_s,
            low_s=low_s,
            high_s=high_s,
            h2d_bytes=num_cold * sum(stay)
            + len(phase.calls) * sum(cut.blocks[i].num_bytes for i in streamed),
            d2h_bytes=0,
        )

    def split_seconds(
        self,
        component: Component,
        calls: Sequence[tuple[int, int]],
        split: Split,
        others: Mapping[int, LatencyModel],
        between_s: Callable[[int, int, int], float],
        *,
        attention: Attention = "native",
    ) -> PlacementTime:
        """Return the time of *component*'s *calls* (routine, how often), split over GPUs.

        This model is of the GPU on which the pipeline computes, *others* are of the others.
        *between_s* says how long so many bytes take from one GPU to another.
        """
        places = places_of(component, split)
        away = frozenset(path for path, index in places.items() if index in others)
        streamed = streamed_parts(component, split)

        def computing_s(routine: int, compute_factor: float, transfer_factor: float) -> float:
            if streamed:
                return split_call_seconds(
                    self._split_steps(component, routine, split, others, attention, compute_factor),
                    streamed,
                    {
                        index: link_rates(others.get(index, self).gpu).h2d_pinned_bytes_per_s
                        / transfer_factor
                        for index in streamed
                    },
                )
            compute_s = self.call_seconds(routine, attention)
            for path, block in block_calls(self.workload, routine, away):
                elsewhere_s = others[place_of(places, path)].call_seconds(block, attention)
                compute_s += elsewhere_s - self.call_seconds(block, attention)
            return compute_s * compute_factor

        def total_s(compute_factor: float, transfer_factor: float) -> float:
            seconds = 0.0
            for routine, count in calls:
                moved = travelled_bytes(self.workload, component, split, routine)
                copy_s = sum(between_s(*way, num_bytes) for way, num_bytes in moved.items())
                compute_s = computing_s(routine, compute_factor, transfer_factor)
                seconds += count * (compute_s + copy_s * transfer_factor)
            return seconds

        call_s = total_s(1, 1)
        return PlacementTime(
            call_s=call_s,
            first_call_s=call_s,
            low_s=total_s(1 / (1 + NINETIETH_PERCENTILE_ERROR), 1 / TRANSFER_SPREAD),
            high_s=total_s(1 / (1 - NINETIETH_PERCENTILE_ERROR), TRANSFER_SPREAD),
            h2d_bytes=split_host_bytes(component, split) * sum(count for _, count in calls),
            d2h_bytes=0,
        )

    def _split_steps(
        self,
        component: Component,
        routine: int,
        split: Split,
        others: Mapping[int, LatencyModel],
        attention: Attention,
        compute_factor: float,
    ) -> list[tuple[int, int | None, Sequence[Step]]]:
        """Return the parts of one call of a split component, each with its steps on its GPU."""
        steps: dict[object, Sequence[Step]] = {}
        parts = []
        for device, block, event in split_parts(self.workload, component, split, routine):
            on = others.get(device, self)
            key = id(on), event[:2]
            if key not in steps:
                runs = on._runs(event, attention)
                steps[key] = steps_of(runs, on._launch_s, gpu_factor=compute_factor)
            parts.append((device, block, steps[key]))
        return parts

    def _is_cold(self, call: int, placement: Streaming) -> bool:
        """Whether one of the pipeline's calls finds nothing of its component on the GPU."""
        others_before = call == 0 or self._order[call - 1] != self._order[call]
        return placement.when_idle == "leave" and others_before

    def _streamed_call_s(
        self,
        call: int,
        placement: Streaming,
        replaced: Mapping[int, int],
        attention: Attention,
        compute_factor: float,
        transfer_factor: float,
    ) -> float:
        """Return the time of one of the pipeline's calls, by what was called before it."""
        name = self._order[call]
        routine = self._root_routines[call]
        is_cold, ahead_s = self._is_cold(call, placement), 0.0
        before = call - 1
        # What that component itself copies meanwhile is not known here, and taken to be little.
        while is_cold and before >= 0 and self._order[before] == placement.load_with:
            ahead_s += compute_factor * self.call_seconds(self._root_routines[before])
            before -= 1
        times = self._times_of(
            name,
            replaced.get(routine, routine),
            placement,
            attention,
            compute_factor,
            transfer_factor,
            ahead_s,
        )
        return times.cold_s if is_cold else times.later_s

    def _times_of(
        self,
        name: str,
        routine: int,
        placement: Streaming,
        attention: Attention,
        compute_factor: float,
        transfer_factor: float,
        ahead_s: float,
    ) -> CallTimes:
        key = name, routine, placement, attention, compute_factor, transfer_factor, ahead_s
        found = self._call_times.get(key)
        if found is None:
            cut = cut_of(self.workload.component(name), placement)
            windows = self._windows_of(routine, cut, attention, compute_factor)
            link = link_rates(self.gpu)
            rate = {
                "pinned": link.h2d_pinned_bytes_per_s,
                "pageable": link.h2d_pageable_bytes_per_s,
                "disk": link.h2d_pageable_bytes_per_s,
            }[placement.host_memory]
            # Another component of the same blocks, or another kernel for it, may take as long.
            what = id(windows), cut.sizes, replace(placement, load_with=None, call_order=())
            alike = what, rate / transfer_factor, ahead_s
            found = self._known.call_times.get(alike)
            if found is None:
                found = self._known.call_times[alike] = CallTimes(
                    windows, cut, placement, rate / transfer_factor, ahead_s=ahead_s
                )
            self._call_times[key] = found
        return found

    def _windows_of(
        self, routine: int, cut: Blocks, attention: Attention, compute_factor: float
    ) -> tuple[Window, ...]:
        """Return the windows of one call of *routine*, equal ones as the same object."""
        where = routine, tuple(block.path for block in cut.blocks)
        place = *where, attention, compute_factor
        found = self._known.windows.get(place)
        if found is None:
            if where not in self._known.parts:
                numbers: dict[tuple[Event, ...], int] = {}
                parts = [
                    (block, numbers.setdefault(tuple(e[:2] for e in events), len(numbers)))
                    for block, events in parts_of(self.workload, routine, cut)
                ]
                self._known.parts[where] = parts, tuple(numbers)
            parts, different = self._known.parts[where]
            steps = [
                steps_of(
                    (run for event in events for run in self._runs(event, attention)),
                    self._launch_s,
                    gpu_factor=compute_factor,
                )
                for events in different
            ]
            made = tuple(Window(block, steps[number]) for block, number in parts)
            found = self._known.windows[place] = self._known.equal_windows.setdefault(made, made)
        return found

    def _runs(self, event: Event, attention: Attention) -> tuple[Run, ...]:
        """Return the runs of launches, and the waits, that a kernel or a call consists of."""
        if event[0] == "k":
            if is_wait(self.workload.kernels[event[1]]):
                return (None,)
            kernel = self._kernel_cost(event[1], attention)
            return ((kernel.num_launches, kernel.gpu_s),)
        key = (event[1], attention)
        found = self._known.runs.get(key)
        if found is None:
            runs: list[Run] = []
            for callee, cost in self._parts(event[1], attention):
                if callee is not None:
                    runs += self._runs(("c", callee), attention)
                else:
                    runs.append(None if cost is None else (cost.num_launches, cost.gpu_s))
            found = self._known.runs[key] = tuple(runs)
        return found

    def _groups(self, component: Component, placement: GroupOffload | SequentialOffload) -> Groups:
        key = (component.name, placement)
        if key not in self._component_groups:
            self._component_groups[key] = (
                offload_groups(component, placement)
                if isinstance(placement, GroupOffload)
                else sequential_groups(component)
            )
        return self._component_groups[key]

    def _kernel_cost(self, index: int, attention: Attention) -> RoutineCost:
        key = (index, attention)
        if key not in self._known.kernels:
            kernel = self.workload.kernels[index]
            self._known.kernels[key] = RoutineCost(
                gpu_s=kernel_seconds(kernel, self.gpu, attention, self.flags),
                num_launches=host_launches(kernel, self.gpu, attention),
            )
        return self._known.kernels[key]


def _total(parts: Sequence[RoutineCost]) -> RoutineCost:
    if len(parts) == 1:
        return parts[0]
    return RoutineCost(
        gpu_s=math.fsum(p.gpu_s for p in parts),
        num_launches=sum(p.num_launches for p in parts),
    )


# --- what placement adds --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Transfer:
    """Copies of one call: those that run beside the arithmetic, and those that hold it up."""

    hidden_s: float = 0.0
    exposed_s: float = 0.0
    h2d_bytes: int = 0
    d2h_bytes: int = 0


def _component_moves(
    component: Component, link: LinkRates, num_onloads: int, num_offloads: int
) -> _Transfer:
    """Model offload: ``Module.to`` there and back through pageable memory, into new host pages."""
    size = component.weight_bytes
    back_s = size / link.d2h_pageable_bytes_per_s
    if math.isfinite(link.d2h_pageable_bytes_per_s):
        back_s += size / FRESH_HOST_BYTES_PER_S
    return _Transfer(
        exposed_s=num_onloads * size / link.h2d_pageable_bytes_per_s + num_offloads * back_s,
        h2d_bytes=num_onloads * size,
        d2h_bytes=num_offloads * size,
    )


def _results_in(sizes: Sequence[int], link: LinkRates) -> _Transfer:
    """What the host computed, tensor by tensor out of pageable memory."""
    num_bytes = sum(sizes)
    seconds = num_bytes / link.h2d_pageable_bytes_per_s
    if math.isfinite(link.h2d_pageable_bytes_per_s):  # otherwise they are there already
        seconds += len(sizes) * COPY_LATENCY_S
    return _Transfer(exposed_s=seconds, h2d_bytes=num_bytes)


def _sequential_loads(groups: Groups, executions: Mapping[str, int], link: LinkRates) -> _Transfer:
    """Sequential offload: each tensor by itself, blocking, and dropped afterwards."""
    num_bytes, num_tensors = _loaded(groups.groups, executions)
    seconds = num_bytes / link.h2d_pageable_bytes_per_s
    # Where the CPU stands for a GPU nothing is copied and no cache is emptied; the hook still runs.
    has_link = math.isfinite(link.h2d_pageable_bytes_per_s)
    seconds += num_tensors * (SEQUENTIAL_TENSOR_S if has_link else COPY_LATENCY_S)
    return _Transfer(exposed_s=seconds, h2d_bytes=num_bytes)


def _group_loads(
    groups: Groups,
    executions: Mapping[str, int],
    link: LinkRates,
    placement: GroupOffload,
    *,
    is_forward: bool,
) -> _Transfer:
    """Group offload, one call.

    Groups that are not streamed travel both ways, blocking. Streamed groups only come in, beside
    the arithmetic where a recorder saw their order (not below a component entered by ``decode``);
    the host waits for each unless ``record_stream``, and page-locks each first under
    ``low_cpu_mem_usage`` and from disk, whose own time is left out: the files are cached in RAM as
    long as that suffices.
    """
    streamed = [g for g in groups.all if g.is_streamed]
    blocking = [g for g in groups.all if not g.is_streamed]
    blocking_bytes, blocking_tensors = _loaded(blocking, executions)
    exposed_s = link.round_trip_s(blocking_bytes, blocking_tensors)
    recorders = [r for r in groups.recorders if r or is_forward]
    hidden_s = 0.0
    for group in streamed:
        num_bytes, num_tensors = _loaded([group], executions)
        if not num_tensors:
            continue
        copy_s = num_bytes / link.h2d_streamed_bytes_per_s + num_tensors * COPY_LATENCY_S
        if any(_is_below(group.paths[0], recorder) for recorder in recorders):
            hidden_s += copy_s
        else:
            exposed_s += copy_s
        if not placement.record_stream:
            exposed_s += executions[group.paths[0]] * GROUP_SYNC_S
        exposed_s += num_bytes / pin_bytes_per_s(placement)
    streamed_bytes, _ = _loaded(streamed, executions)
    return _Transfer(
        hidden_s=hidden_s,
        exposed_s=exposed_s,
        h2d_bytes=streamed_bytes + blocking_bytes,
        d2h_bytes=blocking_bytes,
    )


def _loaded(groups: Sequence[Group], executions: Mapping[str, int]) -> tuple[int, int]:
    """Bytes and tensors that come in: a group is loaded whenever its first module is called."""
    times = [(executions.get(group.paths[0], 0), group) for group in groups]
    return (
        sum(count * group.num_bytes for count, group in times),
        sum(count * len(group.tensor_bytes) for count, group in times),
    )


def _is_below(path: str, ancestor: str) -> bool:
    return not ancestor or path == ancestor or path.startswith(ancestor + ".")
