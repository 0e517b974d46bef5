"""What is replaced in torch while a virtual machine is open, and put back when it closes.

Three kinds: questions about GPUs (``torch.cuda.*``), constructors that would initialise CUDA past
the dispatcher (``torch.tensor``, ``torch.Generator``), and two composites that choose their
kernel by the device they see (attention and RMS norm). In other threads the originals answer.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import types
from collections.abc import Iterator
from typing import Any

import torch

from pipefit.planner.virtual_tensors import Launch, VirtualTensor, buffer_of, plain
from pipefit.strategies import page_locked

aten = torch.ops.aten

FLASH_MAX_HEAD_DIM = 256
"""Largest head dimension of torch's flash attention kernel, elements.

Source: ``check_head_dim_size_flash`` in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp,
torch 2.13.
"""
CUDNN_MAX_HEAD_DIM = 128
"""Largest head dimension that cuDNN's attention takes with every version that torch 2.13 ships.

Source: ``check_cudnn_tensor_shapes`` in the same file.
"""
CUDNN_FIRST_MAJORS = (9, 10)
"""Compute capabilities, major number, on which torch tries cuDNN's attention before all others.

Source: ``check_prefer_cudnn_attention`` in the same file, with cuDNN from 9.15.1 on.
"""
HEAD_DIM_ALIGNMENT_ELEMENTS = 8
"""Flash attention pads head dimensions to a multiple of this; cuDNN wants one.

Source: ``pad_last_dim<8>`` in aten/src/ATen/native/transformers/attention.cpp, torch 2.13.
"""
EFFICIENT_BIAS_ALIGNMENT_ELEMENTS = 8
"""The memory-efficient kernel copies a bias of which a stride is not a multiple of this.

Source: ``aligned_tensor`` and ``pad_bias`` in the same file (alignment 8 on CUDA).
"""

_HALF = (torch.float16, torch.bfloat16)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What CUDA's scaled dot product attention allocates, with the kernel that torch would pick.

    Source: ``scaled_dot_product_attention`` in aten/src/ATen/native/transformers/attention.cpp,
    torch 2.13.
    """
    first = next(t for t in (query, key, value) if isinstance(t, VirtualTensor))
    machine = buffer_of(first).machine
    capability = machine.devices[first.device.index or 0].compute_capability
    mask = attn_mask
    backend = _chosen_backend(query, key, value, mask, is_causal, enable_gqa, capability)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.where(
            mask.logical_not(),
            float("-inf"),
            torch.zeros((), dtype=query.dtype, device=mask.device),
        )
    if backend == "math":
        return aten._scaled_dot_product_attention_math(
            query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    if backend == "efficient" and mask is not None:
        mask = _padded_bias(mask)
    head_dim = value.shape[-1]
    if backend == "flash" and head_dim % HEAD_DIM_ALIGNMENT_ELEMENTS:
        pad = -head_dim % HEAD_DIM_ALIGNMENT_ELEMENTS
        query, key, value = (torch.nn.functional.pad(t, (0, pad)) for t in (query, key, value))
    return _attend(query, key, value, mask, backend)[..., :head_dim]


def _chosen_backend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    enable_gqa: bool,
    capability: tuple[int, int],
) -> str:
    """Return the first kernel in torch's order that takes the call: inference, dense tensors.

    cuDNN leads on compute capability 9 and 10 only; elsewhere it comes after math, which takes
    everything. Kernels that the process has switched off (``sdpa_kernel``) are passed over.

    Source: ``select_sdp_backend``, ``can_use_*_attention`` and ``check_prefer_cudnn_attention`` in
    aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, torch 2.13. Of its fused kernels only
    cuDNN's takes a mask together with fewer key than query heads (huggingface/diffusers#14523).
    """
    tensors = (query, key, value)
    given = (*tensors, *(() if mask is None else (mask,)))
    is_fusable = (
        all(t.dim() == 4 and t.shape[0] == query.shape[0] and t.shape[-2] for t in tensors)
        and all(t.stride(-1) == 1 for t in given)
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == key.shape[-1]
    )
    if not is_fusable:
        return "math"
    d_qk, d_v = query.shape[-1], value.shape[-1]
    alignment = _alignment_elements(query.dtype, capability)
    has_equal_heads = query.shape[1] == key.shape[1] == value.shape[1]
    has_heads = has_equal_heads or (enable_gqa and query.shape[1] % key.shape[1] == 0)
    is_ampere = capability >= (8, 0)
    is_half = query.dtype == torch.float16 or (query.dtype == torch.bfloat16 and is_ampere)
    cuda = torch.backends.cuda
    takes = {
        "flash": cuda.flash_sdp_enabled()
        and (is_half and is_ampere and has_heads and mask is None)
        and d_qk == d_v <= FLASH_MAX_HEAD_DIM
        and not (is_causal and query.shape[-2] != key.shape[-2]),
        "efficient": cuda.mem_efficient_sdp_enabled()
        and (is_half or query.dtype == torch.float32)
        and has_equal_heads
        and d_qk % alignment == d_v % alignment == 0,
        "cudnn": cuda.cudnn_sdp_enabled()
        and (is_half and is_ampere and has_heads)
        and max(d_qk, d_v) <= CUDNN_MAX_HEAD_DIM
        and d_qk % HEAD_DIM_ALIGNMENT_ELEMENTS == d_v % HEAD_DIM_ALIGNMENT_ELEMENTS == 0
        and key.shape[-2] != 1,
        "math": cuda.math_sdp_enabled(),
    }
    order = ("flash", "efficient", "math", "cudnn")
    if capability[0] in CUDNN_FIRST_MAJORS:
        order = ("cudnn", "flash", "efficient", "math")
    return next((backend for backend in order if takes[backend]), "math")


