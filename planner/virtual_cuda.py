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

aten = torch.ops.aten

FLASH_MAX_HEAD_DIM = 256
"""Largest head dimension of torch's flash attention kernel, elements.

Source: ``check_head_dim_size_flash`` in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp,
torch 2.13.
"""
EFFICIENT_BIAS_ALIGNMENT_ELEMENTS = 8
"""The memory-efficient kernel copies a bias whose last dimension is not a multiple of this.

Source: ``pad_bias`` in aten/src/ATen/native/transformers/attention.cpp, torch 2.13 (alignment 8
on CUDA).
"""
FLASH_HEAD_DIM_ALIGNMENT_ELEMENTS = 8
"""Flash attention pads head dimensions to a multiple of this.

Source: ``pad_last_dim<8>`` in aten/src/ATen/native/transformers/attention.cpp, torch 2.13.
"""


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
    """What CUDA's attention allocates: flash where it can, else memory-efficient."""
    first = next(t for t in (query, key, value) if isinstance(t, VirtualTensor))
    capability = buffer_of(first).machine.compute_capability
    flash = (
        query.dtype in (torch.float16, torch.bfloat16)
        and attn_mask is None
        and query.shape[-1] <= FLASH_MAX_HEAD_DIM
        and query.shape[-1] == value.shape[-1]
        and capability >= (8, 0)
    )
    if enable_gqa and not flash and key.shape[-3] != query.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key = key.repeat_interleave(repeats, -3)
        value = value.repeat_interleave(repeats, -3)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, float("-inf")).to(query.dtype)
    if attn_mask is not None and attn_mask.shape[-1] % EFFICIENT_BIAS_ALIGNMENT_ELEMENTS:
        pad = -attn_mask.shape[-1] % EFFICIENT_BIAS_ALIGNMENT_ELEMENTS
        attn_mask = torch.nn.functional.pad(attn_mask, (0, pad))
    head_dim = value.shape[-1]
    if flash and head_dim % FLASH_HEAD_DIM_ALIGNMENT_ELEMENTS:
        pad = -head_dim % FLASH_HEAD_DIM_ALIGNMENT_ELEMENTS
        query, key, value = (torch.nn.functional.pad(t, (0, pad)) for t in (query, key, value))
    return _attend(query, key, value, attn_mask, flash)[..., :head_dim]


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    flash: bool,
) -> torch.Tensor:
    """Allocate what the kernel does: its result and, for flash, one fp32 number a row."""
    first = next(t for t in (query, key, value) if isinstance(t, VirtualTensor))
    machine = buffer_of(first).machine
    lead, rows = query.shape[:-2], query.shape[-2]
    batch, heads = (math.prod(lead[:-1]), lead[-1]) if query.dim() > 3 else (math.prod(lead), 1)
    columns = value.shape[-1]
    # Both kernels write (batch, rows, heads, columns) and return its transpose.
    stride = (rows * heads * columns, heads * columns, columns, 1)
    base = machine.empty((batch, rows, heads, columns), stride, query.dtype, query.device)
    keep = None
    if flash:
        stride = (heads * rows, rows, 1)
        keep = machine.empty((batch, heads, rows), stride, torch.float32, query.device)
    name = "flash" if flash else "efficient"
    _announce(getattr(aten, f"_scaled_dot_product_{name}_attention").default,
              (query, key, value, mask), base)  # fmt: skip
    del keep
    out = base.transpose(1, 2)
    size = (*query.shape[:-1], columns)
    return out if tuple(out.shape) == size else out.reshape(size)


def _announce(func: Any, args: Any, out: VirtualTensor) -> None:
    if out.is_cuda:
        buffer_of(out).machine.observer.launched(Launch(), func, args, {}, out)


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


class _Stream:
    """A stream or event that orders nothing: the recorder keeps operators in program order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cuda", 0)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc: Any) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True


def _replacements(machine: Any) -> list[tuple[Any, str, Any]]:
    """(owner, name, replacement) for everything that asks for or about a GPU."""
    major, minor = machine.compute_capability
    properties = types.SimpleNamespace(
        name="virtual",
        major=major,
        minor=minor,
        total_memory=machine.total_bytes,
        multi_processor_count=128,
        uuid="virtual",
    )
    cuda = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: machine.num_devices,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "virtual",
        "get_device_capability": lambda device=None: (major, minor),
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: (major, minor) >= (8, 0),
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "mem_get_info": lambda device=None: (machine.total_bytes, machine.total_bytes),
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "current_stream": lambda device=None: _Stream(),
        "default_stream": lambda device=None: _Stream(),
        "Stream": _Stream,
        "Event": _Stream,
        "stream": lambda stream: _Stream(),
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
    }
    table = [(torch.cuda, name, made) for name, made in cuda.items()]
    functional = torch.nn.functional
    sdpa, rms_norm = functional.scaled_dot_product_attention, functional.rms_norm

    def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(t, VirtualTensor) for t in (query, key, value)):
            return sdpa(query, key, value, *args, **kwargs)
        return _attention(query, key, value, *args, **kwargs)

    table += [
        (functional, "scaled_dot_product_attention", attention),
        (functional, "rms_norm", functools.partial(_rms_norm, rms_norm)),
        (torch, "Generator", _generator_class(torch.Generator)),
        (torch, "tensor", functools.partial(_new_tensor, machine, torch.tensor)),
        (torch, "as_tensor", functools.partial(_new_tensor, machine, torch.as_tensor)),
    ]
    return table


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
