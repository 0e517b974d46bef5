"""Compiling: where it is offered, what excludes it, what it predicts, and what undo takes back."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from tests.end_to_end.small_runs import untouched
from tests.small_pipelines import SMALL_PIPELINES, picture, small_call
from tests.strategies.described import ADA, described

import pipefit
from pipefit.cost_models.machine import Machine
from pipefit.cost_models.workload import Kernel, Phase, Workload
from pipefit.cost_models.workspace import (
    LEAST_SMS_TO_TRY,
    UNKNOWN_L2_BYTES,
    flush_bytes,
    workspace_bytes,
)
from pipefit.errors import InvalidRequest
from pipefit.planner.apply import apply_options
from pipefit.planner.catalog import reference_machine
from pipefit.planner.options import compute_variants
from pipefit.planner.policy import Policy
from pipefit.planner.pricing import Pricing
from pipefit.planner.snapshot import differences, snapshot
from pipefit.planner.trace import trace
from pipefit.planner.workloads import _apply_parts
from pipefit.strategies import conflict_of, strategy, traits_of
from pipefit.strategies.compile import MODES
from pipefit.strategies.live import CAPTURING_MODES, COMPILED, TRYING_MODES, repeated_blocks
from pipefit.strategies.strategy import Option, Quality

COMPILE = strategy("compile")
REGIONAL = {"scope": "repeated_blocks"}
WHOLE = {"scope": "component"}


@pytest.fixture
def _forgetting() -> Iterator[None]:
    """Leave torch's compiler as it was, as a process has a limit of graphs for a function."""
    yield
    torch.compiler.reset()


def traced(name: str, *choices: tuple[str, dict[str, Any]]) -> Workload:
    """Return the small pipeline *name* traced with *choices* of compile as variants."""
    variants: dict[str, list[dict[str, Any]]] = {}
    for component, parameters in choices:
        variants.setdefault(component, []).append({"compile": parameters})
    call = {k: v for k, v in small_call(name).items() if k != "generator"}
    return trace(
        SMALL_PIPELINES[name](),
        call,
        traits=traits_of,
        variants=lambda workload: variants,
        apply_variant=_apply_parts,
    )


def kernels_of(workload: Workload, routine: int) -> list[Kernel]:
    found = []
    for event in workload.routines[routine].events:
        if event[0] == "k":
            found.append(workload.kernels[event[1]])
        elif event[0] == "c":
            found += kernels_of(workload, event[1])
    return found


def asking(*required: Option, allowed: bool = False) -> Policy:
    return Policy(
        budget_bytes={0: 1 << 33},
        quality=Quality.HIGH,
        required=required,
        compile_allowed=allowed,
    )


def test_it_is_offered_only_where_compiling_was_allowed_and_calls_are_many() -> None:
    workload = traced("flux")
    calls = 50 * workload.phases[2].calls
    often = replace(
        workload,
        phases=tuple(
            replace(phase, calls=calls) if phase.component == "transformer" else phase
            for phase in workload.phases
        ),
    )

    def offered(workload: Workload, policy: Policy) -> set[str]:
        return {
            component
            for component, variants in compute_variants(workload, ADA, policy).items()
            if any("compile" in parts for parts in variants)
        }

    assert offered(often, asking()) == set()
    assert offered(often, asking(allowed=True)) == {"transformer"}
    assert offered(workload, asking(allowed=True)) == set()
    # Who names it has allowed it.
    named = Option(strategy="compile", component="transformer", parameters=WHOLE)
    assert offered(workload, asking(named)) == {"transformer"}


def test_blocks_are_offered_where_they_are_nearly_all_of_it() -> None:
    scopes = {}
    with torch.device("meta"):
        large = diffusers.FluxTransformer2DModel(num_layers=2, num_single_layers=2)
    for name, part in (("flux", large), ("unet", SMALL_PIPELINES["stable_diffusion"]().unet)):
        component = described(part)
        phase = Phase(name="denoise", component="part", entry="forward", calls=tuple(range(50)))
        (offered,) = COMPILE.options(component, _calling(component, phase), ADA)
        scopes[name] = offered["scope"]
    assert scopes == {"flux": "repeated_blocks", "unet": "component"}
    old = replace(ADA, compute_capability=(6, 1))
    assert COMPILE.options(component, _calling(component, phase), old) == ()


