"""A linear layer that holds its weight as a quantiser leaves it, without any values.

Its ``forward`` allocates what the library's allocates: the weight unpacked for one product, the
activations in 8 bits, the 32-bit sums. It runs the same operators where torch has them; one
``repeat`` of the packed bytes stands for a kernel of a library that unpacks a whole weight. Results
mean nothing, so this exists on the weightless twin of a pipeline only.

Sources: the ``linear`` of ``Int8Tensor``, ``Float8Tensor`` and ``Int4TilePackedTo4dTensor`` in
torchao 0.18, ``MatMul8bitLt`` and ``MatMul4Bit`` in bitsandbytes 0.50, ``qbytes_mm`` in
optimum-quanto 0.2.7, ``GGUFLinear`` in diffusers 0.42.1. Not imitated: kernels that multiply with
the packed weight in one go and only pay for few tokens (bitsandbytes' ``gemm_4bit``, quanto's
Marlin), and the columns with outliers that bitsandbytes' int8 multiplies apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipefit.cost_models.storage import (
    FLOAT6,
    GGUF_TYPES,
    INT4_GROUP_SIZE,
    TILE_OUTPUTS,
    TILE_WORD_INPUTS,
    StoredTensor,
)

BNB_OUTLIER = 6.0
"""``llm_int8_threshold``: activations above it are multiplied in 16 bits."""
FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max
INT8_MAX = 127
WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32}


class QuantizedLinear(nn.Linear):
    """Takes the place of *linear*; ``stored`` are the tensors that hold its weight."""

    def __init__(
        self, linear: nn.Linear, stored: Sequence[StoredTensor], backend: str, type_: str
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.backend, self.type = backend, type_
        self.weight_dtype = linear.weight.dtype
        self.register_parameter("bias", linear.bias)
        self.dtypes: dict[str, torch.dtype] = {}
        for tensor in stored:
            name = "_".join(filter(None, ("weight", tensor.name)))
            self.dtypes[name] = dtype = getattr(torch, tensor.dtype)
            # A model's dtype is that of its first floating-point parameter, which in reality is
            # never a scale or packed data: so they are kept as whole numbers of the same width.
            kept = WHOLE[dtype.itemsize] if dtype.is_floating_point else dtype
            data = linear.weight.new_empty(tensor.shape, dtype=kept)
            self._parameters[name] = nn.Parameter(data, requires_grad=False)
        if "weight" not in self._parameters:
            # Wrapper tensors say the dtype and shape of the weight that they stand for.
            self.__dict__["weight"] = torch.empty(
                linear.weight.shape, dtype=self.weight_dtype, device="meta"
            )
        if backend == "gguf":
            self.compute_dtype = self.weight_dtype  # models look for it where weights are bytes

    def forward(self, input: Tensor) -> Tensor:
        """Return a tensor of the right shape, having allocated what the library's would."""
        flat = input.reshape(-1, self.in_features)
        out = _FORWARD[self.backend, self.type](self, flat)
        return out.reshape(*input.shape[:-1], self.out_features)

    def stored(self, name: str) -> Any:
        """Return one of the tensors that hold the weight."""
        return self._parameters[name].view(self.dtypes[name])


def _unpacked(packed: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return what one kernel makes of *packed*: reads it, writes a whole weight."""
    times = -(-shape[0] * shape[1] * dtype.itemsize // packed.numel() // packed.element_size())
    out = packed.view(torch.uint8).reshape(-1).repeat(times)
    return out[: shape[0] * shape[1] * dtype.itemsize].view(dtype).view(shape)


def _plus(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out + bias


def _plus_(out: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        out += bias
    return out


# -- torchao


def _int8_weight_only(layer: QuantizedLinear, x: Tensor) -> Tensor:
    product = torch.mm(x, layer.stored("weight_qdata").t().to(x.dtype))
    out = product * layer.stored("weight_scale").to(x.dtype).flatten()
    return _plus_(out, layer.bias)


def _int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise activations row by row as ``Int8Tensor.from_hp`` does: in float32."""
    scale = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)).float() / INT8_MAX
    whole = torch.clamp(torch.round(x * (1.0 / scale)) + 0, -INT8_MAX - 1, INT8_MAX)
    return whole.to(torch.int8), scale


