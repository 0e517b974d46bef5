"""Layerwise casting: which weights it stores in 8 bits, and that undo gives the very same back."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from tests.strategies.described import ADA, decoding, described

from pipefit.cost_models.workload import Phase
from pipefit.strategies import BUILT_IN, strategy

CASTING = strategy("layerwise_casting")
FLOAT8 = torch.float8_e4m3fn


def flux() -> Any:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    ).bfloat16()


def t5() -> Any:
    config = transformers.T5Config(
        d_model=16, d_ff=16, d_kv=4, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config).bfloat16().eval()


def unet() -> Any:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
    ).half()


def pipe_of(module: Any) -> Any:
    return SimpleNamespace(part=module)


def dtypes(module: Any) -> dict[str, torch.dtype]:
    return {path: one.dtype for path, one in module.named_parameters()}


@pytest.mark.parametrize("build", [flux, t5, unet])
def test_undo_gives_back_the_very_weights_and_takes_the_hooks_off(build: Any) -> None:
    module = build()
    before = {path: one.clone() for path, one in module.named_parameters()}
    tensors = dict(module.named_parameters())
    undo = CASTING.apply(pipe_of(module), "part", {}, "cpu")
    assert FLOAT8 in dtypes(module).values()
    undo()
    for path, one in module.named_parameters():
        assert one is tensors[path]
        assert one.dtype == before[path].dtype
        assert torch.equal(one, before[path])
    assert not any("_diffusers_hook" in vars(part) for part in module.modules())
    assert not any("forward" in vars(part) for part in module.modules())


def test_the_library_s_own_choice_of_layers_is_followed() -> None:
    ours, theirs = flux(), flux()
    CASTING.apply(pipe_of(ours), "part", {"storage_dtype": "float8_e5m2"}, "cpu")
    theirs.enable_layerwise_casting(storage_dtype=torch.float8_e5m2, compute_dtype=torch.bfloat16)
    assert dtypes(ours) == dtypes(theirs)


def test_an_encoder_keeps_what_its_dtype_and_t5_s_wo_are_read_from() -> None:
    module = t5()
    CASTING.apply(pipe_of(module), "part", {}, "cpu")
    kept = {path for path, dtype in dtypes(module).items() if dtype != FLOAT8}
    assert {"shared.weight", "encoder.block.0.layer.1.DenseReluDense.wo.weight"} <= kept
    assert module.dtype == torch.bfloat16
    with torch.no_grad():
        assert module(torch.ones(1, 4, dtype=torch.long)).last_hidden_state.isfinite().all()


def test_a_head_that_is_tied_to_the_embedding_is_left_alone() -> None:
    config = transformers.Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
    )
    module = transformers.Qwen3ForCausalLM(config).bfloat16()
    CASTING.apply(pipe_of(module), "part", {}, "cpu")
    assert module.dtype == module.lm_head.weight.dtype == torch.bfloat16
    assert FLOAT8 in dtypes(module).values()


def test_an_autoencoder_that_is_cast_to_float32_and_back_is_refused() -> None:
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), force_upcast=True)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert "undoes the cast" in str(CASTING.refusal(described(vae.to(dtype)), {}))
    steady = diffusers.AutoencoderKL(block_out_channels=(32,), force_upcast=False)
    assert CASTING.refusal(described(steady), {}) is None


def test_a_failure_half_way_leaves_the_weights_as_they_were() -> None:
    module = t5()
    CASTING.apply(pipe_of(module), "part", {}, "cpu")
    before = dtypes(module)
    with pytest.raises(ValueError, match="already exists"):
        CASTING.apply(pipe_of(module), "part", {"storage_dtype": "float8_e5m2"}, "cpu")
    assert dtypes(module) == before


@pytest.mark.parametrize("build", [flux, t5, unet])
def test_the_twin_stores_what_the_hooks_store(build: Any) -> None:
    real, twin = build(), build()
    CASTING.apply(pipe_of(real), "part", {}, "cpu")
    CASTING.imitate(pipe_of(twin), "part", {})  # type: ignore[attr-defined]
    assert dtypes(twin) == dtypes(real)
    assert twin.dtype == real.dtype


def test_the_twin_computes_what_the_hooks_compute() -> None:
    real, twin = t5(), t5()
    twin.load_state_dict(real.state_dict())
    CASTING.apply(pipe_of(real), "part", {}, "cpu")
    CASTING.imitate(pipe_of(twin), "part", {})  # type: ignore[attr-defined]
    tokens = torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():
        assert torch.equal(real(tokens).last_hidden_state, twin(tokens).last_hidden_state)


def test_dtypes_that_no_layer_is_cast_to_are_refused() -> None:
    component = described(flux())
    assert CASTING.refusal(component, {"storage_dtype": "float8_e4m3fn"}) is None
    assert "one of float8_e4m3fn" in str(CASTING.refusal(component, {"storage_dtype": "int8"}))
    norm = described(torch.nn.LayerNorm(4))
    assert "no layer that could be stored" in str(CASTING.refusal(norm, {}))


def test_weights_beyond_the_largest_float8_are_counted_and_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = t5()
    with torch.no_grad():
        projection = module.encoder.block[0].layer[0].SelfAttention.q.weight
        projection[0, :3] = torch.tensor([448.0, 500.0, -1000.0])
        module.shared.weight[0, 0] = 10**4  # stays in 16 bits
    with caplog.at_level("WARNING"):
        undo = CASTING.apply(pipe_of(module), "part", {}, "cpu")
    (said,) = caplog.messages
    assert "clips 2 weights of part to 448" in said
    assert "the largest weight is 1000" in said
    assert projection[0, 1].float() == 448
    undo()
    assert projection[0, 1] == 500
    caplog.clear()
    CASTING.apply(pipe_of(module), "part", {"storage_dtype": "float8_e5m2"}, "cpu")()
    assert not caplog.messages


def test_an_adapter_that_was_there_before_keeps_its_dtype_and_works() -> None:
    from peft import LoraConfig

    torch.manual_seed(0)
    module = unet().float()
    module.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    call = (torch.randn(1, 4, 8, 8), 1, torch.randn(1, 4, 32))
    with torch.no_grad():
        before = module(*call).sample
        undo = CASTING.apply(pipe_of(module), "part", {}, "cpu")
        kept = {path for path, dtype in dtypes(module).items() if dtype != FLOAT8}
        assert any("lora_A" in path for path in dtypes(module))
        assert {path for path in dtypes(module) if "lora_" in path} <= kept
        assert any("to_q.base_layer" in path for path in dtypes(module).keys() - kept)
        cast = module(*call).sample
        undo()
        assert not torch.equal(cast, before)
        assert torch.equal(module(*call).sample, before)


def test_weights_are_cast_before_they_are_placed() -> None:
    names = [one.name for one in BUILT_IN]
    placing = [one.name for one in BUILT_IN if "placement" in one.kind]
    assert all(names.index("layerwise_casting") < names.index(name) for name in placing)


def test_it_is_offered_to_what_computes_by_forward_and_not_to_autoencoders() -> None:
    model, vae = described(flux()), described(diffusers.AutoencoderKL(block_out_channels=(32,)))
    assert list(CASTING.options(model, called(model, "forward"), ADA)) == [
        {"storage_dtype": "float8_e4m3fn"}
    ]
    assert not CASTING.options(vae, called(vae, "decode"), ADA)
    assert not CASTING.options(model, called(vae, "decode"), ADA)
    apple = replace(ADA, architecture="apple")
    assert not CASTING.options(model, called(model, "forward"), apple)
    cast = flux()
    CASTING.imitate(pipe_of(cast), "part", {})  # type: ignore[attr-defined]
    stored = described(cast)
    assert not CASTING.options(stored, called(stored, "forward"), ADA)


def called(component: Any, entry: str) -> Any:
    phase = Phase(name="denoise", component=component.name, entry=entry, calls=(0,))
    return replace(decoding(component), phases=(phase,))
