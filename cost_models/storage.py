"""How a linear layer's weight lies in memory once a library has quantised it.

``bytes = data + scales (+ zero points, tables)``. Data is a few bits an element; what is forgotten
in every rule of thumb are the scales, which cost 1 to 13 % more, and padding: torchao's 4-bit
kernel wants a multiple of 1024 inputs. Biases, embeddings, norms and convolutions stay as they are.

Sources, unless a constant says otherwise: the tensors that ``quantize_`` of torchao 0.18,
``Linear4bit`` and ``Linear8bitLt`` of bitsandbytes 0.50, ``QLinear.freeze`` of optimum-quanto 0.2.7
and gguf 0.19 make of a layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipefit.cost_models.units import DTYPE_BYTES

BNB_BLOCK_ELEMENTS = 64
"""Weights that share a scale in bitsandbytes' 4-bit types (``Params4bit``, ``blocksize``)."""
BNB_NESTED_BLOCK_ELEMENTS = 256
"""Scales that share a scale where they are quantised too (``compress_statistics``)."""

TILE_INPUTS = 1024
TILE_OUTPUTS = 8
"""torchao pads a weight to these for ``_weight_int4pack_mm``
(quantize_/workflows/int4/int4_tile_packed_to_4d_tensor.py)."""
TILE_WORD_INPUTS = 128
"""Inputs to one step of the second dimension of a weight that is packed so."""

INT4_GROUP_SIZE = 128
"""Inputs that share a scale: default of ``Int4WeightOnlyConfig``, and the size that quanto tries
first (``QModuleMixin``)."""
INT4_DYNAMIC_GROUP_SIZE = 32
"""Default of ``Int8DynamicActivationIntxWeightConfig``'s weights."""
QUANTO_GROUP_STEP = 32
"""quanto lowers its group size in these steps until it divides the inputs."""

FLOAT6_INPUTS, FLOAT6_OUTPUTS = 64, 256
"""``fpx_weight_only`` leaves a layer alone whose inputs and outputs are no multiples of these
(quantization/quant_api.py, torchao 0.7)."""


QUANTISED_ON_GPU = ("bitsandbytes",)
"""Backends whose loaders put a component onto the GPU to quantise it, where no device map is given.

``update_device_map`` in quantizers/bitsandbytes/bnb_quantizer.py of diffusers 0.42.1 and in
quantizers/quantizer_bnb_4bit.py and _8bit.py of transformers 5; torchao's, quanto's and GGUF's
quantizers there leave the map alone, and the component on the host.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor that takes part in storing a weight."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes asked of the allocator."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufType:
    """One of ggml's block formats: ``num_bytes`` store ``elements``."""

    elements: int
    num_bytes: int
    low_bits: int
    """Bits of an element that lie together, packed into bytes."""
    high_bits: int = 0
    """Bits of it that lie elsewhere in the block."""
    wide_high: bool = False
    """The high bits of a block are one 32-bit word."""
    is_signed: bool = False
    """A constant is taken off each element."""
    has_minimum: bool = False
    """Elements count from a minimum of their own group."""
    scale_bytes: int = 0
    """What the scales of a block's groups take while it is dequantised."""


GGUF_TYPES: Mapping[str, GgufType] = {
    "Q4_0": GgufType(elements=32, num_bytes=18, low_bits=4, is_signed=True),
    "Q4_1": GgufType(elements=32, num_bytes=20, low_bits=4, has_minimum=True),
    "Q5_0": GgufType(
        elements=32, num_bytes=22, low_bits=4, high_bits=1, wide_high=True, is_signed=True
    ),
    "Q5_1": GgufType(
        elements=32, num_bytes=24, low_bits=4, high_bits=1, wide_high=True, has_minimum=True
    ),
    "Q8_0": GgufType(elements=32, num_bytes=34, low_bits=8),
    "Q2_K": GgufType(elements=256, num_bytes=84, low_bits=2, has_minimum=True, scale_bytes=64),
    "Q3_K": GgufType(
        elements=256, num_bytes=110, low_bits=2, high_bits=1, is_signed=True, scale_bytes=80
    ),
    "Q4_K": GgufType(elements=256, num_bytes=144, low_bits=4, has_minimum=True, scale_bytes=48),
    "Q5_K": GgufType(
        elements=256, num_bytes=176, low_bits=4, high_bits=1, has_minimum=True, scale_bytes=48
    ),
    "Q6_K": GgufType(
        elements=256, num_bytes=210, low_bits=4, high_bits=2, is_signed=True, scale_bytes=32
    ),
}
"""Source: ``GGML_QUANT_SIZES`` of gguf 0.19, and how diffusers 0.42.1 takes blocks apart
(quantizers/gguf/utils.py). F16 and F32 tensors of a file become ordinary ones."""