def _alignment_elements(dtype: torch.dtype, capability: tuple[int, int]) -> int:
    """``minimum_gemm_alignment`` of sdp_utils.cpp: what a head dimension must be a multiple of."""
    if capability >= (8, 0):
        return 8 if dtype in _HALF else 4
    return 8 if dtype in _HALF and capability >= (7, 0) else 1


def _padded_bias(bias: torch.Tensor) -> torch.Tensor:
    strides = bias.stride()
    if strides[-1] == 1 and not any(s % EFFICIENT_BIAS_ALIGNMENT_ELEMENTS for s in strides[:-1]):
        return bias
    columns = bias.shape[-1]
    pad = EFFICIENT_BIAS_ALIGNMENT_ELEMENTS - columns % EFFICIENT_BIAS_ALIGNMENT_ELEMENTS
    return torch.nn.functional.pad(bias, (0, pad))[..., :columns]


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    """Allocate what the kernel does: its result and, for flash, one fp32 number a row.

    Flash and cuDNN lay the result out as the query, the memory-efficient kernel always as (batch,
    rows, heads, columns): a query that a ``cat`` made costs a copy before the next projection, or
    none. Source: ``mha_fwd`` in flash_attn/flash_api.cpp, ``run_cudnn_SDP_fprop`` in
    cudnn/MHA.cpp, ``_efficient_attention_forward`` in transformers/cuda/attention.cu, torch 2.13.
    Flash splits long keys for few queries: at most two waves of 64 fp32 rows for each
    multiprocessor, below 20 MiB, not counted (``set_params_splitkv``).
    """
    batch, heads, rows = query.shape[:-1]
    columns = value.shape[-1]
    if backend == "efficient" or columns != query.shape[-1]:
        shape = (batch, rows, heads, columns)
        out = query.new_empty(shape).transpose(1, 2)
    elif backend == "flash":
        out = torch.empty_like(query.transpose(1, 2)).transpose(1, 2)
    else:
        out = torch.empty_like(query)
    keep = None
    if backend == "flash":
        keep = query.new_empty((batch, heads, rows), dtype=torch.float32)
    _announce(getattr(aten, f"_scaled_dot_product_{backend}_attention").default,
              (query, key, value, mask), out)  # fmt: skip
    del keep
    return out


def _announce(func: Any, args: Any, out: VirtualTensor) -> None:
    observer = buffer_of(out).machine.observer
    tell = observer.launched if out.is_cuda else observer.computed_on_host
    tell(Launch(), func, args, {}, out)


def _rms_norm(
    original: Any, x: torch.Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None
) -> torch.Tensor:
    """CUDA's fused kernel: the result and a statistic a row; mixed dtypes fall back to parts."""
    if not isinstance(x, VirtualTensor) or (weight is not None and weight.dtype != x.dtype):
        return original(x, normalized_shape, weight, eps)
    machine = buffer_of(x).machine
    rows = x.numel() // max(1, math.prod(normalized_shape))
    x = x.contiguous()
    out = machine.empty(x.shape, x.stride(), x.dtype, x.device)
    keep = machine.empty((rows,), (1,), torch.float32, x.device)
    _announce(aten._fused_rms_norm.default, (x, list(normalized_shape), weight, eps), out)
    del keep
    return out