def _calling(component: Any, phase: Phase) -> Workload:
    return Workload(
        pipeline="p",
        pipeline_class="P",
        call={},
        components=(component,),
        kernels=(),
        routines=(),
        root=(),
        phases=(phase,),
    )


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (REGIONAL, "names no repeated blocks: use scope=component"),
        ({"scope": "all"}, "is repeated_blocks or component, but was 'all'"),
        ({"mode": "fast"}, "is one of default"),
        ({"mode": "default", "backend": "eager"}, "leave backend out"),
        ({"dynamic": "often"}, "true, false or none"),
        ({"fullgraph": 1}, "true or false"),
    ],
)
def test_words_that_torch_does_not_know_are_refused(
    parameters: dict[str, Any], message: str
) -> None:
    component = described(SMALL_PIPELINES["stable_diffusion"]().vae)
    assert message in str(COMPILE.refusal(component, parameters))
    assert COMPILE.refusal(component, WHOLE) is None


BLOCKS = {"offload_type": "block_level", "num_blocks_per_group": 1}


@pytest.mark.parametrize(
    ("compiled", "other", "excluded"),
    [
        (WHOLE, Option(strategy="streaming"), True),
        (REGIONAL, Option(strategy="streaming"), True),
        (REGIONAL, Option(strategy="sequential_offload"), True),
        (REGIONAL, Option(strategy="layerwise_casting"), True),
        (REGIONAL, Option(strategy="group_offload", parameters={"offload_type": "leaf_level"}), 1),
        (WHOLE, Option(strategy="group_offload", parameters=BLOCKS), True),
        ({**REGIONAL, "fullgraph": True}, Option(strategy="group_offload", parameters=BLOCKS), 1),
        (REGIONAL, Option(strategy="group_offload", parameters=BLOCKS), False),
        (WHOLE, Option(strategy="model_offload"), False),
        (WHOLE, Option(strategy="channels_last"), False),
        (WHOLE, Option(strategy="resident"), False),
    ],
)
def test_hooks_within_what_is_compiled_exclude_it(
    compiled: dict[str, Any], other: Option, excluded: bool
) -> None:
    reason = conflict_of([other, Option(strategy="compile", parameters=compiled)])
    assert bool(reason) == bool(excluded), reason


def test_a_compiled_call_launches_less_and_takes_what_timing_its_kernels_takes() -> None:
    workload = traced("flux", ("transformer", WHOLE), ("transformer", REGIONAL))
    captured = {**WHOLE, "mode": "reduce-overhead"}
    eager = None
    for replaced in workload.variants.values():
        ((plain, compiled),) = replaced.items()
        eager = kernels_of(workload, plain)
        graph = kernels_of(workload, compiled)
        assert len(graph) < 0.7 * len(eager)
        # What a library computes stays as it is.
        for kind in ("gemm", "attention"):
            assert sum(k.kind == kind for k in graph) == sum(k.kind == kind for k in eager)
        assert sum(k.read_bytes + k.write_bytes for k in graph) < sum(
            k.read_bytes + k.write_bytes for k in eager
        )
    pricing = Pricing(workload, _gpu())
    peaks = [
        pricing.replay(pricing.exactly(options))[2].allocated_bytes
        for options in (
            [],
            [Option(strategy="compile", component="transformer", parameters=WHOLE)],
            [Option(strategy="compile", component="transformer", parameters=REGIONAL)],
        )
    ]
    # Eager buffers and what empties the cache between the runs of a kernel that is timed.
    flush = flush_bytes(_gpu())
    assert peaks[1:] == [pytest.approx(peaks[0] + flush, rel=0.01)] * 2
    assert eager is not None
    assert {k.launcher for k in eager} == {"eager"}
    again = traced("flux", ("transformer", captured))
    ((_, compiled),) = next(iter(again.variants.values())).items()
    assert {k.launcher for k in kernels_of(again, compiled)} == {"captured"}


def test_what_max_autotune_tries_can_be_the_peak_and_takes_no_time() -> None:
    tuned, untried = {**WHOLE, "mode": "max-autotune"}, {**WHOLE, "mode": "reduce-overhead"}
    workload = traced("stable_diffusion", ("vae", tuned), ("vae", untried))
    gpu = replace(_gpu(), l2_bytes=256 << 20, num_sms=LEAST_SMS_TO_TRY)
    pricing = Pricing(workload, gpu)
    picks = {
        name: pricing.exactly([Option(strategy="compile", component="vae", parameters=parameters)])
        for name, parameters in (("tuned", tuned), ("untried", untried))
    }
    peaks = {name: pricing.replay(pick)[-1] for name, pick in picks.items()}
    eager = pricing.replay(pricing.exactly([]))[-1]
    assert eager.allocated_bytes + gpu.l2_bytes > peaks["untried"].allocated_bytes > gpu.l2_bytes
    tried = {
        kernel
        for replaced in workload.variants.values()
        for routine in replaced.values()
        for kernel in kernels_of(workload, routine)
        if kernel.launcher == "tried"
    }
    assert {kernel.kind for kernel in tried} == {"conv", "gemm"}
    most = max(workspace_bytes(kernel, gpu) for kernel in tried)
    assert peaks["tuned"].allocated_bytes >= most > gpu.l2_bytes
    small = replace(gpu, num_sms=LEAST_SMS_TO_TRY - 1)
    without = Pricing(workload, small).replay(picks["tuned"])[-1]
    assert without.allocated_bytes == peaks["untried"].allocated_bytes
    seconds = {
        name: pricing.prediction(pick, pricing.replay(pick)).latency.call_s
        for name, pick in picks.items()
    }
    assert seconds["tuned"] == seconds["untried"]


