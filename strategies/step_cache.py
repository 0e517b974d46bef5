"""Skip parts of denoising steps and extrapolate what they would have said: diffusers' step caches.

Offered is the one cache whose skips do not depend on the picture: TaylorSeer, which computes by
counting steps. So the time can be known before, and a trace of the call under the cache shows
which step does what, and the tensors that are kept from one step to the next. Caches that compare
tensors skip more of one picture than of another; those are refused, with the reason.

What is easily got wrong: the caches count calls, and diffusers resets them only at the end of a
call that went well. Here the scheduler's ``set_timesteps``, with which every call begins, resets
them too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import MethodType
from typing import Any

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.workload import Component, Workload
from pipefit.errors import UnsupportedPipeline
from pipefit.strategies.live import (
    STEP_CACHE_ATTRIBUTES,
    attribute_restorer,
    enters_cache_context,
    hook_restorer,
    reset_step_cache,
    taylorseer_layers,
)
from pipefit.strategies.parameters import not_a_flag, unknown_parameter
from pipefit.strategies.strategy import Kind, Option, Quality, Undo

COUNTS = {"cache_interval": 1, "disable_cache_before_step": 1, "max_order": 0}
"""Numbers of ``TaylorSeerCacheConfig`` and the least that they may be: the first step of a call has
nothing to extrapolate from."""

UNPREDICTABLE = {
    "first_block_cache": "which steps it skips depends on the picture, so nobody knows its time",
    "sea_cache": "which steps it skips depends on the picture, so nobody knows its time",
    "mag_cache": "it needs ratios that are measured for each checkpoint (calibrate=True)",
    "pyramid_attention_broadcast": "it keeps one attention for prompt and negative prompt, which "
    "pipelines that call the model for each of them would mix up",
    "faster_cache": "it needs to be told how this pipeline batches its guidance",
    "text_kv_cache": "one model alone has it",
}
"""diffusers' other caches (0.42.1, ``diffusers.hooks``): why each is not applied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCache:
    """``component.enable_cache(TaylorSeerCacheConfig(...))``; parameters are the config's.

    Without ``use_lite_mode`` the outputs of all attentions are kept and extrapolated; with it only
    the model's last projection is, and blocks are not computed at all in the steps between.
    """

    name: str = "step_cache"
    kind: Kind = "load"
    quality: Quality = Quality.LOW

    def traits(self, module: Any) -> dict[str, Any]:
        """How many modules TaylorSeer would hook, in either mode."""
        can_cache = hasattr(module, "enable_cache")
        return {
            "taylorseer_attentions": taylorseer_layers(module, lite=False) if can_cache else 0,
            "taylorseer_projections": taylorseer_layers(module, lite=True) if can_cache else 0,
        }

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """None: a picture is changed visibly only where that is asked for by name."""
        return ()

    def refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """Other caches, models without any, and steps that have nothing to extrapolate from."""
        wrong = unknown_parameter(self.name, parameters, ("type", *COUNTS, "use_lite_mode"))
        wrong = wrong or not_a_flag(self.name, parameters, ("use_lite_mode",))
        if wrong:
            return wrong
        kind = parameters.get("type", "taylorseer")
        if kind in UNPREDICTABLE:
            return f"step_cache:type={kind} is not applied: {UNPREDICTABLE[kind]}; use taylorseer."
        if kind != "taylorseer":
            return f"step_cache:type is taylorseer, but was {kind!r}."
        for key, least in COUNTS.items():
            value = parameters.get(key, least)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                return f"step_cache:{key} is a number of at least {least}, but was {value!r}."
        name, traits = component.class_name, component.traits
        if not (traits.get("taylorseer_attentions") or traits.get("taylorseer_projections")):
            return f"{name} has no step cache in diffusers."
        if parameters.get("use_lite_mode"):
            if not traits.get("taylorseer_projections"):
                return f"{name} has no proj_out, which step_cache:use_lite_mode extrapolates."
        elif not traits.get("taylorseer_attentions"):
            return f"TaylorSeer finds no attention in {name}: use step_cache:use_lite_mode=true."
        return None

    def conflict(self, parameters: Mapping[str, Any], other: Option) -> str | None:
        """What computes otherwise is traced call by call, and these calls go by those before."""
        from pipefit.strategies import strategy

        if strategy(other.strategy).kind == "compute":
            return "what a call does under a cache depends on the calls before it."
        return None

    def placement(self, parameters: Mapping[str, Any]) -> None:
        """Weights stay where they are."""

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Enable the cache; undo disables it and puts the scheduler's method back."""
        from diffusers.hooks import TaylorSeerCacheConfig

        if not enters_cache_context(type(pipe)):
            raise UnsupportedPipeline(
                f"{type(pipe).__name__} never enters a cache_context, so that no cache could tell "
                "its calls apart: leave step_cache out."
            )
        module = getattr(pipe, str(component))
        given = {key: value for key, value in parameters.items() if key != "type"}
        with ExitStack() as undo:
            undo.callback(attribute_restorer(module, STEP_CACHE_ATTRIBUTES))
            undo.callback(hook_restorer(module))
            undo.callback(module.disable_cache)
            module.enable_cache(TaylorSeerCacheConfig(**given))
            for part in pipe.components.values():
                if hasattr(part, "set_timesteps"):
                    undo.callback(attribute_restorer(part, ("set_timesteps",)))
                    part.set_timesteps = _resetting(part, module)
            return undo.pop_all().close


def _resetting(scheduler: Any, module: Any) -> Callable[..., Any]:
    """Return the scheduler's ``set_timesteps``, with which a call begins, resetting the cache.

    A method, so that a copy of the scheduler has one of its own; pipelines make such copies, and
    ask for the signature.
    """
    original = scheduler.set_timesteps.__func__

    @functools.wraps(original)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        reset_step_cache(module)
        return original(self, *args, **kwargs)

    return MethodType(set_timesteps, scheduler)
