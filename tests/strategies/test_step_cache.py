"""Step caches: what is skipped, what is kept and for how long, and undoing."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.hooks import TaylorSeerCacheConfig, taylorseer_cache
from tests.end_to_end.small_runs import untouched
from tests.small_pipelines import picture, small_call

from pipefit import predict
from pipefit.cost_models.machine import Gpu
from pipefit.errors import InvalidRequest, PipefitError, UnsupportedPipeline
from pipefit.planner.apply import apply_options
from pipefit.planner.catalog import reference_machine
from pipefit.planner.rehearse import rehearse
from pipefit.planner.snapshot import differences, snapshot
from pipefit.strategies import strategy, traits_of
from pipefit.strategies.describe import describe_component
from pipefit.strategies.live import enters_cache_context, module_components
from pipefit.strategies.step_cache import UNPREDICTABLE
from pipefit.strategies.strategy import Option

CARD = Gpu(name="cpu", architecture="cpu", total_bytes=1 << 40, free_bytes=1 << 40)
"""A virtual GPU without the workspaces of libraries, next to which small pipelines are nothing."""
MACHINE = replace(reference_machine(["rtx-4060"]), gpus=(CARD,))

EVERY_THIRD = {"cache_interval": 3, "disable_cache_before_step": 2}
LITE = {**EVERY_THIRD, "use_lite_mode": True}
STEPS = {"num_inference_steps": 8}


def cached(parameters: Mapping[str, Any] = LITE, component: str = "transformer") -> Option:
    return Option(strategy="step_cache", component=component, parameters=parameters)


def described(module: Any) -> Any:
    return describe_component("c", module, traits_of(module))


def is_computed(step: int) -> bool:
    """As ``TaylorSeerCacheHook._measure_should_compute`` of diffusers 0.42.1."""
    return step < 2 or (step - 2 - 1) % 3 == 0


class Kernels:
    """Counts the calls of a module that a full step makes once."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.calls = 0
        self._handle = module.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def remove(self) -> None:
        self._handle.remove()


# -- what it does


def test_the_steps_that_the_cache_computes_are_the_ones_that_are_predicted() -> None:
    pipe, _ = untouched("flux")
    inner = pipe.transformer.transformer_blocks[0].ff
    with apply_options(pipe, [cached()], "cpu"):
        counted = Kernels(inner)
        try:
            picture(pipe, "flux", **STEPS)
        finally:
            counted.remove()
    assert counted.calls == sum(map(is_computed, range(8))) == 4

    call = {**small_call("flux"), **STEPS}
    full, less = (predict(pipe, o, call=call, machine=MACHINE) for o in ([], [cached()]))
    seconds = [
        next(p.seconds for p in one.phases if p.name == "denoise") / 8 for one in (full, less)
    ]
    # What a step does outside its blocks is done in every step.
    assert 4 / 8 < seconds[1] / seconds[0] < 6 / 8


@pytest.mark.parametrize("name", ["flux", "cogvideox", "wan"])
def test_what_is_kept_between_steps_is_counted(name: str) -> None:
    pipe, _ = untouched(name)
    call = {**small_call(name), **STEPS}
    about = described(pipe.transformer)
    found = []
    for parameters in (LITE, EVERY_THIRD):
        if strategy("step_cache").refusal(about, parameters) is not None:
            continue
        predicted = predict(pipe, [cached(parameters)], call=call, machine=MACHINE)
        rehearsed = rehearse(pipe, predicted.options, {**call, "num_inference_steps": 3}, CARD)
        for phase, other in zip(predicted.phases, rehearsed.phases, strict=True):
            assert other.allocated_bytes == pytest.approx(phase.allocated_bytes, rel=0.02)
        found += [p.carried_bytes for p in predicted.phases if p.name == "denoise"]
    plain = predict(pipe, call=call, machine=MACHINE)
    (carried,) = {p.carried_bytes for p in plain.phases if p.name == "denoise"}
    assert all(one > carried for one in found)
    assert found == sorted(found)


# -- one call after another


def test_two_calls_give_the_same_picture_and_it_is_another_one() -> None:
    pipe, _ = untouched("flux")
    before = snapshot(pipe, with_values=True)
    expected = picture(pipe, "flux", **STEPS)
    with apply_options(pipe, [cached()], "cpu"):
        first = picture(pipe, "flux", **STEPS)
        assert torch.equal(picture(pipe, "flux", **STEPS), first)
        assert not torch.equal(first, expected)
    assert differences(before, snapshot(pipe, with_values=True)) == ()
    assert torch.equal(picture(pipe, "flux", **STEPS), expected)


@pytest.mark.parametrize("parameters", [LITE, EVERY_THIRD], ids=["lite", "attentions"])
def test_a_call_after_an_interrupted_one_begins_anew(parameters: Mapping[str, Any]) -> None:
    pipe, _ = untouched("flux")

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with apply_options(pipe, [cached(parameters)], "cpu"):
        first = picture(pipe, "flux", **STEPS)
        with pytest.raises(KeyboardInterrupt):
            picture(pipe, "flux", **STEPS, callback_on_step_end=stop)
        assert torch.equal(picture(pipe, "flux", **STEPS), first)