class Stream:
    """A stream of a virtual GPU: the allocator has pools for each, and the observer a clock."""

    def __init__(self, machine: Any, device: Any = None) -> None:
        self.machine = machine
        self.number = machine.num_streams
        """Below the number of GPUs: the default stream of that one."""
        machine.num_streams += 1
        index = machine.current_device if device is None else _index(machine, device)
        self.device = torch.device("cuda", index)
        self._before: list[tuple[int, Stream]] = []

    def __enter__(self) -> Stream:
        machine, index = self.machine, self.device.index
        self._before.append((machine.current_device, machine.streams[index]))
        machine.current_device, machine.streams[index] = index, self
        return self

    def __exit__(self, *exc: Any) -> None:
        machine = self.machine
        machine.current_device, machine.streams[self.device.index] = self._before.pop()

    def synchronize(self) -> None:
        self.machine.observer.waited(self)

    def wait_stream(self, stream: Any) -> None:
        self.machine.observer.ordered(self, self.machine.observer.marked(stream))

    def wait_event(self, event: Any) -> None:
        event.wait(self)

    def record_event(self, event: Any = None) -> Any:
        event = event or Event(self.machine)
        event.record(self)
        return event

    def query(self) -> bool:
        return self.machine.observer.has_done(self)


class Event:
    """A point in a stream, at the moment that the observer's clock says."""

    def __init__(self, machine: Any) -> None:
        self.machine = machine
        self.moment_s: float | None = None
        """None: not recorded yet, which nothing waits for."""

    def record(self, stream: Stream | None = None) -> None:
        self.moment_s = self.machine.observer.marked(stream or self.machine.stream)

    def wait(self, stream: Stream | None = None) -> None:
        if self.moment_s is not None:
            self.machine.observer.ordered(stream or self.machine.stream, self.moment_s)

    def synchronize(self) -> None:
        if self.moment_s is not None:
            self.machine.observer.reached(self.moment_s)

    def query(self) -> bool:
        return self.moment_s is None or self.moment_s <= self.machine.observer.now_s()

    def elapsed_time(self, other: Event) -> float:
        """Milliseconds between two recorded events."""
        if self.moment_s is None or other.moment_s is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return (other.moment_s - self.moment_s) * 1e3


def _index(machine: Any, device: Any) -> int:
    """Return the index of what torch takes for a GPU; None is the current one."""
    if device is None:
        return machine.current_device
    return machine.normalise(device).index


@contextlib.contextmanager
def _current(machine: Any, device: Any) -> Iterator[None]:
    """``torch.cuda.device``: *device* is the current one; a negative index changes nothing."""
    before = machine.current_device
    if not (isinstance(device, int) and device < 0):
        machine.current_device = _index(machine, device)
    try:
        yield
    finally:
        machine.current_device = before


def _made_by(machine: Any, kind: Any) -> type:
    """Return *kind* as torch's class of that name: whatever it is called with, on *machine*."""

    class Made(kind):  # type: ignore[misc]  # annotations of libraries need a class
        def __init__(self, device: Any = None, *args: Any, **kwargs: Any) -> None:
            if kind is Stream:
                super().__init__(machine, device)
            else:
                super().__init__(machine)

    return Made


def _count(machine: Any, name: str) -> Any:
    """Return what answers for one counter of the allocator; 0 where nothing is counted."""

    def answer(device: Any = None) -> int:
        allocator = machine.observer.allocator_of(_index(machine, device))
        return 0 if allocator is None else getattr(allocator, name)

    return answer


def _reset_peak(machine: Any, device: Any = None) -> None:
    allocator = machine.observer.allocator_of(_index(machine, device))
    if allocator is not None:
        allocator.reset_peak()


def _free_and_total(machine: Any, device: Any = None) -> tuple[int, int]:
    index = _index(machine, device)
    total_bytes = free_bytes = machine.devices[index].total_bytes
    allocator = machine.observer.allocator_of(index)
    if allocator is not None:
        held = allocator.capacity_bytes
        free_bytes = (total_bytes if held is None else held) - allocator.reserved_bytes
    return free_bytes, total_bytes


