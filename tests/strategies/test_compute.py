"""Precision, layout and attention: where they apply, what they touch, what comes back."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from tests.end_to_end.small_runs import untouched
from tests.small_pipelines import SMALL_PIPELINES, small_call
from tests.strategies.described import ADA, decoding, described

from pipefit import predict
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.workload import Component, Kernel, Workload
from pipefit.errors import InvalidRequest
from pipefit.planner.catalog import reference_machine
from pipefit.planner.rehearse import rehearse
from pipefit.strategies import strategy
from pipefit.strategies.attention import backend_name
from pipefit.strategies.strategy import Quality

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


def attending(component: Component, *, dtype: str, masked: bool = False) -> Workload:
    """Return a workload whose only kernel is an attention with heads of 40."""
    kernel = Kernel(
        kind="attention",
        name="aten._scaled_dot_product_efficient_attention",
        dtype=dtype,
        read_bytes=1,
        write_bytes=1,
        shape=(1, 2, 64, 64, 40, 40),
        masked=masked,
    )
    return replace(decoding(component), kernels=(kernel,))


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


@pytest.mark.parametrize(
    ("backend", "says"),
    [
        ("xformers", 'needs `pip install "xformers>='),
        ("sage", 'needs `pip install "sageattention>='),
        ("flash_attn", 'needs `pip install "flash-attn>='),
        ("flash_hub", "needs `pip install kernels`"),
        ("flash_3", "cannot be used here: .*build FA3"),
        ("npu", "needs `pip install torch_npu`"),
        ("flex", "only under torch.compile"),
    ],
)
def test_a_kernel_of_a_missing_package_is_refused_with_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, backend: str, says: str
) -> None:
    for package in ("XFORMERS", "SAGE", "FLASH"):
        monkeypatch.setattr(attention_dispatch, f"_CAN_USE_{package}_ATTN", False)
    monkeypatch.setattr(attention_dispatch, "is_kernels_available", lambda: False)
    refusal = ATTENTION.refusal(described(flux()), {"backend": backend})
    assert re.search(says, str(refusal))


@pytest.fixture
def _every_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let diffusers believe that they are installed; their kernels are not called in a trace."""
    for package in ("XFORMERS", "SAGE", "FLASH"):
        monkeypatch.setattr(attention_dispatch, f"_CAN_USE_{package}_ATTN", True)


@pytest.mark.usefixtures("_every_package")
@pytest.mark.parametrize("backend", ["xformers", "sage", "flash_attn", "flash_varlen"])
def test_a_package_kernel_is_traced_and_priced_and_rehearsed_without_the_package(
    backend: str,
) -> None:
    pipe = SMALL_PIPELINES["flux"]().to(torch.bfloat16)
    asked = [f"attention:backend={backend}@transformer"]
    machine = reference_machine(["rtx-4090"])
    call = small_call("flux")
    found = predict(pipe, asked, call=call, machine=machine)
    assert found.latency.call_s > 0
    rehearsed = rehearse(pipe, found.options, call, machine.gpus[0])
    for one, other in zip(rehearsed.phases, found.phases, strict=True):
        assert one.allocated_bytes == pytest.approx(other.allocated_bytes, rel=1e-3)
    assert {part.processor._attention_backend for part in _attentions(pipe.transformer)} == {None}


@pytest.mark.usefixtures("_every_package")
def test_xformers_is_traced_in_a_unet_too() -> None:
    pipe, _ = untouched("stable_diffusion")
    machine = reference_machine(["titan-rtx"])
    call = small_call("stable_diffusion")
    found = predict(pipe, ["attention:backend=xformers@unet"], call=call, machine=machine)
    native = predict(pipe, call=call, machine=machine)
    phase, without = (next(p for p in one.phases if p.name == "denoise") for one in (found, native))
    assert phase.allocated_bytes == pytest.approx(without.allocated_bytes, rel=0.05)


@pytest.mark.parametrize(
    ("backend", "dtype", "chip", "says"),
    [
        ("flash", "float32", ADA, "does not compute in float32"),
        ("cudnn", "float32", ADA, "does not compute in float32"),
        ("efficient", "float32", ADA, None),
        ("flash", "bfloat16", ADA, None),
        ("flash", "float16", gpu("turing", (7, 5)), "capability 8.0"),
        ("sage_qk_int8_pv_fp8_cuda", "bfloat16", ADA, "capability 9.0"),
        ("flash_3", "bfloat16", ADA, "capability 9.0"),
        ("sage_blackwell_hub", "bfloat16", gpu("blackwell", (12, 0)), "heads of 40"),
    ],
)
def test_what_a_backend_does_not_take_is_said_before_the_call(
    backend: str, dtype: str, chip: Gpu, says: str | None
) -> None:
    component = described(flux())
    workload = attending(component, dtype=dtype)
    found = ATTENTION.unfit(component, {"backend": backend}, workload, chip)
    assert found is None if says is None else says in str(found)


def test_a_mask_rules_out_what_takes_none() -> None:
    component = described(flux())
    workload = attending(component, dtype="bfloat16", masked=True)
    for backend, takes in (("flash", False), ("sage", False), ("cudnn", True), ("xformers", True)):
        found = ATTENTION.unfit(component, {"backend": backend}, workload, ADA)
        assert (found is None) == takes, backend
        assert found is None or "takes no mask" in found


def test_asking_for_what_the_call_rules_out_is_refused_before_it_is_traced() -> None:
    pipe, _ = untouched("flux")
    call, machine = small_call("flux"), reference_machine(["rtx-4090"])
    with pytest.raises(InvalidRequest, match="flash does not compute in float32"):
        predict(pipe, ["attention:backend=flash@transformer"], call=call, machine=machine)
    with pytest.raises(InvalidRequest, match="applies to no component"):
        predict(pipe, ["attention:backend=flash"], call=call, machine=machine)


def test_every_backend_that_diffusers_has_can_be_named() -> None:
    values = [one.value for one in attention_dispatch.AttentionBackendName]
    names = {backend_name(value) for value in values}
    assert len(names) == len(values)
    assert names == set(described(flux()).traits["attention_backends"])
    in_8_bits = {n for n in names if ATTENTION.quality_of({"backend": n}) is Quality.BALANCED}
    assert in_8_bits == {n for n in names if "sage" in n}


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