def test_undoing_leaves_nothing_behind() -> None:
    pipe, _ = untouched("wan_two_experts")
    states = [dict(vars(part)) for part in (pipe.scheduler, pipe.transformer, pipe.transformer_2)]
    signature = inspect.signature(pipe.scheduler.set_timesteps)
    applied = apply_options(pipe, [cached(), cached(component="transformer_2")], "cpu")
    assert pipe.transformer.is_cache_enabled
    assert inspect.signature(pipe.scheduler.set_timesteps) == signature
    other = copy.deepcopy(pipe.scheduler)
    other.set_timesteps(3)
    assert len(other.timesteps) == 3 != len(pipe.scheduler.timesteps)
    applied.undo()
    assert not pipe.transformer.is_cache_enabled
    for part, state in zip(
        (pipe.scheduler, pipe.transformer, pipe.transformer_2), states, strict=True
    ):
        assert {k: id(v) for k, v in vars(part).items()} == {k: id(v) for k, v in state.items()}


# -- where it does not go


def test_the_other_caches_are_refused_each_with_its_reason() -> None:
    about = described(untouched("flux")[0].transformer)
    one = strategy("step_cache")
    for kind in UNPREDICTABLE:
        assert f"step_cache:type={kind} is not applied: " in str(one.refusal(about, {"type": kind}))
    assert "is taylorseer, but was 'tea'" in str(one.refusal(about, {"type": "tea"}))


@pytest.mark.parametrize(
    ("name", "component", "parameters", "says"),
    [
        ("flux", "vae", {}, "AutoencoderKL has no step cache"),
        ("stable_diffusion", "unet", {}, "UNet2DConditionModel has no step cache"),
        ("wan", "transformer", {}, "finds no attention in WanTransformer3DModel"),
        ("flux", "transformer", {"disable_cache_before_step": 0}, "at least 1, but was 0"),
        ("flux", "transformer", {"cache_interval": True}, "at least 1, but was True"),
        ("flux", "transformer", {"use_lite_mode": "yes"}, "is true or false"),
        ("flux", "transformer", {"threshold": 0.1}, "no parameter 'threshold'"),
    ],
)
def test_what_cannot_be_cached_is_refused(
    name: str, component: str, parameters: Mapping[str, Any], says: str
) -> None:
    pipe, _ = untouched(name)
    with pytest.raises(InvalidRequest, match=says):
        apply_options(pipe, [cached(parameters, component)], "cpu")


def test_a_pipeline_without_a_cache_context_is_refused() -> None:
    from diffusers import FluxImg2ImgPipeline

    pipe, _ = untouched("flux")
    other = FluxImg2ImgPipeline(**pipe.components)
    assert enters_cache_context(type(pipe))
    assert not enters_cache_context(type(other))
    before = snapshot(other)
    with pytest.raises(PipefitError, match="never enters a cache_context") as refused:
        apply_options(other, [cached()], "cpu")
    assert isinstance(refused.value.__cause__ or refused.value, UnsupportedPipeline)
    assert differences(before, snapshot(other)) == ()


def test_another_attention_on_a_cached_component_is_refused() -> None:
    pipe, _ = untouched("flux")
    math = Option(strategy="attention", component="transformer", parameters={"backend": "math"})
    with pytest.raises(InvalidRequest, match="depends on the calls before it"):
        predict(pipe, [cached(), math], call=small_call("flux"), machine=MACHINE)


def test_the_layers_that_are_counted_are_those_that_the_library_hooks() -> None:
    for name in ("flux", "stable_diffusion_3", "cogvideox", "wan"):
        module = untouched(name)[0].transformer
        traits = strategy("step_cache").traits(module)
        if not hasattr(module, "enable_cache"):
            assert set(traits.values()) == {0}
            continue
        for key, lite in (("taylorseer_attentions", False), ("taylorseer_projections", True)):
            module.enable_cache(TaylorSeerCacheConfig(use_lite_mode=lite))
            hooks = [
                part._diffusers_hook.get_hook(taylorseer_cache._TAYLORSEER_CACHE_HOOK)
                for part in module.modules()
                if hasattr(part, "_diffusers_hook")
            ]
            states = [
                hook.state_manager._init_kwargs["is_inactive"] for hook in hooks if hook is not None
            ]
            module.disable_cache()
            assert states.count(False) == traits[key]
            if lite:
                assert traits[key] == 1
                assert True in states


def test_only_modules_of_the_pipeline_that_can_be_cached_take_it() -> None:
    takers = {
        name: [
            component
            for component, module in module_components(untouched(name)[0]).items()
            if strategy("step_cache").refusal(described(module), LITE) is None
        ]
        for name in ("stable_diffusion_xl", "flux", "cogvideox", "wan_two_experts")
    }
    assert takers == {
        "stable_diffusion_xl": [],
        "flux": ["transformer"],
        "cogvideox": ["transformer"],
        "wan_two_experts": ["transformer", "transformer_2"],
    }
