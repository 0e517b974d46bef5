"""Keep the weights of 2-D convolutions in channels_last: ``conv.to(memory_format=...)``.

cuDNN's fast kernels want that layout and otherwise copy their input into it, so a decoder in
channels_last needs less workspace. Linear layers do not care, so components that have few
convolutions are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.workload import Component, Workload
from pipefit.strategies.parameters import unknown_parameter
from pipefit.strategies.strategy import Kind, Quality, Undo

LEAST_CONV_SHARE = 0.1
"""Share of a component's weights in 2-D convolutions above which the layout is worth trying.

Our choice: every UNet and 2-D autoencoder of diffusers lies above, every transformer, with its one
patch convolution, far below.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelsLast:
    """``memory_format=torch.channels_last`` on each 2-D convolution."""

    name: str = "channels_last"
    kind: Kind = "compute"
    quality: Quality = Quality.HIGH

    def traits(self, module: Any) -> dict[str, Any]:
        """How much of the weights is in 2-D convolutions, and whether there are 3-D ones."""
        from torch import nn

        conv = sum(one.weight.numel() for one in _convolutions(module))
        total = sum(parameter.numel() for parameter in module.parameters())
        return {
            "conv2d_share": conv / total if total else 0.0,
            "has_conv3d": any(isinstance(one, nn.Conv3d) for one in module.modules()),
        }

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """One option, where convolutions are a good part and all of them are 2-D."""
        if component.traits.get("conv2d_share", 0.0) < LEAST_CONV_SHARE:
            return ()
        if component.traits.get("has_conv3d") or self.refusal(component, {}):
            return ()
        return ({},)

    def refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """Components without a 2-D convolution."""
        if not component.traits.get("conv2d_share"):
            return f"{component.class_name} has no 2-D convolution."
        return unknown_parameter(self.name, parameters, ())

    def placement(self, parameters: Mapping[str, Any]) -> None:
        """Weights stay where they are."""

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Lay the convolutions' weights out anew; undo gives each its former strides."""
        import torch

        module = getattr(pipe, str(component))
        with ExitStack() as undo:
            for conv in _convolutions(module):
                undo.callback(_restride, conv.weight, conv.weight.stride())
                conv.to(memory_format=torch.channels_last)
            return undo.pop_all().close


def _convolutions(module: Any) -> list[Any]:
    from torch import nn

    return [one for one in module.modules() if isinstance(one, (nn.Conv2d, nn.ConvTranspose2d))]


def _restride(weight: Any, stride: tuple[int, ...]) -> None:
    # `contiguous()` would not do: a 1x1 kernel counts as contiguous in either layout.
    if weight.stride() != stride:
        weight.data = weight.data.new_empty_strided(weight.shape, stride).copy_(weight.data)
