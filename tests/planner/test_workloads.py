"""What decides a trace is in the key by which a trace is found again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
from tests.small_pipelines import flux, small_call, stable_diffusion

from pipefit.errors import InvalidRequest, UnknownName
from pipefit.planner.api import _lower_levels
from pipefit.planner.catalog import reference_machine
from pipefit.planner.policy import Policy, parse_strategy_spec
from pipefit.planner.probe import cpu_machine
from pipefit.planner.workloads import _described, observe, state_digest
from pipefit.strategies import BUILT_IN
from pipefit.strategies.strategy import Quality

NAMES = [one.name for one in BUILT_IN]


def _halve_the_default_size(pipe: Any) -> None:
    pipe.vae_scale_factor //= 2


def _predict_velocity(pipe: Any) -> None:
    pipe.scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction")


def _work_in_parts(pipe: Any) -> None:
    for part in pipe.unet.modules():
        if hasattr(part, "set_chunk_feed_forward"):
            part.set_chunk_feed_forward(1)


@pytest.mark.parametrize(
    "change",
    [
        _halve_the_default_size,
        _predict_velocity,
        lambda pipe: pipe.vae.enable_tiling(),
        lambda pipe: pipe.vae.enable_slicing(),
        lambda pipe: pipe.unet.set_attention_slice(1),
        lambda pipe: pipe.unet.half(),
        _work_in_parts,
    ],
)
def test_a_pipeline_that_would_compute_otherwise_has_another_key(
    change: Callable[[Any], None],
) -> None:
    pipe = stable_diffusion()
    before = state_digest(pipe)
    assert state_digest(stable_diffusion()) == before
    change(pipe)
    assert state_digest(pipe) != before


def test_a_call_does_not_change_the_key() -> None:
    pipe = stable_diffusion()
    before = state_digest(pipe)
    pipe("a cube", height=64, width=64, num_inference_steps=1, output_type="latent")
    assert state_digest(pipe) == before


def test_arguments_inside_a_dictionary_are_told_apart() -> None:
    assert _described({"scale": 0.5}) != _described({"scale": 0.5, "gligen": [1, 2]})


def _observed(*specs: str, quality: Quality = Quality.LOW) -> list[Any]:
    """Observe a small pipeline on the CPU with *specs* required and nothing else chosen."""
    gpu = cpu_machine().gpus[0]
    required = tuple(
        option for spec in specs for option in parse_strategy_spec(spec, strategies=NAMES)
    )
    policy = Policy(budget_bytes={gpu.index: gpu.total_bytes}, quality=quality, required=required)
    return observe(flux(), small_call("flux"), gpu=gpu, policy=policy)


def _dtypes(workload: Any, component: str) -> set[str]:
    return {tensor.dtype for tensor in workload.component(component).tensors}


def test_what_is_asked_of_the_load_is_in_every_workload() -> None:
    seen = _observed("layerwise_casting@transformer", "quantization:backend=quanto,type=int8@vae")
    assert [len(one.load_options) for one in seen] == [2, 6]  # and with the casts that are open
    for one in seen:
        assert "float8_e4m3fn" in _dtypes(one.workload, "transformer")
        assert "int8" in _dtypes(one.workload, "vae")
    plain = _observed(quality=Quality.EXACT)[0]
    assert plain.load_options == ()
    assert plain.workload.fingerprint == seen[0].workload.fingerprint
    before, after = (one.workload.component("transformer") for one in (plain, seen[0]))
    assert after.weight_bytes < before.weight_bytes
    assert any(
        "of original weights of transformer" in note for note in seen[0].workload.assumptions
    )


@pytest.mark.parametrize(
    ("specs", "error", "says"),
    [
        (["layerwise_casting@transfomer"], UnknownName, "transformer"),
        (["quantization:backend=gguf,type=Q8_0@text_encoder"], InvalidRequest, "GGUF file"),
        (
            ["quantization:backend=bitsandbytes,type=nf4@transformer", "sequential_offload"],
            InvalidRequest,
            "issue 10800",
        ),
    ],
)
def test_what_cannot_be_stored_so_is_refused(specs: list[str], error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        _observed(*specs)


def test_a_level_at_which_nothing_is_offered_is_not_traced() -> None:
    assert _lower_levels(Quality.HIGH) == []
    assert _lower_levels(Quality.EXACT) == [Quality.HIGH]


def test_a_cast_that_the_call_does_not_survive_is_not_offered() -> None:
    # Its autoencoder would overflow in float16 and stays, and Stable Diffusion hands it float16.
    turing = reference_machine(["t4"]).gpus[0]
    policy = Policy(budget_bytes={0: turing.total_bytes}, quality=Quality.HIGH)
    pipe = stable_diffusion()
    pipe.vae.register_to_config(force_upcast=True)
    seen = observe(pipe, small_call("stable_diffusion"), gpu=turing, policy=policy)
    assert [one.load_options for one in seen] == [()]
