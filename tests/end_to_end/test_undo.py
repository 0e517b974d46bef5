"""All or nothing: an apply that fails half-way, and pipelines that cannot be planned for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from tests.end_to_end.small_runs import untouched
from tests.small_pipelines import SMALL_PIPELINES, picture

from pipefit.errors import ApplyFailed, InvalidRequest, UnknownName, UnsupportedPipeline
from pipefit.planner.apply import apply_options, check_pipeline
from pipefit.planner.snapshot import differences, snapshot
from pipefit.strategies.live import module_components
from pipefit.strategies.strategy import Option

NAME = "stable_diffusion_xl"

EVERYTHING = [
    Option(strategy="precision", component="text_encoder", parameters={"dtype": "bfloat16"}),
    Option(strategy="layerwise_casting", component="unet"),
    Option(strategy="channels_last", component="unet"),
    Option(strategy="attention", component="unet", parameters={"backend": "math"}),
    Option(strategy="vae_slicing", component="vae"),
    Option(strategy="vae_tiling", component="vae", parameters={"tile_px": 32}),
    *(
        Option(
            strategy="group_offload",
            component=component,
            parameters={"offload_type": "leaf_level"},
        )
        for component in ("text_encoder", "text_encoder_2", "unet", "vae")
    ),
]


class Unplugged(torch.nn.Linear):
    """A layer that cannot be moved: the only thing here that is not a library's own."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(1, 1)
        self.error = error

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        raise self.error


def test_everything_at_once_is_undone_without_a_trace() -> None:
    pipe, expected = untouched(NAME)
    before = snapshot(pipe, with_values=True)
    applied = apply_options(pipe, EVERYTHING, "cpu")
    assert differences(before, snapshot(pipe))
    assert picture(pipe, NAME).shape == expected.shape
    applied.undo()
    applied.undo()
    assert differences(before, snapshot(pipe, with_values=True)) == ()
    assert torch.equal(picture(pipe, NAME), expected)


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2", "unet", "vae"])
@pytest.mark.parametrize(
    "strategy_name", ["resident", "group_offload", "model_offload", "sequential_offload"]
)
def test_a_failure_in_any_component_leaves_everything_as_it_was(
    component: str, strategy_name: str
) -> None:
    pipe = SMALL_PIPELINES[NAME]()
    getattr(pipe, component).unplugged = Unplugged(torch.OutOfMemoryError("no room"))
    before = snapshot(pipe, with_values=True)
    parameters = {"offload_type": "leaf_level"} if strategy_name == "group_offload" else {}
    placed = [None] if "l_offload" in strategy_name else list(module_components(pipe))
    options = [
        *EVERYTHING[1:6],
        *(Option(strategy=strategy_name, component=one, parameters=parameters) for one in placed),
    ]
    with pytest.raises(ApplyFailed, match="everything was undone") as failure:
        apply_options(pipe, options, "cpu")
    assert isinstance(failure.value.__cause__, torch.OutOfMemoryError)
    assert differences(before, snapshot(pipe, with_values=True)) == ()


def test_an_interruption_is_undone_and_passed_on() -> None:
    pipe = SMALL_PIPELINES[NAME]()
    pipe.unet.unplugged = Unplugged(KeyboardInterrupt())
    before = snapshot(pipe)
    with pytest.raises(KeyboardInterrupt):
        apply_options(pipe, [*EVERYTHING[1:6], Option(strategy="model_offload")], "cpu")
    assert differences(before, snapshot(pipe)) == ()


