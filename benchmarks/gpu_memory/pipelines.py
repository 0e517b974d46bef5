"""A catalogue pipeline at full size under a set of options: what it needs, and what it was to need.

Weights are made, not loaded. Resident ones are drawn on the GPU itself; those that start in host
memory are zeros whose pages nobody has touched, so that thirty gigabytes of them take no time and
no RAM until they are copied back. Peaks do not depend on values; host RAM does, so it is not
measured here, apart from what is pinned.
"""

from __future__ import annotations

import gc
import math
import mmap
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.gpu_memory.counters import Counter
from benchmarks.gpu_memory.phases import PhaseMeter
from pipefit.cost_models.context import context_bytes
from pipefit.cost_models.machine import Gpu, Machine
from pipefit.cost_models.memory import SLACK_SHARE
from pipefit.cost_models.workload import Component
from pipefit.planner.api import predict
from pipefit.planner.apply import apply_options
from pipefit.planner.host import read_host
from pipefit.strategies import strategy, traits_of
from pipefit.strategies.channels_last import LEAST_CONV_SHARE
from pipefit.strategies.describe import describe_component
from pipefit.strategies.live import module_components
from pipefit.strategies.strategy import Option

WEIGHT_DEVIATION = 0.02
"""Standard deviation of random weights: ``initializer_range`` of most of transformers'
configurations, small enough that activations in float16 stay finite."""

LARGE_TILE_PX, SMALL_TILE_PX = 512, 256
"""Tiles of the tiling configuration, from ``TILE_PX`` in strategies/vae_tiling.py; the small one
where the picture is no larger than the other."""

GROUPS: Mapping[str, Mapping[str, Any]] = {
    "leaf": {"offload_type": "leaf_level"},
    "leaf-stream": {"offload_type": "leaf_level", "use_stream": True},
    "leaf-record-stream": {
        "offload_type": "leaf_level",
        "use_stream": True,
        "record_stream": True,
    },
    "block": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "block-stream": {"offload_type": "block_level", "num_blocks_per_group": 1, "use_stream": True},
    "block-record-stream": {
        "offload_type": "block_level",
        "num_blocks_per_group": 1,
        "use_stream": True,
        "record_stream": True,
    },
}
"""Parameters of group offloading by configuration."""

COMPILE_MODES = {"compile-default": "default", "compile-max-autotune": "max-autotune"}
"""torch.compile's mode by configuration."""

# -- options


def options_of(configuration: str, pipe: Any, picture_px: int) -> list[Option]:
    """Return what *configuration* means for the components of *pipe*.

    Group offloading goes where it can; where streams or blocks are refused, plain leaves do, and
    what refuses these as well stays resident.
    """
    if configuration == "model-offload":
        return [Option(strategy="model_offload")]
    described = [
        describe_component(name, module, traits_of(module))
        for name, module in module_components(pipe).items()
    ]
    if configuration in GROUPS:
        return [_grouped(component, GROUPS[configuration]) for component in described]
    options = [Option(strategy="resident", component=component.name) for component in described]
    for component in described:
        if configuration == "tiling":
            tile_px = LARGE_TILE_PX if picture_px > LARGE_TILE_PX else SMALL_TILE_PX
            options += _first_possible("vae_tiling", component, ({"tile_px": tile_px}, {}))
        has_convolutions = component.traits["conv2d_share"] >= LEAST_CONV_SHARE
        if configuration == "channels-last" and has_convolutions:
            options += _first_possible("channels_last", component, ({},))
        if configuration in COMPILE_MODES and component.library == "diffusers":
            parameters = {"scope": "component", "mode": COMPILE_MODES[configuration]}
            options += _first_possible("compile", component, (parameters,))
    return options


def _grouped(component: Component, parameters: Mapping[str, Any]) -> Option:
    blocks = component.traits.get("block_modules")
    if blocks and parameters["offload_type"] == "block_level":
        parameters = {**parameters, "block_modules": tuple(blocks)}
    plain = {k: v for k, v in parameters.items() if k not in ("use_stream", "record_stream")}
    choices = (parameters, plain, GROUPS["leaf"])
    found = _first_possible("group_offload", component, choices)
    return found[0] if found else Option(strategy="resident", component=component.name)


