"""Functions of diffusers that are replaced while a call is traced, because they loop over values.

Each does what the original does, with the same allocations, in fewer or other operators. They are
named by module and attribute; tests/planner/test_shims.py holds them to the pinned diffusers.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from pipefit.strategies.live import attention_registry

MADE_FOR_DIFFUSERS = "0.42.1"


def _causal_attention_mask(
    n_frame: int, n_hw: int, dtype: torch.dtype, device: Any, batch_size: int | None = None
) -> torch.Tensor:
    """HunyuanVideo 1.5's mask, a frame at a time.

    The original writes row by row: 49,290 launches for 121 frames of 480p. The bytes written are
    the same; the time to launch them, a quarter of a second on a fast host, is not counted.
    """
    length = n_frame * n_hw
    mask = torch.full((length, length), float("-inf"), dtype=dtype, device=device)
    for frame in range(1, n_frame + 1):
        mask[(frame - 1) * n_hw : frame * n_hw, : frame * n_hw] = 0
    return mask if batch_size is None else mask.unsqueeze(0).expand(batch_size, -1, -1)


def _set_timesteps_on_cpu(original: Callable[..., None]) -> Callable[..., None]:
    """Stable Video Diffusion's scheduler builds a tensor with ``torch.Tensor([t, ...])`` of scalars
    that lie on the GPU; this C++ constructor goes past the dispatcher. The values are known."""

    @functools.wraps(original)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.config.timestep_type != "continuous":
            return original(self, *args, **kwargs)
        device = kwargs.pop("device", None)
        if len(args) > 1:
            device, args = args[1], (args[0], *args[2:])
        original(self, *args, **kwargs)
        self.timesteps = self.timesteps.to(device)
        return None

    return set_timesteps


SHIMS: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
    (
        "diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15",
        "HunyuanVideo15AttnBlock.prepare_causal_attention_mask",
        lambda original: staticmethod(_causal_attention_mask),
    ),
    (
        "diffusers.schedulers.scheduling_euler_discrete",
        "EulerDiscreteScheduler.set_timesteps",
        _set_timesteps_on_cpu,
    ),
)
"""(module, attribute in it, what makes the replacement from the original)."""


class _Backends(dict[Any, Callable[..., Any]]):
    """diffusers' attention functions, those of packages replaced by torch's own in one thread.

    Their kernels want real tensors on a real GPU. What they allocate that torch's does not is left
    out: SageAttention's 8-bit copies.
    """

    def __init__(self, originals: dict[Any, Callable[..., Any]]) -> None:
        super().__init__(originals)
        self._thread = threading.get_ident()

    def get(self, name: Any, default: Any = None) -> Any:
        if name is not None and threading.get_ident() == self._thread:
            value = str(getattr(name, "value", name))
            if not value.startswith(("native", "_native", "flex")):
                return functools.partial(_native_attention, self["native"])
        return super().get(name, default)


def _native_attention(native: Callable[..., Any], **arguments: Any) -> Any:
    taken = inspect.signature(native).parameters
    return native(**{name: value for name, value in arguments.items() if name in taken})


def _memory_efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | None = None,
    op: Any = None,
    scale: float | None = None,
) -> torch.Tensor:
    """``xformers.ops.memory_efficient_attention`` as diffusers calls it: heads in the batch."""
    bias = None if attn_bias is None else attn_bias[:, None]
    return torch.nn.functional.scaled_dot_product_attention(
        query[:, None], key[:, None], value[:, None], attn_mask=bias, scale=scale
    )[:, 0]


class _Xformers:
    """What diffusers' processors use of the package, in one thread; elsewhere the package."""

    def __init__(self, original: Any) -> None:
        self._original, self._thread = original, threading.get_ident()

    @property
    def ops(self) -> Any:
        if threading.get_ident() != self._thread:
            return self._original.ops
        return SimpleNamespace(memory_efficient_attention=_memory_efficient_attention)


@contextlib.contextmanager
def _without_packages() -> Iterator[None]:
    """Let torch compute attention that a processor names a package's kernel for; download none."""
    from diffusers.models import attention_dispatch, attention_processor

    registry, download = attention_registry(), attention_dispatch._maybe_download_kernel_for_backend
    backends, xformers = registry._backends, attention_processor.xformers
    registry._backends = _Backends(backends)
    attention_processor.xformers = _Xformers(xformers)
    attention_dispatch._maybe_download_kernel_for_backend = _in_thread(
        threading.get_ident(), download, lambda backend: None
    )
    try:
        yield
    finally:
        registry._backends, attention_processor.xformers = backends, xformers
        attention_dispatch._maybe_download_kernel_for_backend = download


@contextlib.contextmanager
def shimmed() -> Iterator[None]:
    """Put the shims into the modules that are imported, for this thread."""
    with _without_packages(), _shimmed_functions():
        yield


@contextlib.contextmanager
def _shimmed_functions() -> Iterator[None]:
    saved: list[tuple[Any, str, Any]] = []
    thread = threading.get_ident()
    try:
        for module_name, attribute, make in SHIMS:
            owner_name, name = attribute.split(".")
            owner = getattr(sys.modules.get(module_name), owner_name, None)
            if owner is None or name not in vars(owner):
                continue
            original = vars(owner)[name]
            saved.append((owner, name, original))
            setattr(owner, name, _in_thread(thread, original, make(original)))
        yield
    finally:
        for owner, name, original in reversed(saved):
            setattr(owner, name, original)


def _in_thread(thread: int, original: Any, made: Any) -> Any:
    """Choose between two functions, or two static methods, by the calling thread."""
    is_static = isinstance(original, staticmethod)
    here, elsewhere = (made.__func__, original.__func__) if is_static else (made, original)

    @functools.wraps(elsewhere)
    def choose(*args: Any, **kwargs: Any) -> Any:
        return (here if threading.get_ident() == thread else elsewhere)(*args, **kwargs)

    return staticmethod(choose) if is_static else choose
