"""Functions of diffusers that are replaced while a call is traced, because they loop over values.

Each does what the original does, with the same allocations, in fewer or other operators. They are
named by module and attribute; tests/planner/test_shims.py holds them to the pinned diffusers.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

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


@contextlib.contextmanager
def shimmed() -> Iterator[None]:
    """Put the shims into the modules that are imported, for this thread."""
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
