"""What decides a trace is in the key by which a trace is found again."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
from tests.end_to_end.small_runs import save
from tests.small_pipelines import flux, small_call, stable_diffusion

from pipefit.errors import InvalidRequest, UnknownName
from pipefit.planner.catalog import reference_machine
from pipefit.planner.policy import Policy, parse_strategy_spec
from pipefit.planner.pricing import Pricing, Shared
from pipefit.planner.probe import cpu_machine
from pipefit.planner.workloads import (
    _described,
    _meets,
    _storages,
    _unoffered,
    observe,
    state_digest,
)
from pipefit.strategies import BUILT_IN
from pipefit.strategies.precision import Precision
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


def test_another_process_finds_the_same_key() -> None:
    code = (
        "from tests.small_pipelines import stable_diffusion\n"
        "from pipefit.planner.workloads import state_digest\n"
        "print(state_digest(stable_diffusion()))"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1]
    assert len(found[0].strip()) == 64


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


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed here"
)
def test_what_is_loaded_at_once_is_offered_only_what_is_installed(tmp_path: Path) -> None:
    save(flux(), tmp_path)
    [gpu] = reference_machine(["rtx-4060"]).gpus
    anywhere = Policy(budget_bytes={0: gpu.total_bytes}, quality=Quality.LOW)

    def seen(policy: Policy) -> tuple[set[Any], str]:
        found = observe(tmp_path, small_call("flux"), gpu=gpu, policy=policy)
        options = [option for one in found for option in one.load_options]
        backends = {o.parameters["backend"] for o in options if o.strategy == "quantization"}
        return backends, " ".join(found[0].workload.assumptions)

    assert seen(anywhere)[0] == {"torchao", "bitsandbytes"}
    backends, said = seen(replace(anywhere, installed_only=True))
    assert backends == {"torchao"}
    assert "not offered: it needs `pip install bitsandbytes`" in said


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


def test_a_cast_that_the_call_does_not_survive_is_not_offered(monkeypatch: Any) -> None:
    # One component that is not cast with the others is handed tensors in another dtype.
    options = Precision.options

    def all_but_the_autoencoder(self: Any, component: Any, *about: Any) -> Any:
        return () if component.name == "vae" else options(self, component, *about)

    monkeypatch.setattr(Precision, "options", all_but_the_autoencoder)
    turing = reference_machine(["t4"]).gpus[0]
    policy = Policy(budget_bytes={0: turing.total_bytes}, quality=Quality.HIGH)
    call = small_call("stable_diffusion")
    seen = observe(stable_diffusion(), call, gpu=turing, policy=policy)
    assert not any(o.strategy == "precision" for one in seen for o in one.load_options)


RTX_4060 = reference_machine(["rtx-4060"]).gpus[0]


def _policy(quality: Quality, *specs: str) -> Policy:
    required = tuple(o for spec in specs for o in parse_strategy_spec(spec, strategies=NAMES))
    return Policy(budget_bytes={0: 8 << 30}, quality=quality, required=required)


def _ways(seen: list[Any]) -> list[set[tuple[str, str]]]:
    return [{(o.strategy, o.component) for o in one.load_options} for one in seen]


@pytest.fixture(scope="module")
def flux_workload() -> Any:
    """The small FLUX in float32, as a trace at quality exact has it."""
    return _observed(quality=Quality.EXACT)[0].workload


def test_fewer_bits_are_offered_at_the_quality_that_allows_them(flux_workload: Any) -> None:
    def offered(quality: Quality) -> list[tuple[Any, list[str]]]:
        ways = _storages(flux_workload, RTX_4060, _policy(quality), is_loaded=False)
        return [
            (way[0].parameters.get("type", "float8"), [str(o.component) for o in way])
            for way in ways
        ]

    takers = ["text_encoder", "text_encoder_2", "transformer"]
    eight = [
        (type_, some)
        for type_ in ("int8_weight_only", "float8")
        for some in (["transformer"], takers)
    ]
    assert offered(Quality.EXACT) == offered(Quality.HIGH) == []
    assert sorted(offered(Quality.BALANCED)) == sorted(eight)
    four = [("nf4", ["transformer"]), ("nf4", takers)]
    assert sorted(offered(Quality.LOW)) == sorted(eight + four)


def test_what_a_loaded_pipeline_is_past_is_not_offered_and_said(flux_workload: Any) -> None:
    ways = _storages(flux_workload, RTX_4060, _policy(Quality.LOW), is_loaded=True)
    packed = [o.parameters for way in ways for o in way if o.strategy == "quantization"]
    assert "layerwise_casting" in {o.strategy for way in ways for o in way}
    said = _unoffered(flux_workload, RTX_4060, _policy(Quality.LOW), is_loaded=True)
    nf4 = "quantization:backend=bitsandbytes,type=nf4 is not offered: the pipeline is loaded"
    assert any(note.startswith(nf4) for note in said)
    # What torchao makes of a live pipeline is offered where torchao is.
    int8 = {"backend": "torchao", "type": "int8_weight_only"}
    missing = "type=int8_weight_only is not offered: it needs `pip install torchao`."
    is_missing = importlib.util.find_spec("torchao") is None
    assert any(note.endswith(missing) for note in said) == is_missing
    assert packed == ([] if is_missing else [int8] * 4)
    assert _unoffered(flux_workload, RTX_4060, _policy(Quality.HIGH), is_loaded=True) == ()


@pytest.mark.parametrize(
    ("stored", "holds"),
    [("backend=torchao,type=int8_weight_only", True), ("backend=bitsandbytes,type=int8", False)],
)
def test_originals_are_held_where_a_live_component_is_converted(stored: str, holds: bool) -> None:
    seen = _observed(f"quantization:{stored}@transformer", quality=Quality.LOW)[0]
    assert ("transformer" in seen.held_bytes) == holds


def test_where_a_storage_is_asked_for_none_is_offered(flux_workload: Any) -> None:
    asked = _policy(Quality.LOW, "layerwise_casting@transformer")
    assert _storages(flux_workload, RTX_4060, asked, is_loaded=False) == []


def test_a_storage_that_a_requirement_cannot_be_had_with_is_left_out(flux_workload: Any) -> None:
    wide = _policy(Quality.LOW, "sequential_offload")
    quantised = replace(
        flux_workload,
        components=tuple(
            replace(c, traits={**c.traits, "quantized_by": "bitsandbytes"})
            if c.name == "transformer"
            else c
            for c in flux_workload.components
        ),
    )
    assert _meets(flux_workload, flux_workload, (), wide)
    assert not _meets(flux_workload, quantised, (), wide)


def test_every_way_to_store_weights_is_one_workload() -> None:
    none, four = {}, ("text_encoder", "text_encoder_2", "transformer", "vae")
    casts = {("precision", name) for name in four}
    high = _ways(_observed(quality=Quality.HIGH))
    assert high == [set(none), casts]
    seen = _observed(quality=Quality.BALANCED)
    casting = [{("layerwise_casting", name) for name in some} for some in (four[2:3], four[:3])]
    assert _ways(seen) == [*high, *(casts | way for way in casting)]
    plain, whole = seen[1].workload, seen[3]
    for name in four[:3]:
        assert "float8_e4m3fn" in _dtypes(whole.workload, name)
        stored = whole.workload.component(name).weight_bytes
        assert stored < plain.component(name).weight_bytes
        (reason,) = [
            o.reason
            for o in whole.load_options
            if (o.strategy, o.component) == ("layerwise_casting", name)
        ]
        share = stored / seen[0].workload.component(name).weight_bytes
        assert f"{share:.2f} of" in reason
    assert set(whole.held_bytes) == set(four[:3])


def test_candidates_that_pricings_share_are_what_each_would_find() -> None:
    gpu = cpu_machine().gpus[0]
    policy = Policy(budget_bytes={gpu.index: gpu.total_bytes}, quality=Quality.BALANCED)
    seen = observe(flux(), small_call("flux"), gpu=gpu, policy=policy)
    shared: Shared = {}
    for one in seen:
        about = {"load_options": one.load_options, "held_bytes": one.held_bytes}
        alone = Pricing(one.workload, gpu, **about)
        together = Pricing(one.workload, gpu, **about, shared=shared)
        assert together.problems(policy) == alone.problems(policy)
