"""Pipelines that run a part of a call, for measurements of a part.

All make their tensors themselves, on the device where the pipeline runs: an input that the caller
made would lie elsewhere.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.nn import functional as F

Shaped = tuple[str, tuple[int, ...]]
"""A tensor to be: its dtype without ``torch.``, and its shape."""


NUM_FORWARDS = 3
"""diffusers' benchmarks make five and more (benchmarks/benchmarking_utils.py); three differ."""


class OneComponent(DiffusionPipeline):
    """Calls one method of one component."""

    def __init__(self, component: torch.nn.Module) -> None:
        super().__init__()
        self.register_modules(component=component)

    @torch.no_grad()
    def __call__(self, entry: str = "forward", inputs: Mapping[str, Any] | None = None) -> Any:
        """Return what *entry* makes of *inputs*: :data:`Shaped` values, mappings of them or others.

        Raises:
            AttributeError: if the component has no such method.
        """
        tensors = _tensors(inputs or {}, self._execution_device)
        if entry != "forward":
            return getattr(self.component, entry)(**tensors)
        # The module itself, else its hooks do not run; and again, as the benchmarks do: a copy
        # stream only learns its order in the first forward, then it prefetches.
        for _ in range(NUM_FORWARDS):
            result = self.component(**tensors)
        return result


class AttentionCall(torch.nn.Module):
    """One call of torch's attention, with nothing around it."""

    def __init__(self) -> None:
        super().__init__()
        self.where = torch.nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)

    @property
    def device(self) -> torch.device:
        """Where a pipeline takes this component to be."""
        return self.where.device

    def forward(self, enable_gqa: bool = False, **tensors: torch.Tensor) -> torch.Tensor:
        """Attend; ``query`` (batch, heads, tokens, width), ``key``, ``value``, ``attn_mask``."""
        return F.scaled_dot_product_attention(**tensors, enable_gqa=enable_gqa)


def prompt_only(pipe: DiffusionPipeline) -> None:
    """Let a call of *pipe* encode its prompts and do nothing else."""

    @torch.no_grad()
    def call(self: DiffusionPipeline, prompt: str = "", negative_prompt: str = "") -> Any:
        return self.encode_prompt(
            prompt=prompt, negative_prompt=negative_prompt, do_classifier_free_guidance=True
        )

    _exchange_call(pipe, call)


def with_embeddings(pipe: DiffusionPipeline) -> None:
    """Let *pipe* be called with embeddings of :data:`Shaped`, and drop its text encoder."""
    original = type(pipe).__call__

    @functools.wraps(original)
    def call(self: DiffusionPipeline, *args: Any, **given: Any) -> Any:
        return original(self, *args, **_tensors(given, self._execution_device))

    pipe.register_modules(text_encoder=None, tokenizer=None)
    _exchange_call(pipe, call)


def _exchange_call(pipe: DiffusionPipeline, call: Any) -> None:
    """Give *pipe* a class of its own; its signature is what arguments are checked against."""
    members = {"__call__": call, "__signature__": inspect.signature(type(pipe))}
    name = f"{type(pipe).__name__}Part"
    pipe.__class__ = type(name, (type(pipe),), {**members, "__module__": type(pipe).__module__})


def _tensors(value: Any, device: torch.device) -> Any:
    if isinstance(value, Mapping):
        return {name: _tensors(part, device) for name, part in value.items()}
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        dtype, shape = value
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=device)
    return value
