"""Run the two halves of a batch one after the other: with guidance and without.

Classifier-free guidance asks the denoiser twice, once without the prompt. Many pipelines put both
into one batch, which doubles what the denoiser holds; half of it at a time is as much work in
launches of half the size. Nothing asks what the halves mean: pictures of one batch are divided too.

The wrapper lies inside of all hooks. Those of offloading then see one call, bring in what is
outside of blocks once, and each block for each half. Outside of them it would be lost: accelerate
puts back the ``forward`` that it found, at the end of every call of a pipeline under model offload.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.workload import Component, Workload
from pipefit.strategies.live import wrap_method
from pipefit.strategies.parameters import unknown_parameter
from pipefit.strategies.strategy import Kind, Quality, Undo
from pipefit.strategies.traced import common_batch_of

FOLDED = ("encoder_hidden_states", "down_block_additional_residuals",
          "mid_block_additional_residual")  # fmt: skip
"""Arguments into whose batch frames may be folded, the halves still one after the other
(pipelines/animatediff, diffusers 0.42.1)."""

BATCHED = ("sample", "hidden_states", "embed", "cond")
"""Parts of the names of what differs between the pictures of a batch. HiDream stacks layers in
front of the batch (pipelines/hidream_image, diffusers 0.42.1) and folds what it is given to the
batch that it finds: half of it would be computed with all of the prompts, and nothing would fail.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidanceSplit:
    """``denoiser.forward`` on each half of its batch; an odd batch goes through as it is."""

    name: str = "guidance_split"
    kind: Kind = "compute"
    quality: Quality = Quality.HIGH

    def traits(self, module: Any) -> dict[str, Any]:
        """Whether it is a denoiser: what it computes depends on a timestep."""
        names = inspect.signature(module.forward).parameters
        return {"is_denoiser": any(name.startswith("timestep") for name in names)}

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """One option, where the call has an even batch."""
        if self.refusal(component, {}) or common_batch_of(component, workload) % 2:
            return ()
        return ({},)

    def refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """Components that are no denoiser."""
        if not component.traits.get("is_denoiser"):
            return f"{component.class_name} is no denoiser, so guidance does not double its batch."
        return unknown_parameter(self.name, parameters, ())

    def placement(self, parameters: Mapping[str, Any]) -> None:
        """Weights stay where they are."""

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Wrap the denoiser's ``forward``; undo takes the wrapper off."""
        return wrap_method(getattr(pipe, str(component)), "forward", _in_halves)


def _in_halves(forward: Any, *args: Any, **kwargs: Any) -> Any:
    names = list(inspect.signature(forward).parameters)
    given = [*zip(names, args, strict=False), *kwargs.items()]
    batch = _batch_of([value for _, value in given])
    if batch % 2:
        return forward(*args, **kwargs)
    outputs = []
    for half in (0, 1):
        values = [_half(value, name, batch, half) for name, value in given]
        own = dict(zip(kwargs, values[len(args) :], strict=True))
        outputs.append(forward(*values[: len(args)], **own))
        del values, own
    return _joined(outputs, batch)


def _batch_of(values: Sequence[Any]) -> int:
    """Return the batch of the sample, the first argument with more to it than a batch; 1 if none.

    Pipelines that hand over a list of samples have no batch.
    """
    import torch

    for value in values:
        if isinstance(value, torch.Tensor) and value.ndim > 2:
            return int(value.shape[0])
    return 1


def _half(value: Any, name: str, batch: int, half: int) -> Any:
    """Return what one half of the batch gets of an argument: tensors of other sizes are shared.

    Raises:
        ValueError: if one of them cannot be meant for both.
    """
    import torch

    if isinstance(value, torch.Tensor):
        count = value.shape[0] if value.ndim else 0
        if count == batch or (name in FOLDED and count and count % batch == 0):
            return value.narrow(0, half * (count // 2), count // 2)
        if value.ndim > 2 and count != 1 and any(word in name for word in BATCHED):
            raise ValueError(f"{name} of shape {tuple(value.shape)} has its batch elsewhere")
        return value
    if isinstance(value, Mapping):
        return {key: _half(one, name, batch, half) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_half(one, name, batch, half) for one in value)
    return value


def _joined(halves: Sequence[Any], batch: int) -> Any:
    """Return the halves' outputs as one, in the shape of either.

    Raises:
        ValueError: if an output is not that of half a batch.
    """
    import torch

    first = halves[0]
    if isinstance(first, torch.Tensor):
        if any(half.shape[0] % (batch // 2) for half in halves):
            raise ValueError("the denoiser returns no batch that could be divided")
        return torch.cat(tuple(halves))
    if isinstance(first, Mapping):
        joined = {key: _joined([half[key] for half in halves], batch) for key in first}
        return type(first)(**joined)
    if type(first) in (list, tuple):
        return type(first)(_joined(parts, batch) for parts in zip(*halves, strict=True))
    return first
