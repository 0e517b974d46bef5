"""Joined projections: the same numbers, more weights, fewer launches, and an undo that frees."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from tests.small_pipelines import SMALL_PIPELINES, picture, small_call
from tests.strategies.described import described

from pipefit.cost_models.latency import launch_seconds
from pipefit.cost_models.placement import Resident
from pipefit.cost_models.prediction import Choice
from pipefit.planner.catalog import reference_machine
from pipefit.planner.policy import Policy
from pipefit.planner.pricing import Pricing
from pipefit.planner.workloads import observe
from pipefit.strategies import conflict_of, strategy
from pipefit.strategies.fused_qkv import FUSED_LAYERS
from pipefit.strategies.strategy import Option, Quality

FUSED = strategy("fused_qkv")
ADA = reference_machine(["rtx-4060"]).gpus[0]

DENOISERS = {
    "stable_diffusion_xl": "unet",
    "stable_diffusion_3": "transformer",
    "flux": "transformer",
    "wan": "transformer",
    "cogvideox": "transformer",
}


def _built(name: str) -> Any:
    torch.set_num_threads(1)
    pipe = SMALL_PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _state(module: Any) -> dict[str, Any]:
    """Return what is there before and after: modules, tensors, processors and flags."""
    return {
        path: (
            part,
            dict(part._modules),
            dict(part._parameters),
            getattr(part, "processor", None),
            vars(part).get("fused_projections", "absent"),
            vars(part).get("original_attn_processors", "absent"),
        )
        for path, part in module.named_modules()
    }


@pytest.mark.parametrize("name", DENOISERS)
def test_it_computes_the_same_bits_on_the_cpu_and_undo_takes_all_of_it_back(name: str) -> None:
    pipe, component = _built(name), DENOISERS[name]
    module = getattr(pipe, component)
    untouched, before = picture(pipe, name), _state(module)
    undo = FUSED.apply(pipe, component, {}, "cpu")
    joined = [part for path, part in module.named_modules() if path.endswith(FUSED_LAYERS)]
    calls: list[Any] = []
    hooks = [part.register_forward_hook(lambda *_: calls.append(1)) for part in joined]
    assert torch.equal(picture(pipe, name), untouched)
    assert len(calls) >= len(joined) > 0
    for hook in hooks:
        hook.remove()
    undo()
    assert _state(module) == before
    assert torch.equal(picture(pipe, name), untouched)


@pytest.mark.parametrize("name", DENOISERS)
def test_it_joins_what_the_library_joins(name: str) -> None:
    ours, theirs = (getattr(_built(name), DENOISERS[name]) for _ in range(2))
    generator = torch.get_rng_state()
    FUSED.apply(SimpleNamespace(part=ours), "part", {}, "cpu")
    assert torch.equal(torch.get_rng_state(), generator)
    theirs.fuse_qkv_projections()
    found, expected = ours.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    kinds = [[type(p) for p in one.attn_processors.values()] for one in (ours, theirs)]
    assert kinds[0] == kinds[1]


def test_what_the_user_has_joined_stays_joined() -> None:
    pipe = _built("flux")
    pipe.transformer.fuse_qkv_projections()
    before = _state(pipe.transformer)
    FUSED.apply(pipe, "transformer", {}, "cpu")()
    assert _state(pipe.transformer) == before


def test_attention_that_the_library_would_pass_over_is_refused() -> None:
    pipe = _built("stable_diffusion_xl_controlnet")
    assert FUSED.refusal(described(pipe.unet), {}) is None
    for part in (pipe.controlnet, pipe.text_encoder, torch.nn.Linear(2, 2)):
        assert "diffusers can join" in str(FUSED.refusal(described(part), {}))
    with torch.device("meta"):
        flux2 = diffusers.Flux2Transformer2DModel(
            num_layers=0, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
        )
    assert FUSED.refusal(described(flux2), {}) is not None


def test_projections_with_adapters_are_refused() -> None:
    from peft import LoraConfig

    unet = _built("stable_diffusion").unet
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    assert "plain" in str(FUSED.refusal(described(unet), {}))


def test_packed_weights_and_sliced_attention_rule_it_out() -> None:
    def why(name: str, **parameters: Any) -> str | None:
        return conflict_of(
            [Option(strategy="fused_qkv"), Option(strategy=name, parameters=parameters)]
        )

    assert "cannot be joined" in str(why("quantization", backend="torchao", type="int8"))
    assert "separate layers" in str(why("attention", slicing="auto"))
    assert why("attention", backend="native") is None
    assert why("layerwise_casting") is None


def test_joined_layers_are_cast_with_the_others() -> None:
    pipe = SimpleNamespace(transformer=_built("flux").transformer.bfloat16())
    FUSED.apply(pipe, "transformer", {}, "cpu")
    strategy("layerwise_casting").apply(pipe, "transformer", {}, "cpu")
    joined = [p for p in pipe.transformer.modules() if hasattr(p, "to_qkv")]
    assert {p.to_qkv.weight.dtype for p in joined} == {torch.float8_e4m3fn}


def _seen(*asked: str) -> Any:
    policy = Policy(
        budget_bytes={0: 8 << 30},
        quality=Quality.HIGH,
        required=tuple(Option(strategy=name, component="unet") for name in asked),
        forbidden=("precision",),
    )
    name = "stable_diffusion_xl"
    return observe(_built(name), small_call(name), gpu=ADA, policy=policy)


def test_it_is_offered_where_the_host_is_waited_for_and_predicted_to_win() -> None:
    plain, joined = _seen()  # a small model's kernels take less than their launches
    names = {o.component for o in joined.load_options if o.strategy == "fused_qkv"}
    assert "unet" in names
    (reason,) = [o.reason for o in joined.load_options if o.component == "unet"]
    assert "in one launch" in reason
    (phase,) = [p for p in plain.workload.phases if p.component == "unet"]

    def call_s(one: Any) -> float:
        pricing = Pricing(one.workload, ADA, load_options=one.load_options)
        choice = Choice(placement=Resident())
        return pricing.phase_seconds(phase, choice, "native", with_range=False)[0]

    before, after = (one.workload.component("unet") for one in (plain, joined))
    saved = before.traits["launches_saved_by_fused_qkv"]
    assert call_s(plain) - call_s(joined) == pytest.approx(
        saved * phase.num_calls * launch_seconds(ADA), rel=0.01
    )
    assert after.weight_bytes > before.weight_bytes
    cpu = replace(ADA, architecture="cpu")
    assert not FUSED.options(before, plain.workload, cpu)


def test_it_is_not_offered_where_what_is_asked_for_rules_it_out() -> None:
    name, quantised = "stable_diffusion_xl", {"backend": "torchao", "type": "int8_weight_only"}
    policy = Policy(
        budget_bytes={0: 8 << 30},
        quality=Quality.BALANCED,
        required=(Option(strategy="quantization", component="unet", parameters=quantised),),
        forbidden=("precision",),
    )
    (only,) = observe(_built(name), small_call(name), gpu=ADA, policy=policy)
    assert [(o.strategy, o.component) for o in only.load_options] == [("quantization", "unet")]


def test_where_it_is_asked_for_every_workload_has_it() -> None:
    (only,) = _seen("fused_qkv")
    assert [(o.strategy, o.component) for o in only.load_options] == [("fused_qkv", "unet")]
