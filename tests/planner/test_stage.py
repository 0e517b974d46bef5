"""A stage by itself: streams and events in time, several GPUs, and the timeline that it leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.end_to_end.small_runs import PLACEMENTS, untouched
from tests.small_pipelines import small_call

from pipefit.cost_models.clock import Span
from pipefit.cost_models.machine import Gpu, Link
from pipefit.cost_models.transfers import link_rates
from pipefit.cost_models.units import MIB
from pipefit.errors import InvalidRequest
from pipefit.planner.catalog import find_gpu
from pipefit.planner.rehearse import rehearse
from pipefit.planner.stage import Stage
from pipefit.planner.timeline import Timeline

CARD = find_gpu("rtx-4090")
OTHER = replace(find_gpu("rtx-4060"), index=1)
PINNED_BYTES_PER_S = link_rates(CARD).h2d_pinned_bytes_per_s
BIG = 512 * MIB
COPY_S = BIG / PINNED_BYTES_PER_S


def opened(*gpus: Gpu, **more: Any) -> Iterator[Stage]:
    stage = Stage(gpus, {}, **more)
    with stage.machine, torch.no_grad():
        yield stage


@pytest.fixture
def stage() -> Iterator[Stage]:
    yield from opened(CARD)


@pytest.fixture
def pair() -> Iterator[Stage]:
    yield from opened(CARD, OTHER)


def pinned(stage: Stage, num_bytes: int = BIG) -> torch.Tensor:
    host = stage.machine.empty((num_bytes,), (1,), torch.uint8, torch.device("cpu"))
    return host.pin_memory()


# -- time


def test_a_copy_on_a_stream_runs_beside_the_kernels(stage: Stage) -> None:
    source, side = pinned(stage), torch.cuda.Stream()
    left = torch.empty(8192, 8192, dtype=torch.bfloat16, device="cuda")
    stage.clock.synchronise()
    begin_s = stage.clock.host_s
    with torch.cuda.stream(side):
        copied = source.to("cuda", non_blocking=True)
    product = left @ left
    torch.cuda.synchronize()
    both_s = stage.clock.host_s - begin_s
    again = left @ left
    torch.cuda.synchronize()
    product_s = stage.clock.host_s - begin_s - both_s
    assert both_s == pytest.approx(max(COPY_S, product_s), rel=0.02)
    del copied, product, again


def test_a_kernel_waits_for_the_event_of_a_copy(stage: Stage) -> None:
    source, side = pinned(stage), torch.cuda.Stream()
    arrived = torch.cuda.Event()
    with torch.cuda.stream(side):
        copied = source.to("cuda", non_blocking=True)
        arrived.record()
    assert not arrived.query()
    torch.cuda.current_stream().wait_event(arrived)
    copied.add_(1)
    assert stage.clock.host_s < COPY_S / 10
    assert stage.clock.done_s(0) > COPY_S
    torch.cuda.current_stream().synchronize()
    assert arrived.query()
    assert side.query()


def test_elapsed_time_is_that_of_the_clock(stage: Stage) -> None:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    source = pinned(stage)
    begin.record()
    copied = source.to("cuda", non_blocking=True)
    end.record()
    end.synchronize()
    assert begin.elapsed_time(end) == pytest.approx(COPY_S * 1e3, rel=0.01)
    with pytest.raises(ValueError, match="recorded"):
        begin.elapsed_time(torch.cuda.Event())
    del copied


def test_pageable_memory_holds_the_host_up_and_page_locked_does_not(stage: Stage) -> None:
    pageable = stage.machine.empty((BIG,), (1,), torch.uint8, torch.device("cpu"))
    locked = pageable.pin_memory()
    moved = []
    for source, is_held in ((locked, False), (pageable, True)):
        begin_s = stage.clock.host_s
        moved.append(source.to("cuda", non_blocking=True))
        assert (stage.clock.host_s - begin_s > COPY_S / 2) is is_held


def test_a_recorded_block_is_free_when_its_stream_has_passed(stage: Stage) -> None:
    left = torch.empty(8192, 8192, dtype=torch.bfloat16, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        made = torch.empty(BIG, dtype=torch.uint8, device="cuda")
    made.record_stream(torch.cuda.current_stream())
    products = [left @ left]  # still queued when the block is given up
    del made
    reserved_bytes = torch.cuda.memory_reserved()
    with torch.cuda.stream(side):
        made = torch.empty(BIG, dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_reserved() == reserved_bytes + BIG
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        again = torch.empty(BIG, dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_reserved() == reserved_bytes + BIG
    del made, again, products


def test_a_check_without_a_result_takes_its_time_where_its_argument_lies(stage: Stage) -> None:
    before_s = stage.clock.host_s
    torch.linalg.solve(torch.empty(4, 4, device="cuda"), torch.empty(4, device="cuda"))
    assert stage.clock.host_s > before_s


# -- several GPUs


def test_each_gpu_has_its_own_memory_streams_and_size(pair: Stage) -> None:
    assert torch.cuda.device_count() == 2
    first = torch.empty(BIG, dtype=torch.uint8, device="cuda:0")
    second = torch.empty(3 * BIG, dtype=torch.uint8, device="cuda:1")
    assert torch.cuda.memory_allocated(0) == BIG
    assert torch.cuda.memory_allocated(1) == 3 * BIG
    assert torch.cuda.mem_get_info(1)[1] == OTHER.total_bytes
    assert torch.cuda.get_device_properties(1).total_memory == OTHER.total_bytes
    assert torch.cuda.current_stream(0) is not torch.cuda.current_stream(1)
    with torch.cuda.device(1):
        third = torch.empty(BIG, dtype=torch.uint8, device="cuda")
    assert third.device == torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    with pytest.raises(torch.OutOfMemoryError, match="GPU 1 has a total capacity"):
        torch.empty(OTHER.total_bytes, dtype=torch.uint8, device="cuda:1")
    with pytest.raises(RuntimeError, match="same device"):
        first + second[:BIG]
    del first, second, third
    assert torch.cuda.memory_allocated(1) == 0


def test_tensors_travel_between_gpus_by_the_link_or_through_the_host() -> None:
    times = []
    for links in ((), (Link(first=0, second=1, bytes_per_s=100e9, kind="NVLink"),)):
        for stage in opened(CARD, OTHER, links=links):
            here = torch.empty(BIG, dtype=torch.uint8, device="cuda:0")
            there = here.to("cuda:1")
            assert there.device == torch.device("cuda", 1)
            torch.cuda.synchronize()
            times.append(stage.clock.host_s)
    through_host_s = BIG / PINNED_BYTES_PER_S + BIG / link_rates(OTHER).h2d_pinned_bytes_per_s
    assert times == [
        pytest.approx(through_host_s, rel=0.01),
        pytest.approx(BIG / 100e9, rel=0.01),
    ]


def test_kernels_of_two_gpus_run_side_by_side(pair: Stage) -> None:
    lefts = [
        torch.empty(4096, 4096, dtype=torch.bfloat16, device=f"cuda:{place}") for place in (0, 1)
    ]
    pair.clock.synchronise()
    begin_s = pair.clock.host_s
    products = [left @ left for left in lefts]
    slower_s = pair.clock.done_s(1) - begin_s
    assert pair.clock.done_s() - begin_s == pytest.approx(slower_s)
    assert pair.clock.done_s(0) - begin_s < slower_s  # the larger card
    del products


# -- the timeline


def test_merging_keeps_what_is_apart_and_the_highest_memory_of_a_moment() -> None:
    timeline = Timeline()
    timeline.span(0, 0, "aten.mm", Span(0.0, 1.0))
    timeline.span(0, 0, "aten.mm", Span(1.0, 2.0))
    timeline.span(0, 0, "aten.mm", Span(3.0, 4.0))
    timeline.span(0, 1, "copy to GPU", Span(0.0, 2.0), 7)
    for held_bytes in (5, 9, 4):
        timeline.memory(0, 1.0, held_bytes, 10)
    events = timeline.to_json()["traceEvents"]
    spans = [(e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert spans == [("aten.mm", 0, 2e6), ("aten.mm", 3e6, 1e6), ("copy to GPU", 0, 2e6)]
    (memory,) = (e["args"] for e in events if e["ph"] == "C")
    assert memory == {"allocated": 9, "cached": 1}


def test_a_rehearsal_leaves_a_timeline_that_agrees_with_it(tmp_path: Path) -> None:
    pipe, _ = untouched("flux")
    timeline = Timeline()
    options = PLACEMENTS["leaves, streamed"](pipe)
    rehearsal = rehearse(pipe, options, small_call("flux"), CARD, timeline=timeline)
    timeline.write(tmp_path / "timeline.json")
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    assert all(e["dur"] >= 0 for e in spans)
    calls = [e["name"] for e in spans if e["pid"] == 0]
    assert calls.count("vae.decode") == 1
    copied_bytes = sum(e["args"]["bytes"] for e in spans if e["name"] == "copy to GPU")
    counted_bytes = sum(p.copies.to_gpu_bytes for p in rehearsal.phases)
    assert copied_bytes == counted_bytes + rehearsal.placing.to_gpu_bytes
    peak_bytes = max(sum(e["args"].values()) for e in events if e["ph"] == "C")
    assert peak_bytes == rehearsal.reserved_bytes
    streams = {e["tid"] for e in spans if e["pid"] == 1 and e["name"] == "copy to GPU"}
    assert len(streams) > 2  # one of each component, beside the default one
    with pytest.raises(InvalidRequest, match="cannot be written"):
        timeline.write(tmp_path / "nowhere" / "timeline.json")


def test_the_time_of_the_phases_is_the_time_of_the_call() -> None:
    pipe, _ = untouched("stable_diffusion_xl")
    options = PLACEMENTS["model_offload"](pipe)
    rehearsal = rehearse(pipe, options, small_call("stable_diffusion_xl"), CARD)
    assert rehearsal.seconds == pytest.approx(sum(p.seconds for p in rehearsal.phases))
    for phase in rehearsal.phases:
        assert 0 < phase.last_call_s <= phase.seconds
