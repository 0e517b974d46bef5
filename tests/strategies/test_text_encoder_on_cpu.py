"""A text encoder that the CPU computes with: where things are, what it costs, and undoing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.end_to_end.small_runs import untouched
from tests.small_pipelines import picture, small_call

from pipefit import predict
from pipefit.cost_models.allocator import allocated_bytes
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.residency import load_order
from pipefit.cost_models.roofline import CPU_FLOPS_PER_S_PER_CORE, kernel_flops
from pipefit.errors import InvalidRequest
from pipefit.planner.apply import apply_options
from pipefit.planner.catalog import reference_machine
from pipefit.planner.policy import Policy
from pipefit.planner.pricing import Pricing
from pipefit.planner.rehearse import on_stage, rehearse
from pipefit.planner.signatures import GPU
from pipefit.planner.snapshot import differences, snapshot
from pipefit.planner.trace import run_call
from pipefit.planner.workloads import observe
from pipefit.strategies import strategy, traits_of
from pipefit.strategies.describe import describe_component
from pipefit.strategies.live import module_components
from pipefit.strategies.strategy import Option

CARD = Gpu(name="cpu", architecture="cpu", total_bytes=1 << 40, free_bytes=1 << 40)
"""A virtual GPU without the workspaces of libraries, next to which small pipelines are nothing."""
MACHINE = replace(reference_machine(["rtx-4060"]), gpus=(CARD,))

ON_CPU = Option(strategy="text_encoder_on_cpu", component="text_encoder")
BOTH = [ON_CPU, replace(ON_CPU, component="text_encoder_2")]
SHARED = {"max_block_bytes": 16 << 10, "num_slots": 2, "when_idle": "leave"}

OTHERS = {
    "resident": [Option(strategy="resident", component=c) for c in ("transformer", "vae")],
    "group offload": [
        Option(strategy="group_offload", component=c, parameters={"offload_type": "leaf_level"})
        for c in ("transformer", "vae")
    ],
    "streaming, nothing stays": [
        Option(strategy="streaming", component=c, parameters={"resident_blocks": 0, **SHARED})
        for c in ("transformer", "vae")
    ],
}


def described(module: Any) -> Any:
    return describe_component("c", module, traits_of(module))


@pytest.mark.parametrize("others", OTHERS)
def test_the_pipeline_goes_on_computing_on_the_gpu(others: str) -> None:
    pipe, _ = untouched("flux")
    with (
        on_stage(pipe, CARD) as stage,
        apply_options(stage.pipe, [*BOTH, *OTHERS[others]], GPU),
    ):
        twin = stage.pipe
        assert twin._execution_device == GPU
        if others == "resident":
            assert twin.device == GPU
        tokens = torch.zeros((1, 4), dtype=torch.long, device=GPU)
        found = twin.text_encoder_2(tokens, output_hidden_states=True)
        assert {one.device for one in (found.last_hidden_state, *found.hidden_states)} == {GPU}
        assert found.last_hidden_state is found.hidden_states[-1]
        assert twin.text_encoder_2(input_ids=tokens.to("cpu"))[0].device == GPU
        assert {one.device.type for one in twin.text_encoder_2.parameters()} == {"cpu"}
        run_call(twin, small_call("flux"))


@pytest.mark.parametrize("name", ["stable_diffusion_xl", "stable_diffusion_3", "flux", "cogvideox"])
def test_the_picture_stays_and_undoing_leaves_nothing(name: str) -> None:
    pipe, expected = untouched(name)
    before = snapshot(pipe, with_values=True)
    options = [
        Option(strategy="text_encoder_on_cpu", component=component)
        for component, module in module_components(pipe).items()
        if strategy("text_encoder_on_cpu").refusal(described(module), {}) is None
    ]
    assert options
    with apply_options(pipe, options, "cpu"):
        assert differences(before, snapshot(pipe))
        assert torch.equal(picture(pipe, name), expected)
    assert differences(before, snapshot(pipe, with_values=True)) == ()
    assert not pipe.text_encoder._forward_hooks
    assert not pipe.text_encoder._forward_pre_hooks
    assert torch.equal(picture(pipe, name), expected)


def test_its_phase_holds_no_weights_and_no_activations_of_it() -> None:
    pipe, _ = untouched("flux")
    call = small_call("flux")
    predicted = predict(pipe, BOTH, call=call, machine=MACHINE)
    resident = predict(pipe, call=call, machine=MACHINE)
    modules = module_components(pipe)
    gone_bytes = sum(described(modules[o.component]).weight_bytes for o in BOTH)
    for now, before in zip(predicted.phases, resident.phases, strict=True):
        assert before.weights_bytes - now.weights_bytes == sum(
            allocated_bytes(load_order(described(modules[o.component]))) for o in BOTH
        )
        if now.name == "encode_prompt":
            # Its results, until the pipeline has them.
            assert now.activation_bytes < before.activation_bytes / 10
            assert now.workspace_bytes == 0
    num_cores = MACHINE.host.num_cores
    rehearsed = rehearse(pipe, predicted.options, call, CARD, num_cores=num_cores)
    for phase, found in zip(predicted.phases, rehearsed.phases, strict=True):
        assert found.allocated_bytes == pytest.approx(phase.allocated_bytes, rel=0.02)
        if phase.name == "encode_prompt":
            # What is computed in place is not on the rehearsal's clock.
            assert found.seconds == pytest.approx(phase.seconds, rel=0.2)
    on_host_bytes = predicted.host_ram_bytes - resident.host_ram_bytes
    assert gone_bytes < on_host_bytes < 1.3 * gone_bytes
    picture_bytes = torch.float32.itemsize * 3 * call["height"] * call["width"]
    at_most_bytes = max(on_host_bytes, gone_bytes + picture_bytes)
    assert rehearsed.host_bytes == pytest.approx(at_most_bytes, rel=0.02)


def test_its_time_is_that_of_the_host_s_cores() -> None:
    pipe, _ = untouched("flux")
    gpu = reference_machine(["rtx-4060"]).gpus[0]
    policy = Policy(budget_bytes={0: gpu.total_bytes}, required=tuple(BOTH))
    seen = observe(pipe, small_call("flux"), gpu=gpu, policy=policy)[0].workload
    component = seen.component("text_encoder_2")
    phase = next(p for p in seen.phases if p.component == component.name)
    seconds = {}
    for num_cores in (1, 8):
        pricing = Pricing(seen, gpu, num_cores=num_cores)
        pick = pricing.exactly(BOTH)[component.name]
        assert pick is not None
        seconds[num_cores] = pricing.phase_seconds(phase, pick.choice, "native")[0]
    (ordinal,) = phase.calls
    flops = _flops(seen, [e for e in seen.root if e[0] == "c"][ordinal][1])
    saved_s = seconds[1] - seconds[8]
    # Small products are bound by memory, whose rate is not that of a core.
    assert 0 < saved_s <= flops / CPU_FLOPS_PER_S_PER_CORE * 7 / 8


def _flops(workload: Any, routine: int) -> int:
    return sum(
        kernel_flops(workload.kernels[e[1]]) if e[0] == "k" else _flops(workload, e[1])
        for e in workload.routines[routine].events
        if e[0] in "kc"
    )


def test_what_is_no_text_encoder_is_refused() -> None:
    one = strategy("text_encoder_on_cpu")
    for name in ("flux", "stable_diffusion_xl"):
        for component, module in module_components(untouched(name)[0]).items():
            refused = one.refusal(described(module), {}) is not None
            assert refused == ("text_encoder" not in component)
    pipe, _ = untouched("flux")
    with pytest.raises(InvalidRequest, match="AutoencoderKL is no text encoder"):
        apply_options(pipe, [replace(ON_CPU, component="vae")], "cpu")
    encoder = described(pipe.text_encoder)
    packed = replace(encoder, traits={**encoder.traits, "quantized_by": "bitsandbytes"})
    assert "want a GPU" in str(one.refusal(packed, {}))
    eight = replace(
        encoder, tensors=(replace(encoder.tensors[0], dtype="float8_e4m3fn"), *encoder.tensors[1:])
    )
    assert "float8_e4m3fn" in str(one.refusal(eight, {}))
    assert "no parameter 'x'" in str(one.refusal(encoder, {"x": 1}))
