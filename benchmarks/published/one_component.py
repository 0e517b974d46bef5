"""One component alone as a pipeline, for measurements of a single forward, encode or decode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline

Shaped = tuple[str, tuple[int, ...]]
"""A tensor to be: its dtype without ``torch.``, and its shape."""


class OneComponent(DiffusionPipeline):
    """Calls one method of one component with tensors that it makes itself."""

    def __init__(self, component: torch.nn.Module) -> None:
        super().__init__()
        self.register_modules(component=component)

    @torch.no_grad()
    def __call__(self, entry: str = "forward", inputs: Mapping[str, Any] | None = None) -> Any:
        """Return what *entry* makes of *inputs*: :data:`Shaped` values, mappings of them or others.

        Raises:
            AttributeError: if the component has no such method.
        """
        return getattr(self.component, entry)(**self._tensors(inputs or {}))

    def _tensors(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: self._tensors(part) for name, part in value.items()}
        if isinstance(value, tuple):
            dtype, shape = value
            device = self._execution_device
            return torch.zeros(shape, dtype=getattr(torch, dtype), device=device)
        return value