def _int8_dynamic(layer: QuantizedLinear, x: Tensor) -> Tensor:
    rows, scale = _int8_rows(x)

    def scaled_sums() -> Tensor:
        sums = torch._int_mm(rows, layer.stored("weight_qdata").t())
        return sums * scale

    scaled = scaled_sums().to(x.dtype)
    out = scaled * layer.stored("weight_scale").flatten()  # float32, as its scales are
    return _plus_(out, layer.bias).to(x.dtype)


def _float8_weight_only(layer: QuantizedLinear, x: Tensor) -> Tensor:
    def dequantized() -> Tensor:
        wide = layer.stored("weight_qdata").to(torch.float32)
        scaled = wide * layer.stored("weight_scale")
        return scaled.to(x.dtype)

    return _plus(torch.matmul(x, dequantized().t()), layer.bias)


def _float8_dynamic(layer: QuantizedLinear, x: Tensor) -> Tensor:
    per_row = layer.stored("weight_scale").shape[0] > 1
    amax = x.abs().amax(-1, keepdim=True) if per_row else x.abs().amax().reshape(1, 1)
    scale = amax.float() / FLOAT8_MAX

    def quantized() -> Tensor:
        scaled = x.to(torch.float32) / scale
        return torch.clamp(scaled, -FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)

    weight_scale = layer.stored("weight_scale").t()
    weight = layer.stored("weight_qdata").t()
    return torch._scaled_mm(
        quantized(), weight, scale, weight_scale, bias=layer.bias, out_dtype=x.dtype
    )


def _int4_tiles(layer: QuantizedLinear, x: Tensor) -> Tensor:
    packed, scales = layer.stored("weight_qdata"), layer.stored("weight_scale_and_zero")
    padding = packed.shape[1] * TILE_WORD_INPUTS - x.shape[1]
    rows = F.pad(x.to(torch.bfloat16), (0, padding)) if padding else x.to(torch.bfloat16)
    out = _fused(rows, scales, packed.shape[0] * TILE_OUTPUTS)
    return _plus_(out[:, : layer.out_features], layer.bias)