def test_equal_blocks_are_one_graph_and_the_first_call_pays_for_each_kind() -> None:
    workload = traced("flux", ("transformer", REGIONAL))
    pricing = Pricing(workload, _gpu())
    picks = pricing.exactly([Option(strategy="compile", component="transformer",
                                    parameters=REGIONAL)])  # fmt: skip
    prediction = pricing.prediction(picks, pricing.replay(picks))
    assert "The first call compiles transformer" in " ".join(prediction.assumptions)
    warming_s = prediction.latency.first_call_s - prediction.latency.call_s
    (compiled,) = next(iter(workload.variants.values())).values()
    assert warming_s == pytest.approx(pricing.latency.compiling_seconds([compiled]))
    classes = {
        workload.routines[event[1]].module_class
        for event in workload.routines[compiled].events
        if event[0] == "c" and {k.launcher for k in kernels_of(workload, event[1])} == {"compiled"}
    }
    assert classes == {"FluxTransformerBlock", "FluxSingleTransformerBlock"}
    whole = traced("flux", ("transformer", WHOLE))
    (one,) = next(iter(whole.variants.values())).values()
    blocks_s = pricing.latency.compiling_seconds([compiled])
    assert Pricing(whole, _gpu()).latency.compiling_seconds([one]) != blocks_s


def _gpu() -> Any:
    machine: Machine = reference_machine(["rtx-4060"])
    return machine.gpus[0]


def test_what_diffusers_compiles_of_a_model_is_what_we_do() -> None:
    """Guards ``_repeated_blocks`` of diffusers 0.42 and ``_compiled_call_impl`` of torch 2.13."""
    module = SMALL_PIPELINES["flux"]().transformer
    module.compile_repeated_blocks(backend="eager")
    marked = [part for part in module.modules() if vars(part).get(COMPILED) is not None]
    assert marked == repeated_blocks(module)
    assert len(marked) == 4


def test_modes_and_which_of_them_capture_graphs_are_torchs() -> None:
    """Guards ``list_mode_options`` of torch 2.13."""
    modes = torch._inductor.list_mode_options()
    assert set(MODES) == set(modes) - {"lite"}  # which fuses nothing
    capturing = {mode for mode, set_to in modes.items() if set_to.get("triton.cudagraphs")}
    assert capturing == set(CAPTURING_MODES)
    assert {mode for mode, set_to in modes.items() if set_to.get("max_autotune")} == set(
        TRYING_MODES
    )