GGUF_FILES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    **{name: (name, {}) for name in ("Q4_1", "Q5_1", "Q8_0", "Q6_K")},
    "Q4_0": ("Q4_0", {"down": "Q4_1"}),
    "Q5_0": ("Q5_0", {"down": "Q5_1"}),
    "Q2_K": ("Q2_K", {"value": "Q3_K"}),
    "Q3_K_S": ("Q3_K", {}),
    "Q3_K_M": ("Q3_K", {"value": "Q4_K", "qkv": "Q4_K", "down": "Q4_K"}),
    "Q3_K_L": ("Q3_K", {"value": "Q5_K", "qkv": "Q4_K", "down": "Q5_K"}),
    "Q4_K_S": ("Q4_K", {"down": "Q5_K"}),
    "Q4_K_M": ("Q4_K", {"value": "Q6_K", "qkv": "Q5_K", "down": "Q6_K"}),
    "Q5_K_S": ("Q5_K", {}),
    "Q5_K_M": ("Q5_K", {"value": "Q6_K", "qkv": "Q6_K", "down": "Q6_K"}),
    "F16": ("F16", {}),
}
"""Type of a file -> the type of its weights, and the types of some that are stored better.

Source: ``img_tensor_get_type`` in tools/lcpp.patch of https://github.com/city96/ComfyUI-GGUF, with
which the common files for diffusion models are made. The first two value projections of Q3_K_M and
the first four of Q4_K_S, one step better still, are not told apart, and files whose makers chose
other types weigh otherwise.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufNames:
    """Which layers of a class that patch treats apart: patterns on diffusers' paths.

    What is one tensor in the file (a fused qkv) are several layers here.
    """

    kept: str = ""
    """At the start of a path: stays in 16 bits."""
    qkv: str = ""
    """At the end, like the others: attn.qkv, attention.qkv or attn_qkv in the file."""
    value: str = ""
    """.to_v, .v, .attn.w1v or .attn.w2v in the file."""
    down: str = ""
    """.ffn.2, .ff.net.2, .feed_forward.w2 or an expert's .w2 in the file."""


_FUSED = r"^transformer_blocks\.\d+\.attn2?\.(to_[qkv]|add_[qkv]_proj)"
_FLUX_KEPT = "(x_embedder|context_embedder|time_text_embed|norm_out|proj_out)"

GGUF_NAMES: Mapping[str, GgufNames] = {
    "FluxTransformer2DModel": GgufNames(kept=_FLUX_KEPT, qkv=_FUSED),
    "ChromaTransformer2DModel": GgufNames(kept=_FLUX_KEPT, qkv=_FUSED),
    "HunyuanVideoTransformer3DModel": GgufNames(kept=_FLUX_KEPT, qkv=_FUSED),
    "SD3Transformer2DModel": GgufNames(kept=_FLUX_KEPT, qkv=_FUSED),
    "ZImageTransformer2DModel": GgufNames(
        kept="(all_x_embedder|all_final_layer|t_embedder|cap_embedder|.*_refiner)",
        qkv=r"attention\.to_[qkv]",
        down=r"feed_forward\.w2",
    ),
    "Lumina2Transformer2DModel": GgufNames(
        kept="(x_embedder|norm_out|time_caption_embed|.*_refiner)",
        qkv=r"attn\.to_[qkv]",
        down=r"feed_forward\.linear_2",
    ),
    "WanTransformer3DModel": GgufNames(
        kept="(condition_embedder|proj_out)", value=r"attn[12]\.to_v", down=r"ffn\.net\.2"
    ),
    "LTXVideoTransformer3DModel": GgufNames(
        kept="(proj_in|proj_out|time_embed|caption_projection)",
        value=r"attn[12]\.to_v",
        down=r"ff\.net\.2",
    ),
    "AuraFlowTransformer2DModel": GgufNames(
        kept="(pos_embed|time_step_proj|context_embedder|norm_out|proj_out)",
        value=r"attn\.(to_v|add_v_proj)",
    ),
    "HiDreamImageTransformer2DModel": GgufNames(
        kept="(p_embedder|t_embedder|x_embedder|final_layer|caption_projection)",
        value=r"attn1\.to_v",
        down=r"experts(\.\d+)?\.w2",
    ),
    "UNet2DConditionModel": GgufNames(
        kept="(class_embedding|time_embedding|add_embedding)",
        value=r"attn[12]\.to_v",
        down=r"ff\.net\.2",
    ),
}
"""Class of diffusers -> what the patch names; a class that is not here is stored in one type."""

