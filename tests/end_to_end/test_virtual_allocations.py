"""What real modules allocate on the CPU, byte for byte and in order, the virtual GPU allocates too.

Where CUDA differs by design, attention and RMS norm, both sides get the same stand-in, which only
makes the result; those two are held to torch's CUDA source in tests/planner/test_virtual.py and to
measurements in tests/benchmarks. Host tensors that a module makes for itself are on the GPU's side
counted when they get there.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.end_to_end.small_runs import untouched
from tests.small_pipelines import small_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pipefit.planner.recorder import intercepting
from pipefit.planner.signatures import GPU
from pipefit.planner.trace import weightless
from pipefit.planner.virtual import Buffer, Observer, VirtualMachine
from pipefit.strategies.live import module_components

Event = tuple[str, int]
"""``("+", bytes)`` for an allocation, ``("-", bytes)`` for a free."""

COMPONENTS = [
    ("stable_diffusion_xl", "unet", "forward"),
    ("stable_diffusion_xl", "vae", "decode"),
    ("stable_diffusion_xl", "text_encoder_2", "forward"),
    ("stable_diffusion_xl_img2img", "vae", "encode"),
    ("stable_diffusion_xl_controlnet", "controlnet", "forward"),
    ("stable_diffusion_3", "transformer", "forward"),
    ("flux", "transformer", "forward"),
    ("flux", "text_encoder", "forward"),
    ("flux", "text_encoder_2", "forward"),
    ("cogvideox", "transformer", "forward"),
    ("cogvideox", "vae", "decode"),
    ("wan", "transformer", "forward"),
    ("wan", "vae", "decode"),
]


class Real(TorchDispatchMode):
    """Notes every storage that an operator makes, and its end."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._seen = {one.untyped_storage()._cdata for one in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.events.append(("+", storage.nbytes()))
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return made

    def _freed(self, key: int, num_bytes: int) -> None:
        self._seen.discard(key)
        self.events.append(("-", num_bytes))


class Virtual(Observer):
    """Notes the same of a virtual GPU."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def allocated(self, buffer: Buffer) -> None:
        self.events.append(("+", buffer.num_bytes))

    def freed(self, buffer: Buffer) -> None:
        self.events.append(("-", buffer.num_bytes))


def _attended(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    return torch.zeros_like(query)


def _normed(x: Any, shape: Any, weight: Any = None, eps: Any = None) -> Any:
    return torch.zeros_like(x)


@contextmanager
def alike() -> Iterator[None]:
    """Put the stand-ins in place of what CUDA does in its own way."""
    functional = torch.nn.functional
    stand_ins = {"scaled_dot_product_attention": _attended, "rms_norm": _normed}
    before = {name: getattr(functional, name) for name in stand_ins}
    for name, made in stand_ins.items():
        setattr(functional, name, made)
    try:
        yield
    finally:
        for name, made in before.items():
            setattr(functional, name, made)


@functools.cache
def inputs(name: str) -> dict[tuple[str, str], tuple[Any, Any]]:
    """Return what a real call gives each component the first time."""
    pipe, _ = untouched(name)
    names = {id(module): component for component, module in module_components(pipe).items()}
    found: dict[tuple[str, str], tuple[Any, Any]] = {}

    def call(module: Any, entry: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if id(module) in names:
            found.setdefault((names[id(module)], entry), (args, kwargs))
        return function(*args, **kwargs)

    with intercepting(module_components(pipe).values(), call):
        pipe(**small_call(name))
    return found


def run(module: Any, entry: str, args: Any, kwargs: Any) -> Any:
    method = module if entry == "forward" else getattr(module, entry)
    return method(*args, **kwargs)


def real_events(name: str, component: str, entry: str) -> list[Event]:
    args, kwargs = inputs(name)[component, entry]
    module = getattr(untouched(name)[0], component)
    given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    known = [*given, *module.parameters(), *module.buffers()]
    with torch.no_grad(), alike(), Real(known) as real:
        run(module, entry, args, kwargs)
    return list(real.events)


def virtual_events(name: str, component: str, entry: str) -> list[Event]:
    args, kwargs = inputs(name)[component, entry]
    virtual = Virtual()
    machine = VirtualMachine(virtual)
    with machine, torch.no_grad():
        twin = weightless(untouched(name)[0], machine)  # kept: its end would be noted as well
        module = getattr(twin, component)
        moved = tree_map(lambda x: x.to(GPU) if isinstance(x, torch.Tensor) else x, (args, kwargs))
        virtual.events.clear()
        with alike():
            run(module, entry, *moved)
        events = list(virtual.events)
        del twin
        return events


def peak_bytes(events: list[Event]) -> int:
    live = peak = 0
    for sign, num_bytes in events:
        live += num_bytes if sign == "+" else -num_bytes
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(("name", "component", "entry"), COMPONENTS)
def test_the_same_is_allocated_in_the_same_order(name: str, component: str, entry: str) -> None:
    real = real_events(name, component, entry)
    virtual = virtual_events(name, component, entry)
    assert peak_bytes(virtual) == peak_bytes(real) > 0
    assert [e for e in virtual if e[0] == "+"] == [e for e in real if e[0] == "+"]
    assert virtual == real


def test_an_allocation_more_is_seen() -> None:
    module, given = torch.nn.Linear(8, 8), torch.zeros(4, 8)
    with torch.no_grad(), Real([given, *module.parameters()]) as real:
        module(given)
    with torch.no_grad(), Real([given, *module.parameters()]) as more:
        module(given) + 1
    assert real.events == [("+", 128), ("-", 128)]
    assert peak_bytes(more.events) == 2 * peak_bytes(real.events)
