"""Shapes and strides of an operator's outputs, where meta kernels do not say what CUDA does.

Everything not named here is what torch's own meta kernel answers. The differences matter because a
layout decides about copies and convolution workspaces far downstream: the stride of a size-1 batch
dimension makes the FLUX decoder need 2.38 GiB for one image, but not 4 x 2.38 for four.

All functions here work on geometry: they are called where every tensor, real or virtual, counts as
a meta tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

META = torch.device("meta")

aten = torch.ops.aten


def output_shapes(func: Any, args: Any, kwargs: Any) -> Any:
    """Return meta tensors (one, or as many as *func* returns) laid out as on CUDA."""
    args = tuple(as_meta(a) for a in args)
    kwargs = {k: as_meta(v) for k, v in kwargs.items()}
    rule = _SHAPE_RULES.get(func)
    if rule is not None:
        return rule(func, args, kwargs)
    made = func(*args, **kwargs)
    if torch.Tag.pointwise in func.tags and func._schema.name not in _UNARY_WITH_NUMBERS:
        return _with_iterator_strides(made, args)
    return made


def as_meta(value: Any) -> Any:
    """Return an operator's argument with real CPU tensors replaced by their geometry."""
    if isinstance(value, torch.Tensor):
        if value.device.type == "meta":
            return value
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=META)
    if isinstance(value, (list, tuple)):
        return type(value)(as_meta(v) for v in value)
    if isinstance(value, torch.device):
        return META
    return value


def suggests_channels_last(tensor: torch.Tensor) -> bool:
    """C++'s ``suggest_memory_format``: by the strides, size-1 dimensions included."""
    if tensor.dim() not in (4, 5):
        return False
    wanted = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    return torch._prims_common.suggest_memory_format(tensor) == wanted


def runs_channels_last(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether cuDNN computes a convolution in channels_last: either operand decides.

    Source: ``cudnn_conv_suggest_memory_format`` in aten/src/ATen/native/ConvUtils.h, torch 2.13.
    """
    if torch.float64 in (x.dtype, weight.dtype):
        return False
    return suggests_channels_last(x) or suggests_channels_last(weight)


def empty_like(
    source: torch.Tensor, dtype: torch.dtype, layout: torch.memory_format
) -> torch.Tensor:
    """``empty_like`` as C++ does it: a dense tensor keeps its strides, those of size 1 included."""
    if layout == torch.preserve_format:
        dims = [d for d in range(source.dim()) if source.size(d) != 1]
        step = 1
        for d in sorted(dims, key=lambda d: (source.stride(d), source.size(d))):
            if source.stride(d) != step:
                break
            step *= source.size(d)
        else:
            return torch.empty_strided(source.size(), source.stride(), dtype=dtype, device=META)
    return torch.empty_like(source, dtype=dtype, memory_format=layout, device=META)


def _like(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Operators that fill an ``empty_like``."""
    layout = kwargs.get("memory_format") or torch.preserve_format
    return empty_like(args[0], kwargs.get("dtype") or args[0].dtype, layout)


def _group_norm(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    # CUDA's kernel works on contiguous input and returns contiguous output plus two statistics.
    x, groups = args[0], args[6]
    stats = (x.shape[0], groups)
    return (
        torch.empty(x.size(), dtype=x.dtype, device=META),
        torch.empty(stats, dtype=x.dtype, device=META),
        torch.empty(stats, dtype=x.dtype, device=META),
    )


def _layer_norm(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    # Contiguous on CUDA whatever the input (layer_norm_cuda in native/cuda/layer_norm_kernel.cu).
    made, mean, rstd = func(*args, **kwargs)
    return torch.empty(made.size(), dtype=made.dtype, device=META), mean, rstd


def _convolution(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    x, weight = args[0], args[1]
    made = func(*args, **kwargs)
    if runs_channels_last(x, weight):
        layout = torch.channels_last if made.dim() == 4 else torch.channels_last_3d
    else:
        layout = torch.contiguous_format
    return torch.empty(made.size(), dtype=made.dtype, device=META, memory_format=layout)


_SHAPE_RULES: dict[Any, Callable[..., Any]] = {
    aten.native_group_norm.default: _group_norm,
    aten.convolution.default: _convolution,
    aten.native_layer_norm.default: _layer_norm,
    **dict.fromkeys(
        (
            aten.empty_like.default,
            aten.zeros_like.default,
            aten.ones_like.default,
            aten.full_like.default,
            aten.rand_like.default,
            aten.randn_like.default,
            aten.flip.default,
        ),
        _like,
    ),
}

_UNARY_WITH_NUMBERS = {"aten::pow", "aten::clamp", "aten::clamp_min", "aten::clamp_max"}
"""To TensorIterator these have one operand; their numbers are parameters."""


def _with_iterator_strides(made: Any, args: Sequence[Any]) -> Any:
    """Give a tensor combined with a scalar the strides that TensorIterator gives it on CUDA.

    The meta kernels normalise the stride of a size-1 dimension there; CUDA keeps it, and that
    decides between channels_last and contiguous for everything downstream at batch size 1.
    Operators on one tensor, or on several of one shape, take TensorIterator's fast path, which
    meta shares.
    """
    tensors = [t for t in _tensors(args) if t.dim() > 0]
    scalars = [
        a
        for a in args[:3]
        if isinstance(a, (int, float)) or (isinstance(a, torch.Tensor) and a.dim() == 0)
    ]
    if len(args) < 2 or len(tensors) != 1 or not scalars or tensors[0].shape != made.shape:
        return made
    size, stride = made.size(), tensors[0].stride()
    before = functools.cmp_to_key(lambda a, b: _iterates_before(a, b, size, stride))
    result, step = [0] * made.dim(), 1
    for dim in sorted(range(made.dim()), key=before):
        result[dim] = step
        step *= max(1, size[dim])
    return torch.empty_strided(size, result, dtype=made.dtype, device=META)


def _iterates_before(a: int, b: int, size: Sequence[int], stride: Sequence[int]) -> int:
    """Order dimensions from fastest to slowest, as ``TensorIteratorBase::reorder_dimensions``."""
    if stride[a] == 0 or stride[b] == 0 or stride[a] == stride[b]:
        if stride[a] == stride[b] and stride[a] != 0 and size[a] != size[b]:
            return -1 if size[a] < size[b] else 1
        return b - a  # ambiguous: the later dimension is the faster one
    return -1 if stride[a] < stride[b] else 1


def _tensors(args: Sequence[Any]) -> Iterator[torch.Tensor]:
    for a in args:
        if isinstance(a, torch.Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from _tensors(a)
