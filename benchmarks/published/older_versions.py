"""What older diffusers and torch did, for published measurements that were made with them.

A few changes moved peaks. The functions here bring the earlier behaviour back on a weightless
pipeline, module by module, so that a record is compared with what ran then:

* until 0.30 the convolution caches of CogVideoX's autoencoder were state of its modules, so that
  old and new caches never lay side by side, frames were padded in a copy, and its spatial norm made
  scale and shift one after the other (huggingface/diffusers#9524, in 0.31);
* until 0.30.2 both CogVideoX held a table of positions, used or not, and loading cast it to the
  weights' dtype (diffusers/models/transformers/cogvideox_transformer_3d.py; today's is float64, and
  5b has none); records of 2024 until September are taken to be that old;
* until 0.30 bfloat16 was upsampled through float32 (huggingface/diffusers#9480, in 0.31);
* until torch 2.6 inductor timed kernels with Triton's ``do_bench``, whose buffer has one size for
  all GPUs (triton/testing.py);
* until January 2026 Z-Image attended under a mask of ones (huggingface/diffusers#12955), and until
  April the host waited for the GPU before and within each step (#13461), so that it could run ahead
  of the GPU by no more than one;
* until 0.37 Qwen-Image's autoencoder normalised 16 bits in 16 bits (huggingface/diffusers#13316, in
  0.38).

Classes are exchanged rather than methods, because a traced pipeline is copied first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    CogVideoXCausalConv3d,
    CogVideoXSpatialNorm3D,
)
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageRMS_norm
from diffusers.models.embeddings import CogVideoXPatchEmbed
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor
from torch.nn import functional as F

from pipefit.cost_models import memory, replay, workspace
from pipefit.planner import stage

UNTIL_2_6_FLUSH_BYTES = 256_000_000
"""What ``do_bench`` overwrites between two runs: triton/testing.py, 2.2 to 3.1. (The 3.2 of torch
2.6 has 256 MiB; no record says that it ran with that.)"""

Cache = list[Tensor]
"""One tensor, or none once it was used: whoever holds the list no longer holds the tensor."""


class CausalConv3dUntil030(CogVideoXCausalConv3d):
    """Gives its cache up before the next one is made, and pads in a copy."""

    def forward(self, inputs: Tensor, conv_cache: Cache | None = None) -> tuple[Tensor, Any]:
        """Return (batch, channels, frames, height, width) convolved, and the next cache."""
        if self.time_kernel_size > 1:
            cached = [conv_cache[0]] if conv_cache else [inputs[:, :, :1]] * self.time_pad
            inputs = torch.cat([*cached, inputs], dim=2)
            del cached
        if conv_cache:
            conv_cache.pop()
        cache = inputs[:, :, -self.time_kernel_size + 1 :].clone()
        padding = (self.width_pad, self.width_pad, self.height_pad, self.height_pad)
        inputs = F.pad(inputs, padding)
        return self.conv(inputs), [cache]


class SpatialNorm3DUntil030(CogVideoXSpatialNorm3D):
    """Normalises, scales and shifts in turn, so that fewer tensors are alive."""

    def forward(
        self, f: Tensor, zq: Tensor, conv_cache: dict[str, Cache] | None = None
    ) -> tuple[Tensor, Any]:
        """Return *f* (batch, channels, frames, height, width) modulated by *zq*, and the caches."""
        old, new = conv_cache or {}, {}
        if f.shape[2] > 1 and f.shape[2] % 2 == 1:
            first = F.interpolate(zq[:, :, :1], size=f[:, :, :1].shape[-3:])
            rest = F.interpolate(zq[:, :, 1:], size=f[:, :, 1:].shape[-3:])
            zq = torch.cat([first, rest], dim=2)
        else:
            zq = F.interpolate(zq, size=f.shape[-3:])
        result = self.norm_layer(f)
        scale, new["conv_y"] = self.conv_y(zq, conv_cache=old.get("conv_y"))
        result = result * scale
        del scale
        shift, new["conv_b"] = self.conv_b(zq, conv_cache=old.get("conv_b"))
        return result + shift, new


class Upsample2DUntil030(Upsample2D):
    """Upsamples bfloat16 in float32."""

    def forward(self, hidden_states: Tensor, output_size: Any = None) -> Tensor:
        """Return twice the height and width, convolved."""
        dtype = hidden_states.dtype
        if dtype == torch.bfloat16:
            hidden_states = hidden_states.to(torch.float32)
        if output_size is None:
            hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        else:
            hidden_states = F.interpolate(hidden_states, size=output_size, mode="nearest")
        if dtype == torch.bfloat16:
            hidden_states = hidden_states.to(dtype)
        return self.conv(hidden_states)


class ZImageUntil036(ZImageTransformer2DModel):
    """Waits for the GPU where the time and the padding were read, and always makes masks."""

    def forward(self, x: Any, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what today's class returns."""
        t[0].item()  # by the pipeline, right before the call
        return super().forward(x, t, *args, **kwargs)

    def _prepare_sequence(
        self, feats: list[Tensor], pos_ids: Any, inner_pad_mask: list[Tensor], *rest: Any
    ) -> Any:
        torch.cat(inner_pad_mask).nonzero()  # as an index by a mask does
        made = super()._prepare_sequence(feats, pos_ids, inner_pad_mask, *rest)
        return (*made[:2], _mask_of_ones(made[0]), *made[3:])

    def _build_unified_sequence(self, *args: Any) -> Any:
        made = super()._build_unified_sequence(*args)
        return (*made[:2], _mask_of_ones(made[0]), *made[3:])