GGUF_LEAST_ELEMENTS = 1024
"""Smaller tensors stay in float32 (``QUANTIZATION_THRESHOLD`` in tools/convert.py, at 8ccadf24)."""


def stored_weight(
    backend: str,
    type_: str,
    *,
    outputs: int,
    inputs: int,
    dtype: str,
    group_size: int | None = None,
    double_quant: bool = False,
    per_row: bool = False,
) -> tuple[StoredTensor, ...]:
    """Return the tensors that hold a weight of (*outputs*, *inputs*); none where it stays as it is.

    *dtype* is that of the weight before. For gguf, *type_* is a block format; :func:`gguf_type`
    finds a weight's.

    >>> sum(t.num_bytes for t in stored_weight("bitsandbytes", "nf4", outputs=64, inputs=64,
    ...                                        dtype="bfloat16"))
    2368
    """
    rows = (outputs, 1)
    if backend == "gguf":
        block = GGUF_TYPES.get(type_)
        if block is None or inputs % block.elements or outputs * inputs <= GGUF_LEAST_ELEMENTS:
            return ()
        return (_tensor("", (outputs, inputs // block.elements * block.num_bytes), "uint8"),)
    if backend == "bitsandbytes":
        if type_ == "int8":
            return (_tensor("", (outputs, inputs), "int8"), _tensor("scb", (outputs,), "float32"))
        return _bnb_4bit(outputs * inputs, double_quant)
    if backend == "quanto":
        if type_ == "int4":
            return _quanto_4bit(outputs, inputs, dtype)
        data = {"int8": "int8", "float8": "float8_e4m3fn"}[type_]
        return (_tensor("data", (outputs, inputs), data), _tensor("scale", rows, dtype))
    return _torchao(type_, outputs, inputs, dtype, group_size, rows if per_row else (1, 1))


def gguf_type(file_type: str, class_names: Iterable[str], path: str) -> str:
    """Return the block format of the weight of layer *path* in a file of *file_type*.

    >>> gguf_type("Q4_K_M", ["FluxTransformer2DModel"], "transformer_blocks.0.attn.to_k")
    'Q5_K'

    Returns:
        A key of :data:`GGUF_TYPES`; F16 where the weight keeps 16 bits.
    """
    names = next((GGUF_NAMES[one] for one in class_names if one in GGUF_NAMES), GgufNames())
    if names.kept and re.match(rf"{names.kept}(\.|$)", path):
        return "F16"
    plain, better = GGUF_FILES[file_type]
    for role, type_ in better.items():
        pattern = getattr(names, role)
        if pattern and re.search(rf"{pattern}$", path):
            return type_
    return plain


def stored_bits(backend: str, type_: str) -> int:
    """Return the bits of one stored element, scales left out; 8 and more look alike to quality."""
    if backend == "gguf":
        if type_ == "F16":
            return 16
        block = GGUF_TYPES[GGUF_FILES[type_][0]]
        return block.low_bits + block.high_bits
    if type_ == FLOAT6:
        return 6
    # int4 weights under int8 activations count as four, whatever they are stored in.
    four = ("nf4", "fp4", "int4", "int4_weight_only", "int8_dynamic_activation_int4_weight")
    return 4 if type_ in four else 8


FLOAT6 = "float6_e3m2_weight_only"
"""``fpx_weight_only(3, 2)``, which torchao had until 0.14."""

TYPES: Mapping[str, tuple[str, ...]] = {
    "torchao": (
        "int8_weight_only", "int8_dynamic_activation_int8_weight", "float8_weight_only",
        "float8_dynamic_activation_float8_weight", "int4_weight_only",
        "int8_dynamic_activation_int4_weight", FLOAT6,
    ),
    "bitsandbytes": ("int8", "nf4", "fp4"),
    "gguf": tuple(GGUF_FILES),
    "quanto": ("int8", "float8", "int4"),
}  # fmt: skip
"""Backend -> the types that are known. torchao's are its configurations' names in snake case."""


def _tensor(name: str, shape: tuple[int, ...], dtype: str) -> StoredTensor:
    return StoredTensor(name=name, shape=shape, dtype=dtype)


def _torchao(
    type_: str,
    outputs: int,
    inputs: int,
    dtype: str,
    group_size: int | None,
    dynamic_scale: tuple[int, int],
) -> tuple[StoredTensor, ...]:
    whole = (outputs, inputs)
    if type_ in ("int8_weight_only", "int8_dynamic_activation_int8_weight"):
        return (
            _tensor("qdata", whole, "int8"),
            _tensor("scale", (outputs, 1), "float32"),
            _tensor("zero_point", (outputs, 1), "int8"),
        )
    if type_ in ("float8_weight_only", "float8_dynamic_activation_float8_weight"):
        scale = (outputs, 1) if type_ == "float8_weight_only" else dynamic_scale
        return (_tensor("qdata", whole, "float8_e4m3fn"), _tensor("scale", scale, "float32"))
    if type_ == FLOAT6:
        if inputs % FLOAT6_INPUTS or outputs % FLOAT6_OUTPUTS:
            return ()
        packed = _tensor("qdata", (outputs, inputs // 4 * 3), "uint8")
        return (packed, _tensor("scale", (outputs,), "float16"))
    if type_ == "int8_dynamic_activation_int4_weight":
        group = group_size or INT4_DYNAMIC_GROUP_SIZE
        if inputs % group:
            return ()
        groups = (outputs, inputs // group)
        return (
            _tensor("qdata", whole, "int8"),
            _tensor("scale", groups, dtype),
            _tensor("zero_point", groups, "int8"),
        )
    group = group_size or INT4_GROUP_SIZE
    if inputs % group:
        return ()
    padded_inputs = math.ceil(inputs / TILE_INPUTS) * TILE_INPUTS
    padded_outputs = math.ceil(outputs / TILE_OUTPUTS) * TILE_OUTPUTS
    return (
        # Eight elements a 32-bit word, in the order in which the kernel's threads read them.
        _tensor("qdata", (padded_outputs // 8, padded_inputs // TILE_WORD_INPUTS, 32, 4), "int32"),
        _tensor("scale_and_zero", (padded_inputs // group, padded_outputs, 2), "bfloat16"),
    )


def _bnb_4bit(elements: int, double_quant: bool) -> tuple[StoredTensor, ...]:
    blocks = math.ceil(elements / BNB_BLOCK_ELEMENTS)
    data = _tensor("", (math.ceil(elements / 2), 1), "uint8")
    code = _tensor("code", (16,), "float32")
    if not double_quant:
        return (data, _tensor("absmax", (blocks,), "float32"), code)
    return (
        data,
        _tensor("absmax", (blocks,), "uint8"),
        code,
        _tensor("nested_absmax", (math.ceil(blocks / BNB_NESTED_BLOCK_ELEMENTS),), "float32"),
        _tensor("nested_code", (256,), "float32"),
        _tensor("offset", (1,), "float32"),
    )


def _quanto_4bit(outputs: int, inputs: int, dtype: str) -> tuple[StoredTensor, ...]:
    group = INT4_GROUP_SIZE
    while inputs % group and group > QUANTO_GROUP_STEP:
        group -= QUANTO_GROUP_STEP
    if inputs <= INT4_GROUP_SIZE or inputs % group:
        group = inputs
    # Scale and shift lie in one tensor where torch's own 4-bit kernel is used, in two elsewhere.
    return (
        _tensor("data", (outputs, math.ceil(inputs / 2)), "uint8"),
        _tensor("scale_shift", (inputs // group, outputs, 2), dtype),
    )
