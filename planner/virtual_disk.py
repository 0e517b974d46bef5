"""Safetensors files of virtual tensors: their geometry is remembered, their bytes are nowhere.

Group offloading writes its groups with ``safetensors.torch.save_file`` and reads them back for
every forward. On a virtual machine an empty file stands for each, so that code that looks for it
finds it; everything else is as in safetensors 0.8.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch
import torch

from pipefit.planner.virtual_tensors import CPU, VirtualTensor

Replacement = tuple[Any, str, Callable[..., Any]]

_Geometry = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


class VirtualDisk:
    """The files that virtual tensors were saved to; as long-lived as its machine."""

    def __init__(self, machine: Any) -> None:
        self._machine = machine
        self._files: dict[str, dict[str, _Geometry]] = {}

    def replacements(self) -> list[Replacement]:
        """Return what takes the place of safetensors' functions; real files stay theirs."""
        library = safetensors.torch
        save, load = library.save_file, library.load_file

        def save_file(tensors: Mapping[str, Any], filename: Any, metadata: Any = None) -> None:
            if not any(isinstance(tensor, VirtualTensor) for tensor in tensors.values()):
                return save(tensors, filename, metadata)
            return self._save(tensors, filename)

        def load_file(filename: Any, device: Any = "cpu", **how: Any) -> Mapping[str, Any]:
            if os.path.abspath(filename) not in self._files:
                return load(filename, device, **how)
            return self._load(filename, device)

        return [(library, "save_file", save_file), (library, "load_file", load_file)]

    def _save(self, tensors: Mapping[str, Any], filename: Any) -> None:
        for key, tensor in tensors.items():
            if not tensor.is_contiguous():
                raise ValueError(
                    f"You are trying to save a non contiguous tensor: `{key}` which is not allowed."
                )
        with open(filename, "wb"):
            pass
        self._files[os.path.abspath(filename)] = {
            key: (tuple(tensor.shape), tensor.stride(), tensor.dtype)
            for key, tensor in tensors.items()
        }
        self._machine.observer.wrote_file(_num_bytes(tensors))

    def _load(self, filename: Any, device: Any) -> dict[str, torch.Tensor]:
        """Map the file; what goes to a GPU is copied tensor by tensor through page-locked memory
        (``get_tensor_pinned_cuda`` in bindings/python/src/lib.rs, safetensors 0.8)."""
        machine = self._machine
        mapped = {
            key: machine.empty(*geometry, CPU)
            for key, geometry in self._files[os.path.abspath(filename)].items()
        }
        machine.observer.read_file(_num_bytes(mapped))
        place = machine.normalise(device)
        if place == CPU:
            return mapped
        return {key: machine.pinned(tensor).to(place) for key, tensor in mapped.items()}


def _num_bytes(tensors: Mapping[str, Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