def _first_possible(
    name: str, component: Component, choices: tuple[Mapping[str, Any], ...]
) -> list[Option]:
    for parameters in choices:
        if strategy(name).refusal(component, parameters) is None:
            return [Option(strategy=name, component=component.name, parameters=parameters)]
    return []


# -- weights


def give_weights(
    pipe: Any, device: torch.device | None, *, drawn_on: torch.device | None = None
) -> None:
    """Give every tensor of *pipe* that is on the meta device data, on *device*; None: on the host.

    There they are zeros, or random where *drawn_on* says on which device they are drawn first. In
    the order in which ``module.to(device)`` walks a module, so that the allocator sees what a
    load and a move would show it; tied tensors stay tied.
    """
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def real(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta and device in (None, tensor.device):
            return tensor
        if id(tensor) not in made:
            if not tensor.is_meta:
                data = tensor.data.to(device)
            elif device is None and drawn_on is not None:
                data = _data(tensor, drawn_on).to("cpu")
            else:
                data = _data(tensor, device)
            if isinstance(tensor, torch.nn.Parameter):
                data = torch.nn.Parameter(data, requires_grad=False)
            made[id(tensor)] = tensor, data  # the original is kept, or its id would be given away
        return made[id(tensor)][1]

    for component in module_components(pipe).values():
        for slots, key in _slots_as_moved(component):
            slots[key] = real(slots[key])
        for part in component.modules():
            for name, value in part.__dict__.items():
                if isinstance(value, torch.Tensor) and value.is_meta:
                    part.__dict__[name] = _zeros(value)  # a plain attribute does not move


def _slots_as_moved(module: torch.nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (dictionary, key) of each tensor, children first, as ``Module._apply`` does."""
    for child in module.children():
        yield from _slots_as_moved(child)
    for slots in (module._parameters, module._buffers):
        for key, tensor in slots.items():
            if tensor is not None:
                yield slots, key


def _data(tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    if device is None:
        return _zeros(tensor)
    data = torch.empty_like(tensor, device=device, requires_grad=False)
    return data.normal_(std=WEIGHT_DEVIATION) if data.is_floating_point() else data.zero_()


def _zeros(tensor: torch.Tensor) -> torch.Tensor:
    """Return zeros on the host in pages of their own, which take no RAM until they are written."""
    num_bytes = tensor.numel() * tensor.element_size()
    if not num_bytes:
        return torch.zeros_like(tensor, device="cpu")
    # Not calloc, which clears what it takes from memory that was freed before.
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    flat = torch.frombuffer(pages, dtype=tensor.dtype)
    return flat.as_strided(tensor.size(), tensor.stride())


# -- what is measured


def measure_pipeline(
    pipe: Any,
    arguments: Mapping[str, Any],
    options: list[Option],
    counter: Counter,
    *,
    cards: Mapping[str, int],
    until_s: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Run *pipe* under *options*: freely, then held to the bounds of *cards* that matter.

    A bound at or above what the free call reserved changes nothing, and one below what it had
    allocated cannot be met; only the bounds between are tried, and the smallest that changes
    nothing, whose call is then a second one: streamed components know their order only from then
    on. *cards* are names with bytes that may be reserved. No further call begins where it would
    not end before *until_s* on *clock*. What is compiled becomes so in the free call, whose peak
    may be that of compiling; a call after it is kept apart, and no bound is tried.

    Raises:
        torch.OutOfMemoryError, ApplyFailed: if the weights do not fit.
    """
    modules = module_components(pipe)
    offloads = any(option.strategy in ("model_offload", "group_offload") for option in options)
    counter.release()
    give_weights(pipe, None if offloads else counter.device)
    pipe.set_progress_bar_config(disable=True)
    given = {
        k: v.to(counter.device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()
    }
    found: dict[str, Any] = {"process_source": counter.process_source, "calls": [], "cards": {}}

    def call(card: str | None) -> dict[str, Any]:
        limit_bytes = None if card is None else cards[card]
        one: dict[str, Any] = {"card": card, "limit_bytes": limit_bytes, "outcome": "measured"}
        meter = PhaseMeter(modules, counter)
        start_s = clock()
        try:
            with counter.held_to(limit_bytes), meter.watching():
                pipe(**given)
        except Exception as error:  # what was measured until then is kept
            traceback.print_exc()
            outcome = "out of memory" if is_out_of_memory(error) else "error"
            one |= {"outcome": outcome, "error": in_words(error)}
        one |= {"took_s": clock() - start_s, "phases": [asdict(p) for p in meter.phases]}
        found["calls"].append(one)
        return one

    # Not undone at the end: the process ends instead, and undoing would bring weights back.
    apply_options(pipe, options, counter.device)
    gc.collect()
    found["loaded"] = counter.read()._asdict()
    found["pinned_bytes"] = _pinned_bytes(counter)
    free = call(None)
    if free["outcome"] != "measured":
        return found
    is_compiled = any(option.strategy == "compile" for option in options)
    if is_compiled and clock() + free["took_s"] <= until_s:
        found["compiled"] = call(None)
        found["calls"].pop()
    allocated_bytes = max(phase["allocated_bytes"] for phase in free["phases"])
    reserved_bytes = max(phase["reserved_bytes"] for phase in free["phases"])
    descending = sorted(cards, key=lambda card: -cards[card])
    trivial = [card for card in descending if cards[card] >= reserved_bytes]
    for card in descending:
        if cards[card] < allocated_bytes:
            found["cards"][card] = _verdict(False, "more than it was allocated by a free call")
        elif card in trivial[:-1]:
            found["cards"][card] = _verdict(True, "a free call reserves less")
        elif is_compiled:
            found["cards"][card] = _verdict(None, "what is compiled does not compile again")
        elif clock() + free["took_s"] > until_s:
            found["cards"][card] = _verdict(None, "no time was left to try")
        elif any(verdict["fits"] is False for verdict in found["cards"].values()):
            found["cards"][card] = _verdict(False, "a larger one did not do")
        else:
            fits = call(card)["outcome"] == "measured"
            found["cards"][card] = _verdict(fits, "tried")
    return found


def _verdict(fits: bool | None, how: str) -> dict[str, Any]:
    return {"fits": fits, "how": how}


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether *error*, or what it was raised from, is torch's out-of-memory error."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__
    return error is not None


def in_words(error: BaseException) -> str:
    """Return an error in one line."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _pinned_bytes(counter: Counter) -> int:
    if counter.device.type != "cuda":
        return 0
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0))


# -- what is predicted


def predict_pipeline(
    subject: Any,
    call: Mapping[str, Any],
    options: list[Option],
    gpu: Gpu,
    *,
    cards: Mapping[str, int],
) -> dict[str, Any]:
    """Return what pipefit says of the same: a free call on *gpu*, and one under each bound."""

    def ask(on: Gpu) -> Any:
        machine = Machine(gpus=(on,), host=read_host())
        return predict(subject, options, call=call, machine=machine)

    free = ask(gpu)
    names = (
        "name", "component", "entry", "calls", "allocated_bytes", "reserved_bytes",
        "process_bytes", "weights_bytes", "activation_bytes", "workspace_bytes", "carried_bytes",
    )  # fmt: skip
    found: dict[str, Any] = {
        "phases": [{name: getattr(phase, name) for name in names} for phase in free.phases],
        "context_bytes": free.peak_vram[0].context_bytes,
        "pinned_bytes": free.pinned_bytes,
        "call_s": free.latency.call_s,
        "first_call_s": free.latency.first_call_s,
        "cards": {},
    }
    reserved_bytes = free.peak_vram[0].reserved_bytes
    for card, limit_bytes in cards.items():
        held = free if limit_bytes >= reserved_bytes else ask(_held_to(gpu, limit_bytes))
        peak_bytes = held.peak_vram[0].reserved_bytes
        found["cards"][card] = {"fits": peak_bytes <= limit_bytes, "reserved_bytes": peak_bytes}
    return found


def _held_to(gpu: Gpu, reserved_bytes: int) -> Gpu:
    """Return *gpu* with so little memory that the replay starts to give back at *reserved_bytes*.

    The replay keeps context and slack free of its GPU's total (``simulate`` in
    cost_models/memory.py); an allocator that is bound directly keeps nothing free.
    """
    total_bytes = math.ceil(reserved_bytes * (1 + SLACK_SHARE)) + context_bytes(gpu)
    return replace(gpu, total_bytes=total_bytes, free_bytes=total_bytes, other_bytes=0)
