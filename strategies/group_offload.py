"""Groups of a component's layers take turns on the GPU: diffusers' group offloading.

Two traps decide what is offered. Pipelines call an autoencoder's ``decode``, never its ``forward``,
so the hook that would load what block level leaves over does not fire (diffusers issues 12319 and
12692), and a copy stream learns its order from ``forward`` as well: then it costs memory and gains
nothing. And pinned copies made at the start undo a cast that the pipeline makes later, as SDXL does
with a float16 VAE. So autoencoders are offered leaf by leaf and without streams, unless their class
names its blocks.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pipefit.cost_models import placement
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.residency import DECLARED_BLOCKS, offload_groups
from pipefit.cost_models.workload import Component, Workload
from pipefit.strategies.live import (
    device_restorer,
    hook_restorer,
    read_back_groups,
    remove_group_offloading,
    tensor_slots,
)
from pipefit.strategies.parameters import not_a_flag, unknown_parameter
from pipefit.strategies.strategy import Kind, Option, Quality, Undo

PARAMETERS = (
    "offload_type",
    "num_blocks_per_group",
    "use_stream",
    "record_stream",
    "non_blocking",
    "low_cpu_mem_usage",
    "offload_to_disk_path",
    "block_modules",
)
FLAGS = ("use_stream", "record_stream", "non_blocking", "low_cpu_mem_usage")

STREAMLESS_ARCHITECTURES = ("cpu", "apple")
"""Devices without copy streams: diffusers asks for a backend with a ``Stream`` type
(``apply_group_offloading`` in hooks/group_offloading.py, diffusers 0.42.1)."""

NESTED_BLOCK_ENCODERS = ("T5", "UMT5", "CLIPText")
"""Text encoders, by the start of their class, whose blocks lie below a child that is itself called.