def test_three_results_of_a_convolution_are_alive_while_inductor_tries_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards ``ExternKernelBenchmarkRequest.benchmark`` and ``aten_convolution`` of torch 2.13."""
    from torch._inductor.autotune_process import ExternKernelBenchmarkRequest
    from torch._inductor.kernel.conv import aten_convolution

    assert not aten_convolution.has_out_variant
    given = torch.ones(4)
    alive = weakref.WeakSet[torch.Tensor]()
    most = 0

    def convolve(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal most
        made = tensor.clone()
        alive.add(made)
        most = max(most, len(alive))
        return made

    request = object.__new__(ExternKernelBenchmarkRequest)
    request.has_out_variant, request.benchmark_with_cudagraphs = False, False
    monkeypatch.setattr(request, "to_callable", lambda: convolve, raising=False)
    out = torch.empty(4)
    alive.add(out)
    request.benchmark(given, out=out)
    assert most == 3
    assert torch.equal(out, given)


@pytest.mark.parametrize(("l2_bytes", "expected"), [(40 << 20, 40 << 20), (0, UNKNOWN_L2_BYTES)])
def test_what_inductor_empties_the_cache_with(
    monkeypatch: pytest.MonkeyPatch, l2_bytes: int, expected: int
) -> None:
    """Guards ``InductorBenchmarker.get_device_cache_size`` and that torch 2.13 uses it."""
    from torch._inductor import config
    from torch._inductor.runtime import benchmarking

    assert config.use_experimental_benchmarker
    assert not config.use_torch_profiler_benchmarker
    device = SimpleNamespace(
        current_device=lambda: 0,
        get_device_properties=lambda index: SimpleNamespace(L2_cache_size=l2_bytes),
    )
    monkeypatch.setattr(benchmarking, "get_interface_for_device", lambda name: device)
    found = benchmarking.InductorBenchmarker().get_device_cache_size("cuda")
    assert found == flush_bytes(replace(ADA, l2_bytes=l2_bytes)) == expected


@pytest.mark.parametrize(("num_sms", "is_big"), [(LEAST_SMS_TO_TRY, True), (67, False)])
def test_which_gpus_inductor_tries_kernels_on(
    monkeypatch: pytest.MonkeyPatch, num_sms: int, is_big: bool
) -> None:
    """Guards ``is_big_gpu`` of torch 2.13."""
    from torch._inductor import utils

    properties = SimpleNamespace(multi_processor_count=num_sms)
    monkeypatch.setattr(
        utils, "DeviceProperties", SimpleNamespace(create=lambda device: properties)
    )
    assert utils.is_big_gpu.__wrapped__(torch.device("cuda", 0)) is is_big


def test_an_autoencoder_is_compiled_where_it_computes() -> None:
    pipe, _ = untouched("stable_diffusion")
    undo = COMPILE.apply(pipe, "vae", {**WHOLE, "backend": "eager"}, "cpu")
    compiled = {
        path for path, part in pipe.vae.named_modules() if part._compiled_call_impl is not None
    }
    assert compiled == {"encoder", "decoder"}
    undo()
    assert all(part._compiled_call_impl is None for part in pipe.vae.modules())


@pytest.mark.usefixtures("_forgetting")
@pytest.mark.parametrize(
    ("name", "component", "parameters", "placed"),
    [
        ("flux", "transformer", REGIONAL, "resident"),
        pytest.param("flux", "transformer", REGIONAL, "group_offload", marks=pytest.mark.slow),
        pytest.param("flux", "transformer", WHOLE, "model_offload", marks=pytest.mark.slow),
        ("stable_diffusion", "vae", WHOLE, "resident"),
    ],
)
def test_the_picture_is_the_same_under_dynamo_and_nothing_is_left_of_it(
    name: str, component: str, parameters: dict[str, Any], placed: str
) -> None:
    # The backend "eager" executes the graph that dynamo made with torch's own kernels.
    pipe, expected = untouched(name)
    before = snapshot(pipe, with_values=True)
    options = [
        Option(
            strategy="compile", component=component, parameters={**parameters, "backend": "eager"}
        ),
        Option(strategy="model_offload")
        if placed == "model_offload"
        else Option(
            strategy=placed,
            component=component,
            parameters=BLOCKS if placed == "group_offload" else {},
        ),
    ]
    torch._dynamo.utils.counters.clear()
    with apply_options(pipe, options, "cpu"):
        assert torch.equal(picture(pipe, name), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert differences(before, snapshot(pipe, with_values=True)) == ()
    assert torch.equal(picture(pipe, name), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("_forgetting")
def test_inductors_kernels_make_nearly_the_same_picture() -> None:
    pipe, expected = untouched("flux")
    options = [Option(strategy="compile", component="transformer", parameters=REGIONAL)]
    with apply_options(pipe, options, "cpu"):
        made = picture(pipe, "flux")
    error = (made - expected).abs().max()
    assert 0 < error < 1e-3, f"the largest difference is {error}"


def test_a_plan_with_it_is_not_rehearsed_and_says_why() -> None:
    made = pipefit.plan(
        SMALL_PIPELINES["flux"](),
        "8GB",
        call=small_call("flux"),
        machine=reference_machine(["rtx-4060"]),
        with_=["compile:scope=repeated_blocks@transformer"],
    )
    assert "compile" in {option.strategy for option in made.options}
    assert "no virtual GPU executes what compile makes" in made.not_rehearsed
    assert made.quality is Quality.HIGH
    with pytest.raises(InvalidRequest, match="of quality high"):
        pipefit.plan(
            SMALL_PIPELINES["flux"](),
            "8GB",
            call=small_call("flux"),
            machine=reference_machine(["rtx-4060"]),
            quality="exact",
            with_=["compile@transformer"],
        )
