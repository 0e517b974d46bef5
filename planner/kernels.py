"""From an operator call to the facts that the cost models need (:class:`Kernel`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipefit.cost_models.workload import Kernel, KernelKind
from pipefit.planner.virtual_layouts import runs_channels_last, suggests_channels_last

aten = torch.ops.aten

_KIND_BY_NAME: dict[str, KernelKind] = {
    "convolution": "conv",
    "mm": "gemm",
    "addmm": "gemm",
    "bmm": "gemm",
    "baddbmm": "gemm",
    "_int_mm": "gemm",
    "_scaled_mm": "gemm",
    "_scaled_dot_product_flash_attention": "attention",
    "_scaled_dot_product_efficient_attention": "attention",
    "_scaled_dot_product_cudnn_attention": "attention",
    "native_group_norm": "norm",
    "native_layer_norm": "norm",
    "native_batch_norm": "norm",
    "cudnn_batch_norm": "norm",
    "_native_batch_norm_legit": "norm",
    "_fused_rms_norm": "norm",
    "_softmax": "reduce",
    "_safe_softmax": "reduce",
    "sum": "reduce",
    "mean": "reduce",
    "var": "reduce",
    "var_mean": "reduce",
    "amax": "reduce",
    "argmax": "reduce",
    "cumsum": "reduce",
    "clone": "copy",
    "copy_": "copy",
    "_to_copy": "copy",
    "cat": "copy",
    "stack": "copy",
    "repeat": "copy",
    "constant_pad_nd": "copy",
    "upsample_nearest2d": "copy",
    "upsample_nearest3d": "copy",
    "fill_": "copy",
    "zeros": "copy",
    "ones": "copy",
    "full": "copy",
    "index": "index",
    "index_put_": "index",
    "index_select": "index",
    "embedding": "index",
    "gather": "index",
    "scatter": "index",
}
_NO_LAUNCH = {
    "_unsafe_view",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "resize_",
}


def kernel_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Kernel | None:
    """Return the facts of one launch; None where nothing is launched (``empty``)."""
    name = func._schema.name.split("::")[1]
    if name in _NO_LAUNCH:
        return None
    outs = [
        o
        for o in (out if isinstance(out, (tuple, list)) else (out,))
        if isinstance(o, torch.Tensor)
    ]
    inputs = list(unique_tensors([*args, *kwargs.values()]))
    kind = _KIND_BY_NAME.get(name, "elementwise")
    first = outs[0] if outs else inputs[0]
    shape: tuple[int, ...] = tuple(first.shape)
    facts: dict[str, Any] = {}
    if kind == "conv":
        shape, facts = _convolution(args, first)
    elif kind == "gemm":
        shape, facts = _gemm(name, args)
    elif kind == "attention":
        shape, facts = _attention(args)
    elif name.startswith("upsample_"):
        facts = _upsampling(args[0])
    # A written argument (in-place) is among the inputs already: it is read and written.
    return Kernel(
        kind=kind,
        name=f"aten.{name}",
        dtype=str(
            (inputs[0] if kind in ("conv", "gemm", "attention") else first).dtype
        ).removeprefix("torch."),
        read_bytes=sum(
            tensor_bytes(t) for t in inputs if not (name in ("copy_", "fill_") and t is args[0])
        ),
        write_bytes=sum(tensor_bytes(o) for o in outs),
        shape=shape,
        **facts,
    )


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Real bytes: a dimension that a broadcast repeats (stride 0) is read once."""
    elements = math.prod(
        size
        for size, stride in zip(tensor.size(), tensor.stride(), strict=True)
        if stride or size == 0
    )
    return elements * tensor.element_size()


def unique_tensors(values: Sequence[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            if not any(value is f for f in found):
                found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [t for t in unique_tensors(value) if not any(t is f for f in found)]
    return found


def _convolution(args: Sequence[Any], out: torch.Tensor) -> tuple[tuple[int, ...], dict[str, Any]]:
    x, weight, transposed, groups = args[0], args[1], bool(args[6]), int(args[8])
    last = runs_channels_last(x, weight)
    dense = x.is_contiguous()
    if last and x.dim() in (4, 5):
        layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        dense = x.is_contiguous(memory_format=layout)
    shape = (
        x.shape[0], x.shape[1], out.shape[1], groups, int(transposed),
        *x.shape[2:], *out.shape[2:], *weight.shape[2:],
    )  # fmt: skip
    return tuple(int(s) for s in shape), {
        "input_bytes": x.numel() * x.element_size(),
        "weight_bytes": weight.numel() * weight.element_size(),
        "output_bytes": out.numel() * out.element_size(),
        "channels_last": last,
        "weight_channels_last": suggests_channels_last(weight),
        "contiguous_input": dense,
    }


def _upsampling(x: torch.Tensor) -> dict[str, Any]:
    """CUDA's kernels copy an input that is dense in neither layout that they are written for.

    Source: ``upsample_nearest2d_out_cuda_template`` in aten/src/ATen/native/cuda/
    UpSampleNearest2d.cu, torch 2.13; the other modes are alike.
    """
    layout = torch.channels_last if suggests_channels_last(x) and x.dim() == 4 else None
    dense = x.is_contiguous(memory_format=layout) if layout else x.is_contiguous()
    return {"input_bytes": x.numel() * x.element_size(), "contiguous_input": dense}


def _gemm(name: str, args: Sequence[Any]) -> tuple[tuple[int, ...], dict[str, Any]]:
    left, right = (args[1], args[2]) if name in ("addmm", "baddbmm") else (args[0], args[1])
    batch = left.shape[0] if left.dim() == 3 else 1
    shape = (batch, left.shape[-2], right.shape[-1], left.shape[-1])
    return tuple(int(s) for s in shape), {"weight_bytes": tensor_bytes(right)}


def _attention(args: Sequence[Any]) -> tuple[tuple[int, ...], dict[str, Any]]:
    query, key, value, mask = args
    heads = query.shape[-3] if query.dim() > 3 else 1
    batch = math.prod(query.shape[:-3]) if query.dim() > 3 else query.shape[0]
    shape = (batch, heads, query.shape[-2], key.shape[-2], query.shape[-1], value.shape[-1])
    return tuple(int(s) for s in shape), {"masked": mask is not None}
