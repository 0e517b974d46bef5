"""What a pipeline is like now, so that an undo can be checked and not only believed.

Covers what a strategy may touch: tensors (place, dtype, layout, ties), classes, hooks,
``forward``s, attention processors, autoencoder switches, what offloading writes on the pipeline,
and process-wide flags.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from pipefit.strategies.live import (
    CHUNKING_ATTRIBUTES,
    COMPILED,
    ENTRY_METHODS,
    OFFLOAD_ATTRIBUTES,
    attention_registry,
    hooks_of,
    module_components,
)
from pipefit.strategies.prompt_first import ENCODE_PROMPT

Snapshot = dict[str, Any]
"""What was looked at -> what was found; compare two with :func:`differences`."""

SWITCH_PREFIXES = ("use_", "tile_")
"""How autoencoders call the attributes that slicing and tiling set."""

OWN = (*ENTRY_METHODS, *CHUNKING_ATTRIBUTES)
"""What is set on modules: wrapped entries, a block's part of the feed-forward."""


def snapshot(pipe: Any, *, with_values: bool = False) -> Snapshot:
    """Return the state of *pipe*; *with_values* adds a digest of each tensor, which takes long."""
    found: Snapshot = _process_flags()
    state = vars(pipe)
    own = (*OFFLOAD_ATTRIBUTES, ENCODE_PROMPT)
    found["pipeline"] = {name: state[name] for name in own if name in state}
    found["pipeline class"] = type(pipe)
    for name, module in module_components(pipe).items():
        found[f"{name} hooks"] = hooks_of(module)
        found[f"{name} switches"] = {
            key: value for key, value in vars(module).items() if key.startswith(SWITCH_PREFIXES)
        }
        for path, part in module.named_modules(prefix=name):
            found[f"{path} class"] = type(part)
            found[f"{path} forward"] = vars(part).get("forward")
            found[f"{path} own"] = {key: vars(part)[key] for key in OWN if key in vars(part)}
            found[f"{path} compiled"] = vars(part).get(COMPILED)
            processor = getattr(part, "processor", None)
            found[f"{path} processor"] = (processor, getattr(processor, "_attention_backend", None))
        first_path: dict[int, str] = {}
        for path, tensor in (
            *module.named_parameters(prefix=name, remove_duplicate=False),
            *module.named_buffers(prefix=name, remove_duplicate=False),
        ):
            tied_to = first_path.setdefault(id(tensor), path)
            found[path] = (*_facts(tensor), tied_to, _digest(tensor) if with_values else None)
    return found


def differences(before: Snapshot, after: Snapshot) -> tuple[str, ...]:
    """Return what is not as it was, in the order of *before*."""
    return tuple(
        key
        for key in (*before, *(key for key in after if key not in before))
        if before.get(key) != after.get(key)
    )


def _process_flags() -> Snapshot:
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return {
        "attention backend": attention_registry().get_active_backend()[0],
        # The older way of asking raises where the newer was used to answer.
        "float32 matrix products": cuda.matmul.fp32_precision,
        "float32 convolutions": cudnn.conv.fp32_precision,
        "cuDNN": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        "scaled dot product attention": (
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled(),
            cuda.cudnn_sdp_enabled(),
        ),
        "default dtype": torch.get_default_dtype(),
    }


def _facts(tensor: torch.Tensor) -> tuple[Any, ...]:
    place = (tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride())
    return (*place, tensor.requires_grad, type(tensor))


def _digest(tensor: torch.Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()