def _int4_dynamic(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """``IntxUnpackedToInt8Tensor``: both sides are dequantised for the product."""

    def activations() -> Tensor:
        rows, scale = _int8_rows(x)
        return (rows.to(torch.float32) * scale).to(x.dtype)

    def dequantized() -> Tensor:
        scale = layer.stored("weight_scale").unsqueeze(-1)
        whole = layer.stored("weight_qdata").view(*scale.shape[:2], -1).to(x.dtype)
        whole = whole - layer.stored("weight_zero_point").unsqueeze(-1).to(x.dtype)
        return (whole * scale).view(layer.out_features, layer.in_features)

    return F.linear(activations(), dequantized(), layer.bias)


def _float6(layer: QuantizedLinear, x: Tensor) -> Tensor:
    out = _fused(x.to(torch.float16), layer.stored("weight_scale"), layer.out_features)
    return _plus(out.to(x.dtype), layer.bias)


def _fused(x: Tensor, scales: Tensor, outputs: int) -> Tensor:
    """Return the product of a kernel that reads the packed weight: only its result is new."""
    weight = scales.reshape(-1)[:1].view(x.dtype)[:1].expand(x.shape[1], outputs)
    return torch.mm(x, weight)


# -- bitsandbytes


def _bnb_int8(layer: QuantizedLinear, x: Tensor) -> Tensor:
    def quantized() -> Tensor:
        half = x.to(torch.float16)
        rows = torch.empty_like(half, dtype=torch.int8)
        outliers = half.abs() >= BNB_OUTLIER
        outliers.any(dim=0)
        return rows.copy_(half)

    sums = torch._int_mm(quantized(), layer.stored("weight").t())
    half = _plus_(sums.to(torch.float16), layer.bias)
    return half.to(x.dtype)


def _bnb_4bit(layer: QuantizedLinear, x: Tensor) -> Tensor:
    def dequantized() -> Tensor:
        absmax = layer.stored("weight_absmax")
        if "weight_nested_absmax" in layer._parameters:
            absmax = absmax.to(torch.float32)
            absmax = absmax + layer.stored("weight_offset")
        shape = (layer.out_features, layer.in_features)
        return _unpacked(layer.stored("weight"), shape, layer.weight_dtype)

    return F.linear(x.to(layer.weight_dtype), dequantized(), layer.bias).to(x.dtype)


# -- quanto


def _quanto_bytes(layer: QuantizedLinear, x: Tensor) -> Tensor:
    def product() -> Tensor:
        weight, scale = layer.stored("weight_data"), layer.stored("weight_scale")
        if weight.is_floating_point():
            weight = weight.to(scale.dtype)
        weight = scale * weight
        return torch.matmul(x.to(scale.dtype), weight.t())

    return _plus(product(), layer.bias)


def _quanto_int4(layer: QuantizedLinear, x: Tensor) -> Tensor:
    scales = layer.stored("weight_scale_shift")
    if layer.in_features // scales.shape[0] == INT4_GROUP_SIZE and x.dtype == torch.bfloat16:
        return _plus(_fused(x, scales, layer.out_features), layer.bias)
    shape = (layer.out_features, layer.in_features)
    # Two values a byte, then the shift off them, then the scale on them.
    whole = _unpacked(layer.stored("weight_data"), shape, torch.uint8)
    weight = (whole - scales.reshape(-1)[:1]) * scales.reshape(-1)[:1]
    return F.linear(x, weight, layer.bias)


# -- gguf


def _gguf(layer: QuantizedLinear, x: Tensor) -> Tensor:
    def dequantized() -> Tensor:
        return _gguf_dequantized(layer.stored("weight"), layer.type)

    weight = dequantized().view(layer.out_features, layer.in_features).to(layer.weight_dtype)
    return F.linear(x, weight, layer.bias)


def _gguf_dequantized(packed: Tensor, type_: str) -> Tensor:
    """Take blocks apart in torch operators, one after the other, as diffusers does."""
    kind = GGUF_TYPES[type_]
    blocks = packed.view(-1, kind.num_bytes)
    scale = blocks[:, :2].view(torch.float16)
    low = blocks[:, kind.num_bytes - kind.elements * kind.low_bits // 8 :]
    if kind.low_bits == 8:
        return scale * low.view(torch.int8)
    # Names as in diffusers, where what they stand for lives until the weight is done.
    scales = packed.new_empty(blocks.shape[0] * kind.scale_bytes)
    ql = _bits(low, kind.low_bits)
    whole = ql
    if kind.high_bits:
        high = blocks[:, : kind.elements * kind.high_bits // 8]
        if kind.wide_high:
            words = high.to(torch.int32)[:, :1] >> _shifts(packed, torch.int32, 1, kind.elements)
            qh = (words & 1).to(torch.uint8)
            del words
        else:
            qh = _bits(high, kind.high_bits)
        whole = ql | (qh << kind.low_bits)
    if kind.is_signed:
        whole = whole.to(torch.int8) - (1 << (kind.low_bits + kind.high_bits - 1))
    out = scale * whole
    if kind.has_minimum:
        out = out - scale
    del scales
    return out


def _bits(packed: Tensor, bits: int) -> Tensor:
    apart = packed.unsqueeze(-1) >> _shifts(packed, torch.uint8, bits, 8 // bits)
    return (apart & ((1 << bits) - 1)).reshape(packed.shape[0], -1)


def _shifts(like: Tensor, dtype: torch.dtype, step: int, count: int) -> Tensor:
    return torch.arange(0, step * count, step, dtype=dtype, device=like.device)


_FORWARD: dict[tuple[str, str], Callable[[QuantizedLinear, Tensor], Tensor]] = {
    ("torchao", "int8_weight_only"): _int8_weight_only,
    ("torchao", "int8_dynamic_activation_int8_weight"): _int8_dynamic,
    ("torchao", "float8_weight_only"): _float8_weight_only,
    ("torchao", "float8_dynamic_activation_float8_weight"): _float8_dynamic,
    ("torchao", "int4_weight_only"): _int4_tiles,
    ("torchao", "int8_dynamic_activation_int4_weight"): _int4_dynamic,
    ("torchao", FLOAT6): _float6,
    ("bitsandbytes", "int8"): _bnb_int8,
    ("bitsandbytes", "nf4"): _bnb_4bit,
    ("bitsandbytes", "fp4"): _bnb_4bit,
    ("quanto", "int8"): _quanto_bytes,
    ("quanto", "float8"): _quanto_bytes,
    ("quanto", "int4"): _quanto_int4,
    **{("gguf", block): _gguf for block in GGUF_TYPES},
}
