"""What cost models and strategies know of a live module, as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pipefit.cost_models.workload import Component, ModuleInfo, TensorInfo

LEAF_LAYERS = (
    torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.ConvTranspose1d,
    torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d, torch.nn.Linear, torch.nn.Embedding,
)  # fmt: skip
"""What leaf-level group offloading groups on.

Source: ``_GO_LC_SUPPORTED_PYTORCH_LAYERS`` in diffusers/hooks/_common.py, diffusers 0.42.1.
"""


BLOCK_LISTS = (torch.nn.ModuleList, torch.nn.Sequential)
"""What block-level group offloading groups on (hooks/group_offloading.py, diffusers 0.42.1)."""


def describe_component(name: str, module: torch.nn.Module, traits: Mapping[str, Any]) -> Component:
    """Return what cost models and strategies need to know of a component."""
    tensors: list[TensorInfo] = []
    first_path: dict[tuple[int, int, int], str] = {}
    for owner_path, part in module.named_modules(remove_duplicate=True):
        prefix = f"{owner_path}." if owner_path else ""
        for is_buffer, table in ((False, part._parameters), (True, part._buffers)):
            for key, tensor in table.items():
                if tensor is None:
                    continue
                path = prefix + key
                storage = _storage_key(tensor)
                tied = first_path.get(storage)
                first_path.setdefault(storage, path)
                tensors.append(
                    TensorInfo(
                        path=path,
                        num_bytes=tensor.numel() * tensor.element_size(),
                        dtype=str(tensor.dtype).removeprefix("torch."),
                        shape=tuple(tensor.shape),
                        is_buffer=is_buffer,
                        persistent=not (is_buffer and key in part._non_persistent_buffers_set),
                        tied_to=tied,
                    )
                )
    modules = tuple(
        ModuleInfo(
            path=path,
            class_name=type(part).__name__,
            is_leaf_layer=isinstance(part, LEAF_LAYERS),
            is_block_list=isinstance(part, BLOCK_LISTS),
            is_container=isinstance(part, (*BLOCK_LISTS, torch.nn.ModuleDict)),
        )
        for path, part in module.named_modules()
    )
    return Component(
        name=name,
        class_name=type(module).__name__,
        library=_library(module),
        tensors=tuple(tensors),
        modules=modules,
        traits=dict(traits),
    )


def _library(module: torch.nn.Module) -> str:
    """Return where the class comes from; a user's own loads as what it is derived from."""
    sources = [base.__module__.split(".")[0] for base in type(module).__mro__]
    return next((one for one in sources if one in ("diffusers", "transformers")), sources[0])


def _storage_key(tensor: torch.Tensor) -> tuple[int, int, int]:
    """The same for tensors in the same memory, whether it has an address (real) or not (virtual).

    Different parts of one storage are not tied, as those of a fused weight that a loader divided:
    each gets memory of its own when it is moved.
    """
    storage = int(tensor.untyped_storage()._cdata)
    return storage, tensor.storage_offset(), tensor.numel() * tensor.element_size()