Without ``block_modules`` block level treats such an encoder as one group. Others (language models)
are often entered below their top module, where the hook of the top never fires, so they go leaf by
leaf.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOffload:
    """``component.enable_group_offload(...)``; ``apply_group_offloading`` where it has none.

    ``offload_to_disk_path`` is an existing folder; each component gets a folder of its own in it,
    which is gone after undoing.
    """

    name: str = "group_offload"
    kind: Kind = "placement"
    quality: Quality = Quality.EXACT

    def traits(self, module: Any) -> dict[str, Any]:
        """What the class allows and where its blocks lie."""
        from torch import nn

        return {
            "group_offload_supported": bool(getattr(module, "_supports_group_offloading", True)),
            "is_autoencoder": hasattr(module, "decode"),
            "has_block_list": any(_is_block_list(child) for child in module.children()),
            "has_uncalled_blocks": _has_uncalled_blocks(module),
            "block_modules": _block_modules(module),
            DECLARED_BLOCKS: _declared_blocks(module),
            "is_upcast_by_pipelines": _is_upcast(module),
            "has_multihead_attention": any(
                isinstance(part, nn.MultiheadAttention) for part in module.modules()
            ),
            "has_own_batch_norm": any(
                isinstance(child, nn.modules.batchnorm._BatchNorm) for child in module.children()
            ),
        }

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """Leaf level and single blocks, each plain, streamed, and streamed with little host RAM.

        Left out though allowed: ``record_stream``, with which the host runs ahead and dropped
        weights pile up (diffusers issue 12673), groups of several blocks, which need more memory
        for the same transfers, and the disk.
        """
        block: dict[str, Any] = {"offload_type": "block_level", "num_blocks_per_group": 1}
        if component.traits.get("block_modules"):
            block["block_modules"] = list(component.traits["block_modules"])
        plain: list[dict[str, Any]] = [{"offload_type": "leaf_level"}, block]
        offered = list(plain)
        has_streams = gpu.architecture not in STREAMLESS_ARCHITECTURES
        if has_streams and not component.traits.get("is_autoencoder"):
            offered += [{**one, "use_stream": True} for one in plain]
            offered += [{**one, "use_stream": True, "low_cpu_mem_usage": True} for one in plain]
        return [one for one in offered if self.refusal(component, one) is None]

    def refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """What the library would reject, and what it would accept and get wrong."""
        wrong = unknown_parameter(self.name, parameters, PARAMETERS) or not_a_flag(
            self.name, parameters, FLAGS
        )
        if wrong:
            return wrong
        traits, name = component.traits, component.class_name
        if not traits.get("group_offload_supported", True):
            return f"{name} says that it does not support group offloading."
        if traits.get("is_autoencoder") and traits.get("has_own_batch_norm"):
            return f"{name} keeps batch statistics that pipelines read without calling it."
        quantized = _quantized_refusal(component, parameters)
        if quantized:
            return quantized
        if parameters.get("record_stream") and not parameters.get("use_stream"):
            return "record_stream needs use_stream=true."
        if traits.get("is_upcast_by_pipelines") and (
            parameters.get("use_stream") or parameters.get("offload_to_disk_path")
        ):
            return f"{name} is cast to float32 by some pipelines, which its copies would undo."
        if parameters.get("offload_type", "block_level") == "leaf_level":
            return _leaf_level_refusal(component, parameters)
        return _block_level_refusal(component, parameters)

    def conflict(self, parameters: Mapping[str, Any], other: Option) -> str | None:
        """safetensors writes no weights that are laid out otherwise than in rows."""
        if parameters.get("offload_to_disk_path") and other.strategy == "channels_last":
            return "safetensors does not write weights in that layout to the disk."
        return None

    def placement(self, parameters: Mapping[str, Any]) -> placement.Placement:
        """The same parameters as data."""
        return _as_placement(parameters)

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Attach the hooks; undo removes them and brings the weights back, out of pinned memory."""
        import torch

        module = getattr(pipe, str(component))
        folder = parameters.get("offload_to_disk_path")
        arguments = {**parameters, "onload_device": torch.device(device)}
        if "block_modules" in arguments:
            arguments["block_modules"] = list(arguments["block_modules"])
        with ExitStack() as undo:
            if folder:
                # Files are found again by names without the model in them, so each needs its own.
                folder = tempfile.mkdtemp(prefix=f"{component}-", dir=folder)
                undo.callback(shutil.rmtree, folder)
                arguments["offload_to_disk_path"] = folder
            undo.callback(device_restorer(module))
            if parameters.get("use_stream"):
                undo.callback(_unpin, module)
            undo.callback(hook_restorer(module))
            undo.callback(remove_group_offloading, module)
            if folder:
                undo.callback(read_back_groups, module)
            _enable(module, arguments)
            return undo.pop_all().close


def _quantized_refusal(component: Component, parameters: Mapping[str, Any]) -> str | None:
    """Refuse what loses quantised weights: diffusers issues 12610, 14038 and 14433; for torchao's
    on disk see ``_check_disk_offload_torchao`` in hooks/group_offloading.py, diffusers 0.42.1."""
    backend = component.traits.get("quantized_by")
    if backend == "quanto":
        return f"{component.class_name} is quantised by quanto, which loses the weights in groups."
    if backend == "torchao" and (
        parameters.get("use_stream") or parameters.get("offload_to_disk_path")
    ):
        return (
            f"{component.class_name} is quantised by torchao, whose weights survive neither "
            "streams nor the disk: use groups without."
        )
    return None


def _leaf_level_refusal(component: Component, parameters: Mapping[str, Any]) -> str | None:
    if parameters.get("offload_to_disk_path") and any(t.tied_to for t in component.tensors):
        # The second leaf saves what saving the first has emptied (_offload_to_disk, 0.42.1).
        return f"{component.class_name} has tied weights, which leaf level would lose on the disk."
    if component.traits.get("has_multihead_attention"):
        return (
            f"{component.class_name} has a torch.nn.MultiheadAttention, which reads its output "
            "projection without calling it, so leaf level would leave that on the CPU."
        )
    return None


def _block_level_refusal(component: Component, parameters: Mapping[str, Any]) -> str | None:
    offload_type = parameters.get("offload_type", "block_level")
    if offload_type != "block_level":
        return f"offload_type is block_level or leaf_level, but was {offload_type!r}."
    num_blocks = parameters.get("num_blocks_per_group")
    if not isinstance(num_blocks, int) or isinstance(num_blocks, bool) or num_blocks < 1:
        return f"block_level needs num_blocks_per_group of at least 1, but it was {num_blocks!r}."
    traits = component.traits
    blocks = parameters.get("block_modules") or traits.get("block_modules")
    if traits.get("is_autoencoder") and not blocks:
        return f"{component.class_name} names no blocks, and pipelines call decode, not forward."
    if traits.get("has_uncalled_blocks"):
        return (
            f"{component.class_name} has lists of lists of blocks, of which diffusers would group "
            "the inner lists, whose hooks never fire: use leaf_level."
        )
    if parameters.get("use_stream") and _has_nested_recorders(component, parameters):
        # Each level registers its own tracker of the order on the same modules, which raises
        # (LazyPrefetchGroupOffloadingHook.initialize_hook, diffusers 0.42.1).
        return f"{component.class_name} has nested blocks, which diffusers cannot stream."
    if not blocks and not traits.get("has_block_list"):
        return f"{component.class_name} has no list of blocks to divide: use leaf_level."
    return None


def _has_nested_recorders(component: Component, parameters: Mapping[str, Any]) -> bool:
    groups = offload_groups(component, _as_placement(parameters))
    return any(
        not outer or inner.startswith(f"{outer}.")
        for outer in groups.recorders
        for inner in groups.recorders - {outer}
    )


def _as_placement(parameters: Mapping[str, Any]) -> placement.GroupOffload:
    given = {"offload_type": "block_level", **parameters}
    given["block_modules"] = tuple(given.get("block_modules") or ())
    return placement.GroupOffload(**given)


def _is_upcast(module: Any) -> bool:
    """Whether pipelines may cast the module to float32 during a call.

    ``force_upcast`` is the sign, though of AutoencoderKL's users only SDXL's heed it; those that
    read a picture whatever 16-bit dtype it has (``prepare_latents`` in
    pipeline_stable_diffusion_xl_img2img.py, diffusers 0.42.1).
    """
    import torch

    config = getattr(module, "config", None)
    dtypes = {parameter.dtype for parameter in module.parameters()}
    is_half = not dtypes.isdisjoint((torch.float16, torch.bfloat16))
    return bool(getattr(config, "force_upcast", False)) and is_half


def _is_block_list(module: Any) -> bool:
    from torch import nn

    return isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 0


def _has_uncalled_blocks(module: Any) -> bool:
    """Whether some block is a container that only passes its own blocks on (Stable Cascade's)."""
    from torch import nn

    cut = [module, *(part for name in _block_modules(module) if (part := _child(module, name)))]
    return any(
        isinstance(block, (nn.ModuleList, nn.ModuleDict)) and any(True for _ in block.parameters())
        for part in cut
        for blocks in part.children()
        if _is_block_list(blocks)
        for block in blocks
    )


def _child(module: Any, name: str) -> Any:
    return dict(module.named_children()).get(name)


def _declared_blocks(module: Any) -> list[str]:
    return list(getattr(module, "_group_offload_block_modules", None) or ())


def _block_modules(module: Any) -> list[str]:
    """Names of the children to descend into, as ``block_modules`` wants them."""
    if declared := _declared_blocks(module):
        return declared
    if not type(module).__name__.startswith(NESTED_BLOCK_ENCODERS):
        return []
    for path, part in module.named_modules():
        if _is_block_list(part):
            return path.split(".")[:-1]
    return []


def _enable(module: Any, arguments: Mapping[str, Any]) -> None:
    from diffusers import ModelMixin
    from diffusers.hooks import apply_group_offloading

    if isinstance(module, ModelMixin):
        module.enable_group_offload(**arguments)
    else:
        apply_group_offloading(module, **arguments)


def _unpin(module: Any) -> None:
    """Copy tensor by tensor into ordinary memory, so that at most one exists twice."""
    for slots, key in tensor_slots(module):
        if slots[key].device.type == "cpu" and slots[key].is_pinned():
            slots[key].data = slots[key].data.clone()
