"""Encode and decode a picture in overlapping tiles: ``vae.enable_tiling``, with the tile's size.

The size is always set. Left alone it is the size that the autoencoder was trained for, with which
SDXL, SD3 and FLUX do nothing at all at their native 1024 pixels (diffusers issue 9648). And two
classes have the flag and never read it, so the class is asked, not believed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.workload import Component, Workload
from pipefit.strategies.live import attribute_restorer, reads_flag
from pipefit.strategies.parameters import unknown_parameter
from pipefit.strategies.strategy import Kind, Quality, Undo
from pipefit.strategies.traced import largest_picture_px

TILE_PX = (256, 512, 1024)
"""Tile sides worth trying, in pixels of the picture.

Half and twice the 512 of Stable Diffusion's autoencoder; between two of them the decoder's peak
changes fourfold and the repeated overlap hardly (a quarter of the side, whatever the side). Our
choice.
"""

MANDATORY_CLASSES = ("AutoencoderKLAllegro",)
"""Classes whose untiled decode raises NotImplementedError
(models/autoencoders/autoencoder_kl_allegro.py, diffusers 0.42.1)."""

AXES = ("size", "height", "width")
"""Ends of the attributes ``tile_sample_min_*``: one square size, or one for each side."""

LARGEST_OVERLAP_DENOMINATOR = 64
"""Overlap factors are stored as floats; their fractions (1/4, 1/6, 1/5, 1/8) are far simpler."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeTiling:
    """``vae.enable_tiling()`` with tiles of ``tile_px``; ``{}`` means the class's own tiles."""

    name: str = "vae_tiling"
    kind: Kind = "compute"
    quality: Quality = Quality.HIGH

    def traits(self, module: Any) -> dict[str, Any]:
        """Whether tiling has an effect, the class's tile, and in which steps it can change."""
        can_tile = hasattr(module, "use_tiling") and reads_flag(type(module), "use_tiling")
        tiles = _tiles(module) if can_tile else {}
        return {
            "can_tile": can_tile,
            "must_tile": type(module).__name__ in MANDATORY_CLASSES,
            "tile_px": max((tile.side_px for tile in tiles.values()), default=None),
            "tile_unit_px": max((tile.unit_px for tile in tiles.values()), default=None),
        }

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """Tile sizes below the picture's; the class's own where it must tile."""
        traits = component.traits
        if traits.get("must_tile"):
            return ({},)
        if self.refusal(component, {}) or not traits.get("tile_px"):
            return ()
        picture_px = largest_picture_px(component, workload)
        unit_px = traits["tile_unit_px"]
        sides_px = {side_px - side_px % unit_px for side_px in (*TILE_PX, traits["tile_px"])}
        return tuple({"tile_px": side} for side in sorted(sides_px) if unit_px <= side < picture_px)

    def refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """Classes without tiling, and sizes that are no size."""
        wrong = unknown_parameter(self.name, parameters, ("tile_px",))
        if wrong:
            return wrong
        if not component.traits.get("can_tile"):
            return f"{component.class_name} cannot work in tiles."
        if "tile_px" not in parameters:
            return None
        tile_px, unit_px = parameters["tile_px"], component.traits.get("tile_unit_px")
        if unit_px is None:
            return f"{component.class_name} has tiles of one size only: leave tile_px out."
        if not isinstance(tile_px, int) or isinstance(tile_px, bool) or tile_px < unit_px:
            return f"tile_px is a number of pixels from {unit_px} up, but was {tile_px!r}."
        return None

    def placement(self, parameters: Mapping[str, Any]) -> None:
        """Weights stay where they are."""

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Set the tile and the flag; undo sets every attribute back."""
        vae = getattr(pipe, str(component))
        names = [name for name in vars(vae) if name == "use_tiling" or name.startswith("tile_")]
        with ExitStack() as undo:
            undo.callback(attribute_restorer(vae, names))
            if "tile_px" in parameters:
                for axis, tile in _tiles(vae).items():
                    _set_tile(vae, axis, tile, parameters["tile_px"])
            else:
                vae.enable_tiling()
            return undo.pop_all().close


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tile:
    """One axis of an autoencoder's tile."""

    side_px: int
    compression: int
    """Pixels of the picture to one of the latents."""
    unit_px: int
    """A side is a multiple of this, so that tile and overlap are whole latents.

    Otherwise the stitched picture has another size than the untiled one (the steps are rounded in
    latents, the kept part of each tile in pixels: ``tiled_decode`` of the autoencoders).
    """


def _tiles(vae: Any) -> dict[str, _Tile]:
    return {
        axis: _tile(vae, axis)
        for axis in AXES
        if isinstance(getattr(vae, f"tile_sample_min_{axis}", None), (int, list, tuple))
    }


def _tile(vae: Any, axis: str) -> _Tile:
    sample = getattr(vae, f"tile_sample_min_{axis}")
    side_px = int(sample if isinstance(sample, int) else max(sample))
    latent_side = getattr(vae, f"tile_latent_min_{axis}", None)
    if latent_side is None:
        compression = int(
            getattr(vae, "spatial_compression_ratio", None) or vae.config.spatial_compression_ratio
        )
    else:
        compression = side_px // int(latent_side)
    overlap = getattr(vae, f"tile_overlap_factor_{axis}", getattr(vae, "tile_overlap_factor", 0))
    steps = Fraction(overlap).limit_denominator(LARGEST_OVERLAP_DENOMINATOR).denominator
    if hasattr(vae, f"tile_sample_stride_{axis}"):
        stride_px = int(getattr(vae, f"tile_sample_stride_{axis}"))
        steps = Fraction(stride_px, side_px).denominator
    return _Tile(side_px=side_px, compression=compression, unit_px=compression * steps)


def _set_tile(vae: Any, axis: str, tile: _Tile, tile_px: int) -> None:
    """Write the attributes and not the call's arguments: AutoencoderKL's call takes none."""
    side_px = max(tile_px - tile_px % tile.unit_px, tile.unit_px)
    setattr(vae, f"tile_sample_min_{axis}", side_px)
    if hasattr(vae, f"tile_sample_stride_{axis}"):
        stride_px = int(getattr(vae, f"tile_sample_stride_{axis}"))
        setattr(vae, f"tile_sample_stride_{axis}", side_px * stride_px // tile.side_px)
    vae.enable_tiling()
    # After enabling, which in some classes derives this again from other attributes.
    if hasattr(vae, f"tile_latent_min_{axis}"):
        setattr(vae, f"tile_latent_min_{axis}", side_px // tile.compression)
