"""The process and the machine: context, transfers, and the allocator's own answers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.gpu_memory.cases import EXPANDABLE
from benchmarks.gpu_memory.counters import Counter, Event
from benchmarks.gpu_memory.pipelines import give_weights
from pipefit.cost_models.allocator import CachingAllocator
from pipefit.cost_models.context import bare_context_bytes, context_bytes
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.transfers import link_rates
from pipefit.cost_models.units import GIB, MIB
from pipefit.errors import InvalidRequest
from pipefit.planner.build import build_pipeline

# -- context


def measure_context(counter: Counter) -> dict[str, Any]:
    """Return what the process holds outside the allocator as libraries come in, one by one.

    The context after a whole call is in the rows of pipelines.
    """
    device = counter.device
    stages = []

    def note(stage: str) -> None:
        reserved_bytes, process_bytes = counter.read().reserved, counter.process_bytes()
        stages.append(
            {
                "stage": stage,
                "process_bytes": process_bytes,
                "reserved_bytes": reserved_bytes,
                "context_bytes": process_bytes - reserved_bytes,
            }
        )

    note("CUDA started")
    x = torch.ones(1024, 1024, device=device)
    note("first tensor")
    half = (x + x).bfloat16()
    note("first kernels")
    _ = half @ half
    note("cuBLAS, bfloat16")
    _ = x @ x
    note("cuBLAS, float32")
    picture = half.view(1, 16, 256, 256)
    weight = half[:16, : 16 * 9].reshape(16, 16, 3, 3)
    _ = torch.nn.functional.conv2d(picture, weight, padding=1)
    note("cuDNN, conv2d")
    video = half.view(1, 16, 4, 128, 128)
    _ = torch.nn.functional.conv3d(video, half[:16, : 16 * 27].reshape(16, 16, 3, 3, 3), padding=1)
    note("cuDNN, conv3d")
    tokens = half.view(1, 8, 2048, 64)
    _ = torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
    note("attention")
    return {"stages": stages, "process_source": counter.process_source}


def predict_context(gpu: Gpu) -> dict[str, Any]:
    """Return what is predicted before the first kernel, and after a whole call."""
    return {"bare_bytes": bare_context_bytes(gpu), "context_bytes": context_bytes(gpu)}


# -- transfers

COPY_BYTES = (1 * MIB, 16 * MIB, 256 * MIB, 1 * GIB)
"""From a layer's weights to what one large copy reaches."""

COPY_REPEATS = 5

PINNED_BYTES = (3 * MIB, 5 * MIB + 1, 64 * MIB, 100 * MIB, 129 * MIB)
"""Requests that a power of two fits exactly, barely and not at all; ascending, so that none finds
the cached block of an earlier one large enough."""


def measure_transfers(counter: Counter) -> dict[str, Any]:
    """Return copy rates by size, kind of host memory and direction, and what pinning really takes.

    Raises:
        InvalidRequest: on a CPU.
    """
    device = counter.device
    if device.type != "cuda":
        raise InvalidRequest("Transfers to a GPU need one: run this where `nvidia-smi` lists it.")
    pinning = [_pin(num_bytes) for num_bytes in PINNED_BYTES]
    rates = []
    for num_bytes in COPY_BYTES:
        there = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        for kind in ("pinned", "pageable"):
            here = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=kind == "pinned")
            for direction, target, source in (("h2d", there, here), ("d2h", here, there)):
                seconds = copy_seconds(lambda t=target, s=source: t.copy_(s))
                rates.append(
                    {
                        "kind": kind,
                        "direction": direction,
                        "num_bytes": num_bytes,
                        "bytes_per_s": num_bytes / seconds,
                    }
                )
            del here
        seconds = copy_seconds(there.cpu)
        fresh = {"kind": "fresh pages", "direction": "d2h", "num_bytes": num_bytes}
        rates.append({**fresh, "bytes_per_s": num_bytes / seconds})
        del there
    return {"rates": rates, "pinning": pinning}


def copy_seconds(copy: Any, synchronize: Any = torch.cuda.synchronize) -> float:
    """Return the median time of *copy*, the first one left out."""
    times = []
    for _ in range(COPY_REPEATS + 1):
        synchronize()
        start_s = time.perf_counter()
        copy()
        synchronize()
        times.append(time.perf_counter() - start_s)
    return statistics.median(times[1:])


def _pin(num_bytes: int) -> dict[str, Any]:
    before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    start_s = time.perf_counter()
    pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    took_s = time.perf_counter() - start_s
    taken_bytes = torch.cuda.host_memory_stats()["allocated_bytes.current"] - before
    del pinned
    return {"asked_bytes": num_bytes, "taken_bytes": taken_bytes, "took_s": took_s}


def predict_transfers(gpu: Gpu) -> dict[str, Any]:
    """Return the rates that predictions of time use."""
    rates = link_rates(gpu)
    return {
        name: getattr(rates, name)
        for name in (
            "h2d_pinned_bytes_per_s",
            "h2d_pageable_bytes_per_s",
            "d2h_pageable_bytes_per_s",
        )
    }


# -- the allocator


def measure_allocator(parameters: Mapping[str, Any], counter: Counter) -> dict[str, Any]:
    """Decode with every allocation written down; the counters are torch's own."""
    pipe, _ = build_pipeline(parameters["pipeline"])
    vae = pipe.vae
    counter.release()
    counter.reset_peak()
    with counter.history() as events, torch.no_grad():
        give_weights(SimpleNamespace(components={"vae": vae}), counter.device)
        latents = torch.zeros(parameters["latents"], dtype=vae.dtype, device=counter.device)
        picture = vae.decode(latents, return_dict=False)[0]
        reading = counter.read()
        del picture, latents
    return {**reading._asdict(), "events": events}


def predict_allocator(parameters: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """Replay what was written down through pipefit's model of the allocator."""
    replayed = replay(measured["events"], is_expandable=parameters["conf"] == EXPANDABLE)
    return {
        "peak_allocated": replayed.peak_allocated_bytes,
        "peak_reserved": replayed.peak_reserved_bytes,
        "peak_requested": replayed.peak_requested_bytes,
    }


def replay(events: Sequence[Event], *, is_expandable: bool = False) -> CachingAllocator:
    """Return the model of the allocator after *events*."""
    allocator = CachingAllocator(expandable=is_expandable)
    blocks = {}
    for action, number, num_bytes, stream in events:
        if action == "a":
            blocks[number] = allocator.allocate(num_bytes, stream)
        else:
            allocator.free(blocks.pop(number))
    return allocator
