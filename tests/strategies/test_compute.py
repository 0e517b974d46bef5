"""Precision, layout and attention: where they apply, what they touch, what comes back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from tests.strategies.described import ADA, decoding, described

from pipefit.cost_models.machine import Gpu
from pipefit.strategies import strategy

PRECISION = strategy("precision")
LAYOUT = strategy("channels_last")
ATTENTION = strategy("attention")


def gpu(architecture: str, capability: tuple[int, int] | None = None) -> Gpu:
    return Gpu(
        name="g",
        architecture=architecture,
        compute_capability=capability,
        total_bytes=1 << 33,
        free_bytes=1 << 33,
    )


def t5() -> Any:
    config = transformers.T5Config(
        d_model=16, d_ff=16, d_kv=4, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config)


def unet() -> Any:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
    )


def flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )


def applied(one: Any, module: Any, parameters: dict[str, Any]) -> Any:
    return one.apply(SimpleNamespace(part=module), "part", parameters, "cpu")


def dtypes(module: Any) -> dict[str, str]:
    return {path: str(one.dtype) for path, one in module.named_parameters()}


@pytest.mark.parametrize(
    ("build", "dtype", "kept"),
    [
        (t5, "float16", ("wo",)),
        (t5, "bfloat16", ()),
        (
            lambda: diffusers.WanTransformer3DModel(
                num_attention_heads=2, attention_head_dim=12, num_layers=1, ffn_dim=16, text_dim=16
            ),
            "bfloat16",
            ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"),
        ),
    ],
)
def test_a_cast_keeps_in_float32_what_a_load_keeps(
    build: Any, dtype: str, kept: tuple[str, ...]
) -> None:
    module = build()
    before = {path: one.clone() for path, one in module.named_parameters()}
    undo = applied(PRECISION, module, {"dtype": dtype})
    for path, now in dtypes(module).items():
        stays = any(name in path.split(".") for name in kept)
        assert now == ("torch.float32" if stays else f"torch.{dtype}"), path
    undo()
    assert all(torch.equal(one, before[path]) for path, one in module.named_parameters())


def test_the_cast_agrees_with_what_loading_does(tmp_path: Any) -> None:
    module = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=1, ffn_dim=16, text_dim=16
    )
    module.save_pretrained(tmp_path)
    loaded = diffusers.WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.float16)
    applied(PRECISION, module, {"dtype": "float16"})
    assert dtypes(module) == dtypes(loaded)


@pytest.mark.parametrize(("chip", "dtype"), [(ADA, "bfloat16"), (gpu("turing", (7, 5)), "float16")])
def test_float32_weights_are_offered_the_16_bits_that_the_gpu_computes_in(
    chip: Gpu, dtype: str
) -> None:
    component = described(t5())
    assert PRECISION.options(component, decoding(component), chip) == ({"dtype": dtype},)
    component = described(t5().bfloat16())
    assert PRECISION.options(component, decoding(component), chip) == ()


def test_an_autoencoder_that_overflows_is_cast_with_the_rest() -> None:
    """Its pipeline casts it back for each picture if it is in float16, and gives it what the
    denoiser makes, in float16, if it is not."""
    component = described(diffusers.AutoencoderKL(block_out_channels=(32,), force_upcast=True))
    offered = PRECISION.options(component, decoding(component), gpu("turing", (7, 5)))
    assert offered == ({"dtype": "float16"},)


def test_layout_is_offered_where_convolutions_are_a_good_part_and_2d() -> None:
    offered = {}
    for build in (unet, flux, t5):
        component = described(build())
        offered[component.class_name] = LAYOUT.options(component, decoding(component), ADA)
    with torch.device("meta"):
        component = described(diffusers.AutoencoderKLWan())
    offered[component.class_name] = LAYOUT.options(component, decoding(component), ADA)
    assert offered == {
        "UNet2DConditionModel": ({},),
        "FluxTransformer2DModel": (),
        "T5EncoderModel": (),
        "AutoencoderKLWan": (),
    }


def test_layout_comes_back_stride_by_stride_also_for_1x1_kernels() -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 1), torch.nn.Conv2d(4, 8, 3))
    before = [one.stride() for one in module.parameters()]
    undo = applied(LAYOUT, module, {})
    assert module[1].weight.is_contiguous(memory_format=torch.channels_last)
    assert [one.stride() for one in module.parameters()] != before
    undo()
    assert [one.stride() for one in module.parameters()] == before


def test_a_backend_is_named_in_one_model_and_not_in_the_process() -> None:
    module, other = flux(), flux()
    default = _AttentionBackendRegistry._active_backend
    undo = applied(ATTENTION, module, {"backend": "efficient"})
    backends = {part.processor._attention_backend for part in _attentions(module)}
    assert {str(one.value) for one in backends} == {"_native_efficient"}
    assert _AttentionBackendRegistry._active_backend is default
    assert {part.processor._attention_backend for part in _attentions(other)} == {None}
    undo()
    assert {part.processor._attention_backend for part in _attentions(module)} == {None}
    # It was the class that said so.
    assert not any("_attention_backend" in vars(part.processor) for part in _attentions(module))


@pytest.mark.parametrize("parameters", [{"slicing": 1}, {"slicing": "auto"}, {"backend": "math"}])
def test_a_unet_gets_its_own_processors_back(parameters: dict[str, Any]) -> None:
    module = unet()
    before = dict(module.attn_processors)
    undo = applied(ATTENTION, module, parameters)
    changed = {type(one).__name__ for one in module.attn_processors.values()}
    assert changed == {"SlicedAttnProcessor" if "slicing" in parameters else "AttnProcessor"}
    undo()
    assert all(module.attn_processors[path] is one for path, one in before.items())


@pytest.mark.parametrize(
    ("build", "parameters", "message"),
    [
        (unet, {"backend": "flash"}, "chooses its kernel itself"),
        (unet, {"backend": "fast"}, "is one of native"),
        (unet, {"backend": "math", "slicing": 1}, "either backend or slicing"),
        (unet, {"slicing": 0}, "auto, max or a number"),
        (flux, {"slicing": 1}, "cannot compute attention in slices"),
        (t5, {"backend": "math"}, "no attention that diffusers could exchange"),
    ],
)
def test_attention_that_a_model_cannot_have_is_refused(
    build: Any, parameters: dict[str, Any], message: str
) -> None:
    assert message in str(ATTENTION.refusal(described(build()), parameters))


def test_xformers_is_refused_with_its_install_command_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for build in (unet, flux):
        refusal = ATTENTION.refusal(described(build()), {"backend": "xformers"})
        assert "pip install xformers" in str(refusal)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert ATTENTION.refusal(described(unet()), {"backend": "xformers"}) is None


@pytest.mark.parametrize(
    ("build", "chip", "expected"),
    [
        (unet, ADA, []),
        (unet, gpu("apple"), [{"slicing": "auto"}, {"slicing": "max"}]),
        (flux, gpu("apple"), []),
        (flux, ADA, []),
        (flux, gpu("hopper", (9, 0)), [{"backend": "cudnn"}]),
    ],
)
def test_attention_is_offered_only_where_torch_does_not_choose_better(
    build: Any, chip: Gpu, expected: list[dict[str, Any]]
) -> None:
    component = described(build())
    assert list(ATTENTION.options(component, decoding(component), chip)) == expected


def _attentions(module: Any) -> list[Any]:
    return [part for part in module.modules() if hasattr(part, "processor")]
