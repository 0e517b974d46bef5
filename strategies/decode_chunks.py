"""Decode a part of a video's frames at a time.

Two kinds of autoencoders decode all frames at once and need not. Stable Video Diffusion's takes
frames as a batch and says so in its signature (``num_frames``); pipelines cut that batch by their
argument ``decode_chunk_size``, and this does the same below them. LTX's has a switch,
``use_framewise_decoding``, behind which parts of the video overlap and are blended as tiles are. It
drops the last frame of every further part where the first is the one too many, so what follows the
first part comes a frame late (``_temporal_tiled_decode`` in autoencoder_kl_ltx.py, diffusers
0.42.1); that is why it is of the lowest quality here.

Autoencoders of pictures that are given frames as a batch are left to ``vae_slicing``. Mochi's
switch also changes how its convolutions pad, so another video comes out: it is refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.workload import Component, Workload
from pipefit.strategies.live import attribute_restorer, reads_flag, wrap_method
from pipefit.strategies.parameters import unknown_parameter
from pipefit.strategies.strategy import Kind, Quality, Undo
from pipefit.strategies.traced import largest_batch_of

BATCHED_FRAMES = (2, 8)
"""Frames of a batch worth trying: what diffusers' guide to Stable Video Diffusion decodes at a time
where memory is short, and otherwise."""

SWITCH = "use_framewise_decoding"
OWN_PARTS = "tile_sample_min_num_frames"
"""Attributes of classes that decode parts by themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeChunks:
    """``num_frames`` of a batch at a time, or parts of ``tile_sample_min_num_frames``, by default
    the class's own."""

    name: str = "decode_chunks"
    kind: Kind = "compute"
    quality: Quality = Quality.HIGH

    def quality_of(self, parameters: Mapping[str, Any]) -> Quality:
        """Low where the switch does it."""
        return Quality.HIGH if "num_frames" in parameters else Quality.LOW

    def traits(self, module: Any) -> dict[str, Any]:
        """How frames can be decoded apart (``batch``, ``switch`` or not), and the class's part."""
        decode = getattr(module, "decode", None)
        how = None
        if decode is not None and "num_frames" in inspect.signature(decode).parameters:
            how = "batch"
        elif (
            getattr(module, SWITCH, None) is False
            and reads_flag(type(module), SWITCH)
            and hasattr(module, OWN_PARTS)
        ):
            how = "switch"
        unit = getattr(module, "temporal_compression_ratio", 1) if how == "switch" else 1
        return {
            "decodes_frames_by": how,
            "decode_frames": getattr(module, OWN_PARTS, None) if how else None,
            "decode_unit_frames": int(unit),
        }

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """Parts below the call's frames: of a batch as published, else the class's own."""
        how = component.traits.get("decodes_frames_by")
        if how == "batch":
            frames = largest_batch_of(component, workload)
            return tuple({"num_frames": count} for count in BATCHED_FRAMES if count < frames)
        if how == "switch":
            frames, own = workload.call.get("num_frames"), component.traits["decode_frames"]
            return ({},) if isinstance(frames, int) and frames > own else ()
        return ()

    def refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """Autoencoders that decode all frames together, or parts of them always."""
        how = component.traits.get("decodes_frames_by")
        name = "num_frames" if how == "batch" else OWN_PARTS
        wrong = unknown_parameter(self.name, parameters, (name,) if how else ("num_frames", name))
        if wrong:
            return wrong
        if how is None:
            return f"{component.class_name} cannot decode other parts of a video than it does."
        frames, unit = parameters.get(name), component.traits["decode_unit_frames"]
        if frames is None:
            return "decode_chunks:num_frames is missing." if how == "batch" else None
        least = 2 * unit if how == "switch" else 1
        if not isinstance(frames, int) or isinstance(frames, bool) or frames < least:
            return f"decode_chunks:{name} is a number from {least} up, but was {frames!r}."
        if frames % unit:
            return f"decode_chunks:{name} is a multiple of {unit} frames, but was {frames}."
        return None

    def placement(self, parameters: Mapping[str, Any]) -> None:
        """Weights stay where they are."""

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Wrap ``decode``, or turn the switch; undo takes the wrapper off, or turns it back."""
        vae = getattr(pipe, str(component))
        if self.traits(vae)["decodes_frames_by"] == "batch":
            return wrap_method(
                vae, "decode", functools.partial(_in_parts, parameters["num_frames"])
            )
        frames = parameters.get(OWN_PARTS)
        with ExitStack() as undo:
            names = (SWITCH, OWN_PARTS, "tile_sample_stride_num_frames")
            undo.callback(attribute_restorer(vae, names))
            if frames is not None:
                # As much overlap as the class has, so that only the part's length changes.
                overlap = vae.tile_sample_min_num_frames - vae.tile_sample_stride_num_frames
                unit = vae.temporal_compression_ratio
                vae.tile_sample_min_num_frames = frames
                vae.tile_sample_stride_num_frames = max(frames - overlap, unit)
            setattr(vae, SWITCH, True)
            return undo.pop_all().close


def _in_parts(count: int, decode: Any, z: Any, num_frames: int, return_dict: bool = True) -> Any:
    """Decode *count* frames at a time, as pipelines do it that have ``decode_chunk_size``."""
    import torch
    from diffusers.models.autoencoders.vae import DecoderOutput

    if len(z) <= count:
        return decode(z, num_frames, return_dict)
    parts = [decode(part, len(part), False)[0] for part in z.split(count)]
    decoded = torch.cat(parts)
    return DecoderOutput(sample=decoded) if return_dict else (decoded,)
