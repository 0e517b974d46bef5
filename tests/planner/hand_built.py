"""A plan and a prediction written by hand, for the tests of what is made from them."""

from __future__ import annotations

from pipefit.cost_models.machine import Gpu, Host, Machine
from pipefit.cost_models.prediction import DevicePeak, Latency, PhasePrediction, Prediction
from pipefit.cost_models.units import GIB, MIB
from pipefit.planner.plan import Alternative, Plan, PredictedCall
from pipefit.planner.policy import Policy
from pipefit.strategies.strategy import Option, Quality

MACHINE = Machine(
    gpus=(
        Gpu(
            name="rtx-4060",
            architecture="ada",
            compute_capability=(8, 9),
            total_bytes=8188 * MIB,
            free_bytes=7900 * MIB,
            other_bytes=288 * MIB,
            flops_per_s={"bfloat16": 30.2e12},
            memory_bytes_per_s=272e9,
            pcie_generation=4,
            pcie_lanes=8,
            provenance={"total_bytes": "catalogue"},
        ),
    ),
    host=Host(total_bytes=64 * GIB, available_bytes=60 * GIB, pinnable_bytes=32 * GIB, num_cores=8),
    notes=("Host RAM was not stated: 64.00 GiB is assumed.",),
)


def phase(name: str, component: str, calls: int, process_bytes: int, seconds: float):
    """Return a phase whose parts add up to what the process holds, less half a GiB of context."""
    allocated_bytes = process_bytes - GIB // 2
    weights_bytes = allocated_bytes // 2
    return PhasePrediction(
        name=name,
        component=component,
        entry="decode" if name == "decode" else "forward",
        calls=calls,
        device=0,
        seconds=seconds,
        allocated_bytes=allocated_bytes,
        weights_bytes=weights_bytes,
        activation_bytes=allocated_bytes - weights_bytes - 96 * MIB,
        workspace_bytes=64 * MIB,
        carried_bytes=32 * MIB,
        reserved_bytes=allocated_bytes,
        process_bytes=process_bytes,
    )


PREDICTION = Prediction(
    peak_vram=(
        DevicePeak(
            device=0,
            allocated_bytes=6 * GIB,
            reserved_bytes=6 * GIB + 200 * MIB,
            process_bytes=6 * GIB + 712 * MIB,
            context_bytes=GIB // 2,
            slack_bytes=200 * MIB,
        ),
    ),
    phases=(
        phase("encode_prompt", "text_encoder", 1, 1 * GIB, 0.1),
        phase("encode_prompt", "text_encoder_2", 1, 2 * GIB, 1.3),
        phase("denoise", "transformer", 28, 6 * GIB + 712 * MIB, 61.4),
        phase("decode", "vae", 1, 3 * GIB, 0.9),
    ),
    latency=Latency(first_call_s=71.0, call_s=63.7, low_s=55.0, high_s=78.0),
    host_ram_bytes=33 * GIB,
    pinned_bytes=22 * GIB,
    disk_bytes=0,
    assumptions=(
        "Host RAM was not stated: 64.00 GiB is assumed.",
        "Nothing else runs on the GPU.",
        "The call's prompt fills the 512 tokens of the second text encoder.",
        "No LoRA is loaded.",
    ),
)

_LEAF = {"offload_type": "leaf_level", "use_stream": True, "low_cpu_mem_usage": False}

PLAN = Plan(
    pipeline="flux.1-dev",
    call={"height": 1024, "width": 1024, "num_inference_steps": 28},
    machine=MACHINE,
    policy=Policy(budget_bytes={0: 8 * 10**9}),
    options=(
        Option(
            strategy="group_offload",
            component="transformer",
            parameters=_LEAF,
            reason="22.17 GiB of weights do not fit; the copies hide behind the arithmetic.",
        ),
        Option(
            strategy="group_offload",
            component="text_encoder_2",
            parameters=_LEAF,
            reason="Used once a call.",
        ),
        Option(strategy="resident", component="text_encoder", reason="Small."),
        Option(strategy="resident", component="vae", reason="Small."),
        Option(
            strategy="vae_tiling",
            component="vae",
            parameters={"tile_px": 512},
            reason="Decoding in one piece is 0.42 GiB over.",
        ),
    ),
    prediction=PREDICTION,
    quality=Quality.HIGH,
    next_quality="Quality balanced would take 41.0 s a call, 36% less.",
    alternatives=(
        Alternative(
            options=(Option(strategy="model_offload"),),
            process_bytes=24 * GIB,
            call_s=40.0,
            rejected_because="16.55 GiB over in denoise",
        ),
        Alternative(
            options=(Option(strategy="sequential_offload"),),
            process_bytes=3 * GIB,
            call_s=290.0,
            rejected_because="4.6 times as slow",
        ),
    ),
    fingerprint="sha256:0123",
    versions={"torch": "2.13.0", "diffusers": "0.42.1"},
)

PREDICTED = PredictedCall(
    **{name: getattr(PREDICTION, name) for name in PREDICTION.__dataclass_fields__},
    pipeline=PLAN.pipeline,
    call=PLAN.call,
    machine=MACHINE,
    options=PLAN.options,
)