def _replacements(machine: Any) -> list[tuple[Any, str, Any]]:
    """(owner, name, replacement) for everything that asks for or about a GPU."""

    def capability(device: Any = None) -> tuple[int, int]:
        return machine.devices[_index(machine, device)].compute_capability

    def properties(device: Any = None) -> Any:
        index = _index(machine, device)
        major, minor = capability(index)
        return types.SimpleNamespace(
            name="virtual",
            major=major,
            minor=minor,
            total_memory=machine.devices[index].total_bytes,
            multi_processor_count=128,
            uuid=f"virtual-{index}",
        )

    def set_device(device: Any) -> None:
        machine.current_device = _index(machine, device)

    cuda = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: len(machine.devices),
        "current_device": lambda: machine.current_device,
        "set_device": set_device,
        "device": functools.partial(_current, machine),
        "get_device_name": lambda device=None: "virtual",
        "get_device_capability": capability,
        "get_device_properties": properties,
        "is_bf16_supported": lambda including_emulation=True: capability() >= (8, 0),
        "synchronize": lambda device=None: machine.observer.waited(None),
        "empty_cache": lambda: machine.observer.emptied_cache(),
        "ipc_collect": lambda: None,
        "mem_get_info": functools.partial(_free_and_total, machine),
        "memory_allocated": _count(machine, "allocated_bytes"),
        "memory_reserved": _count(machine, "reserved_bytes"),
        "max_memory_allocated": _count(machine, "peak_allocated_bytes"),
        "max_memory_reserved": _count(machine, "peak_reserved_bytes"),
        "reset_peak_memory_stats": functools.partial(_reset_peak, machine),
        "current_stream": lambda device=None: machine.streams[_index(machine, device)],
        "default_stream": lambda device=None: machine.default_streams[_index(machine, device)],
        "Stream": _made_by(machine, Stream),
        "Event": _made_by(machine, Event),
        "stream": lambda stream: contextlib.nullcontext() if stream is None else stream,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device="cuda": torch.empty(0, dtype=torch.uint8),
        "set_rng_state": lambda state, device="cuda": None,
    }
    table = [(torch.cuda, name, made) for name, made in cuda.items()]
    functional = torch.nn.functional
    sdpa, rms_norm = functional.scaled_dot_product_attention, functional.rms_norm

    def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(t, VirtualTensor) for t in (query, key, value)):
            return sdpa(query, key, value, *args, **kwargs)
        return _attention(query, key, value, *args, **kwargs)

    to = torch.Tensor.to

    def move(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        # C++ completes a device without an index, and asks for that a CUDA that is not there.
        named = {k: _complete(machine, v) for k, v in kwargs.items()}
        return to(tensor, *(_complete(machine, a) for a in args), **named)

    def to_gpu(tensor: Any, device: Any = None, **kwargs: Any) -> Any:
        return move(tensor, "cuda" if device is None else device, **kwargs)

    table += [
        (torch.Tensor, "to", move),
        (torch.Tensor, "cuda", to_gpu),
        (functional, "scaled_dot_product_attention", attention),
        (functional, "rms_norm", functools.partial(_rms_norm, rms_norm)),
        (torch, "Generator", _generator_class(torch.Generator)),
        (torch, "tensor", functools.partial(_new_tensor, machine, torch.tensor)),
        (torch, "as_tensor", functools.partial(_new_tensor, machine, torch.as_tensor)),
        (page_locked, "page_lock", functools.partial(_page_lock, page_locked.page_lock)),
        *machine.disk.replacements(),
    ]
    return table


def _page_lock(original: Any, tensor: Any, device: Any) -> Any:
    """The driver registers any memory; there is no address here to ask it for."""
    if not isinstance(tensor, VirtualTensor):
        return original(tensor, device)
    buffer = buffer_of(tensor)
    buffer.machine.observer.page_locked(buffer)
    buffer.is_pinned = buffer.is_written = True

    def unlock() -> None:
        buffer.is_pinned = False
        buffer.machine.observer.page_unlocked(buffer)

    return unlock


def _complete(machine: Any, argument: Any) -> Any:
    """Return an argument of ``Tensor.to`` with its index, if it is a device."""
    return machine.normalise(argument) if isinstance(argument, (str, torch.device)) else argument


def _generator_class(original: Any) -> Any:
    """A generator for a virtual GPU draws on the CPU; what it draws has no values anyway."""

    class Generator(original):  # type: ignore[misc,valid-type]
        def __new__(cls, device: Any = "cpu") -> Any:
            return original.__new__(cls, "cpu")

    return Generator


def _new_tensor(machine: Any, original: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
    """``torch.tensor``: C++ would read virtual elements and initialise CUDA past the dispatcher."""
    device = machine.normalise(kwargs.pop("device", None))
    if isinstance(data, VirtualTensor):
        return data.to(device=device or data.device, dtype=kwargs.get("dtype") or data.dtype)
    made = original(plain(data), *args, **kwargs)
    return made if device is None or device.type == "cpu" else made.to(device)


@contextlib.contextmanager
def replaced(machine: Any) -> Iterator[None]:
    """Put the replacements in place for this thread; others get the originals."""
    thread = threading.get_ident()
    saved: list[tuple[Any, str, Any]] = []

    def here(made: Any, original: Any) -> Any:
        if isinstance(made, type) or not callable(original):
            return made

        @functools.wraps(original)
        def choose(*args: Any, **kwargs: Any) -> Any:
            return (made if threading.get_ident() == thread else original)(*args, **kwargs)

        return choose

    try:
        for owner, name, made in _replacements(machine):
            original = getattr(owner, name)
            saved.append((owner, name, original))
            setattr(owner, name, here(made, original))
        yield
    finally:
        for owner, name, original in reversed(saved):
            setattr(owner, name, original)