class QwenNormUntil037(QwenImageRMS_norm):
    """Normalises in the dtype that it is given."""

    def forward(self, x: Tensor) -> Tensor:
        """Return *x*, channels first or last, with the root mean square of its channels one."""
        dim = 1 if self.channel_first else -1
        # One expression, as there: what was normalised is freed on the way.
        return F.normalize(x, dim=dim) * self.scale * self.gamma + self.bias


def _mask_of_ones(sequences: Tensor) -> Tensor:
    """Return that of (batch, length, channels), where all sequences have the same length."""
    mask = torch.zeros(sequences.shape[:2], dtype=torch.bool, device=sequences.device)
    for row in mask:
        row[:] = 1
    return mask


@contextmanager
def torch_version(version: str) -> Iterator[None]:
    """Predict the library workspaces of this torch; empty: of the one that is installed."""
    if not version:
        yield
        return
    older = functools.partial(workspace.cublas_bytes, torch_version=version)
    flush_bytes = workspace.flush_bytes
    if tuple(map(int, version.split(".")[:2])) < (2, 7):
        flush_bytes = lambda gpu: UNTIL_2_6_FLUSH_BYTES  # noqa: E731
    with (
        patch.object(workspace, "flush_bytes", flush_bytes),
        patch.object(memory, "cublas_bytes", lambda gpu, _: older(gpu)),
        patch.object(replay, "cublas_bytes", lambda gpu, _: older(gpu)),
        patch.object(stage, "cublas_bytes", lambda gpu, _: older(gpu)),
    ):
        yield


def as_until_0_30(pipe: DiffusionPipeline) -> None:
    """Make the components of a weightless *pipe* behave as in diffusers 0.30."""
    for module in _modules(pipe):
        if type(module) is CogVideoXCausalConv3d:
            module.__class__ = CausalConv3dUntil030
            # The padding is in the copy, not in the convolution.
            module.conv.padding = (0, 0, 0)
        elif type(module) is CogVideoXSpatialNorm3D:
            module.__class__ = SpatialNorm3DUntil030
        elif type(module) is CogVideoXPatchEmbed:
            _hold_positions(module)
        elif type(module) is Upsample2D and module.interpolate and module.norm is None:
            module.__class__ = Upsample2DUntil030


def _hold_positions(embed: CogVideoXPatchEmbed) -> None:
    """Give a weightless *embed* the table (1, prompt and patches, channels), without its values."""
    frames = (embed.sample_frames - 1) // embed.temporal_compression_ratio + 1
    rows, columns = embed.sample_height // embed.patch_size, embed.sample_width // embed.patch_size
    length = embed.max_text_seq_length + frames * rows * columns
    table = embed.proj.weight.new_empty(1, length, embed.embed_dim)
    embed.register_buffer("pos_embedding", table, persistent=False)


def as_until_0_36(pipe: DiffusionPipeline) -> None:
    """Make the transformer of a weightless Z-Image behave as in diffusers 0.36."""
    for module in _modules(pipe):
        if type(module) is ZImageTransformer2DModel:
            module.__class__ = ZImageUntil036


def as_until_0_37(pipe: DiffusionPipeline) -> None:
    """Make the autoencoder of a weightless Qwen-Image behave as in diffusers 0.37."""
    for module in _modules(pipe):
        if type(module) is QwenImageRMS_norm:
            module.__class__ = QwenNormUntil037


def _modules(pipe: DiffusionPipeline) -> Iterator[torch.nn.Module]:
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            yield from component.modules()