def test_an_interrupted_call_under_an_offload_is_undone_too() -> None:
    pipe, expected = untouched(NAME)

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    for options in ([Option(strategy="sequential_offload")], EVERYTHING[-4:]):
        before = snapshot(pipe, with_values=True)
        with pytest.raises(KeyboardInterrupt), apply_options(pipe, options, "cpu"):
            picture(pipe, NAME, callback_on_step_end=stop)
        assert differences(before, snapshot(pipe, with_values=True)) == ()
    assert torch.equal(picture(pipe, NAME), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([Option(strategy="resident")], "needs a component, as in resident@"),
        ([Option(strategy="model_offload", component="unet")], "leave @unet out"),
        (
            [Option(strategy="resident", component="unet"), Option(strategy="model_offload")],
            "both place the weights of unet",
        ),
        ([Option(strategy="channels_last", component="unet")] * 2, "asked for twice"),
        (
            [Option(strategy="vae_tiling", component="unet")],
            "vae_tiling cannot be used on unet: UNet2DConditionModel cannot work in tiles.",
        ),
    ],
)
def test_options_that_contradict_are_refused_before_anything_is_touched(
    options: list[Option], message: str
) -> None:
    pipe, _ = untouched(NAME)
    before = snapshot(pipe)
    with pytest.raises(InvalidRequest, match=message):
        apply_options(pipe, [*EVERYTHING[2:3], *options], "cpu")
    assert differences(before, snapshot(pipe)) == ()


def test_names_that_do_not_exist_get_the_closest_ones() -> None:
    pipe, _ = untouched(NAME)
    with pytest.raises(UnknownName, match="did you mean unet"):
        apply_options(pipe, [Option(strategy="resident", component="unett")], "cpu")
    with pytest.raises(UnknownName, match="did you mean group_offload"):
        apply_options(pipe, [Option(strategy="grup_offload", component="unet")], "cpu")


CARRIED: dict[str, tuple[Callable[[Any], object], str]] = {
    "model offload": (
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        r"CpuOffload on itself\): call pipe.remove_all_hooks\(\) first",
    ),
    "sequential offload": (
        lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"),
        r"AlignDevicesHook on itself\): call pipe.remove_all_hooks\(\) first",
    ),
    "group offload": (
        lambda pipe: pipe.unet.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type="leaf_level"
        ),
        r"unet already carries a hook \(group_offloading on .*undo the earlier plan",
    ),
    "layerwise casting": (
        lambda pipe: apply_layerwise_casting(pipe.unet, torch.float16, torch.float32),
        "layerwise_casting on .*load the pipeline afresh",
    ),
    "a compiled model": (lambda pipe: pipe.unet.compile(), "unet is compiled"),
    "a compiled block": (lambda pipe: pipe.unet.mid_block.compile(), "unet is compiled"),
    "a device map over a model": (
        lambda pipe: setattr(pipe.unet, "hf_device_map", {"down_blocks": 0, "up_blocks": "cpu"}),
        "unet was loaded with a device_map over several devices",
    ),
    "a device map over the pipeline": (
        lambda pipe: setattr(pipe, "hf_device_map", {"unet": 0, "vae": "cpu"}),
        "call pipe.reset_device_map",
    ),
    "quantised weights": (
        lambda pipe: setattr(pipe.unet, "is_quantized", True),
        "unet has quantised weights",
    ),
}


@pytest.mark.parametrize("carried", CARRIED)
def test_what_a_pipeline_already_carries_is_recognised(carried: str) -> None:
    pipe = SMALL_PIPELINES["stable_diffusion"]()
    assert check_pipeline(pipe) == ()
    load, message = CARRIED[carried]
    load(pipe)
    with pytest.raises(UnsupportedPipeline, match=message):
        check_pipeline(pipe)


def test_lora_adapters_are_kept_and_mentioned() -> None:
    pipe, _ = untouched("stable_diffusion")
    pipe.unet.peft_config = {"default": object()}
    try:
        assert check_pipeline(pipe) == (
            "unet has LoRA adapters; load, fuse or remove adapters before applying, not after.",
        )
    finally:
        del pipe.unet.peft_config


def test_only_diffusion_pipelines_with_loaded_weights_are_accepted() -> None:
    with pytest.raises(InvalidRequest, match="this is a Linear"):
        check_pipeline(torch.nn.Linear(1, 1))
    with accelerate.init_empty_weights():
        pipe = SMALL_PIPELINES["pixart_sigma"]()
    assert check_pipeline(pipe) == ()
    with pytest.raises(UnsupportedPipeline, match=r"The weights of .+ are not loaded"):
        apply_options(pipe, [], "cpu")
