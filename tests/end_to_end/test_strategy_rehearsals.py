"""Each strategy, and each pair of them, on a virtual GPU against what is predicted.

Which pairs there are, the strategies say: two that place the same weights, and two of which one
rules the other out (``conflict_of``), are no pair. Everything else is predicted as ``predict`` does
it, applied to the twin with the real hooks, and called.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.end_to_end.small_runs import untouched
from tests.small_pipelines import small_call

from pipefit import plan, predict
from pipefit.cost_models.host_memory import host_bytes
from pipefit.cost_models.machine import Gpu, Machine
from pipefit.cost_models.units import MIB
from pipefit.cost_models.workload import Component
from pipefit.errors import ApplyFailed, InvalidRequest, NoPlanFits
from pipefit.planner.apply import apply_options
from pipefit.planner.catalog import find_gpu, reference_machine
from pipefit.planner.plan import PredictedCall, Rehearsal
from pipefit.planner.rehearse import on_stage, placements_of, rehearse
from pipefit.planner.signatures import GPU
from pipefit.strategies import BUILT_IN, conflict_of, strategy, traits_of
from pipefit.strategies.describe import describe_component
from pipefit.strategies.live import module_components
from pipefit.strategies.strategy import Consented, Imitated, Option

NO_LIBRARIES = Gpu(name="cpu", architecture="cpu", total_bytes=1 << 40, free_bytes=1 << 40)
"""Without workspaces: next to those of cuBLAS, small pipelines are nothing."""
MACHINE = replace(reference_machine(["rtx-4060"]), gpus=(NO_LIBRARIES,))

SAME = 0.02
"""Share by which the allocated peak of a phase, and host memory, may be off."""

PIPELINES = (
    "stable_diffusion_xl", "stable_diffusion_xl_img2img", "stable_diffusion_xl_controlnet",
    "stable_diffusion_3", "flux", "cogvideox", "wan_two_experts",
)  # fmt: skip

LEAVES = {"offload_type": "leaf_level"}
BLOCKS = {"offload_type": "block_level", "num_blocks_per_group": 1}
STREAM = {"use_stream": True}
DISK = {"offload_to_disk_path": "weights"}
"""A rehearsal puts a folder of its own in the place of this one, which is not there."""

SOME_STAY = {"resident_blocks": 1, "num_slots": 2, "max_block_bytes": 16 << 10}
"""Of small models: one block or more is streamed."""

FORMS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "tf32": ({},),
    "cudnn_benchmark": ({},),
    "prompt_first": ({},),
    "latent_output": ({},),
    "precision": ({"dtype": "bfloat16"}, {"dtype": "float16"}),
    "fused_qkv": ({},),
    "quantization": (
        {"backend": "torchao", "type": "int8_weight_only"},
        {"backend": "torchao", "type": "float8_weight_only"},
        {"backend": "bitsandbytes", "type": "nf4"},
        {"backend": "bitsandbytes", "type": "int8"},
        {"backend": "gguf", "type": "Q8_0"},
        {"backend": "quanto", "type": "int8"},
    ),
    "layerwise_casting": (
        {"storage_dtype": "float8_e4m3fn"},
        {"storage_dtype": "float8_e5m2"},
    ),
    "step_cache": (
        {"disable_cache_before_step": 1, "use_lite_mode": True},
        {"disable_cache_before_step": 1},
    ),
    "channels_last": ({},),
    "attention": (
        {"backend": "math"},
        *({"backend": one} for one in ("native", "flash", "efficient", "cudnn")),
        *({"slicing": one} for one in ("auto", "max", 1)),
    ),
    "feed_forward_chunking": ({"chunk_size": 1},),
    "guidance_split": ({},),
    "vae_slicing": ({},),
    "vae_tiling": ({}, {"tile_px": 32}),
    "decode_chunks": ({"num_frames": 2},),
    "group_offload": (
        {**LEAVES, **STREAM},
        *(
            {**kind, **how}
            for kind in (LEAVES, BLOCKS, {**BLOCKS, "num_blocks_per_group": 2})
            for how in (
                {},
                {"non_blocking": True},
                {"low_cpu_mem_usage": True},
                {**STREAM, "record_stream": True},
                {**STREAM, "low_cpu_mem_usage": True},
                DISK,
                {**STREAM, **DISK},
                {**STREAM, **DISK, "record_stream": True},
            )
        ),
        {**BLOCKS, **STREAM},
    ),
    "text_encoder_on_cpu": ({},),
    "resident": ({},),
    "streaming": (
        {**SOME_STAY, "when_idle": "leave"},
        SOME_STAY,
        {**SOME_STAY, "num_slots": 1, "look_ahead": 0},
        {**SOME_STAY, "host_memory": "pageable"},
        {**SOME_STAY, "disk_path": "weights"},
        {**SOME_STAY, "when_idle": "leave", "load_with": "text_encoder"},
        {**SOME_STAY, "resident_blocks": 0, "num_slots": 3},
    ),
    "model_offload": ({},),
    "sequential_offload": ({},),
}
"""Strategy -> forms of it; pairs are made of the first, and of groups on disk."""

ON_DISK = {**BLOCKS, **DISK}
SHOWN = [
    *((name, forms[0]) for name, forms in FORMS.items()),
    ("group_offload", ON_DISK),
]

QUICK = ("flux",)
"""Whose pairs with ``QUICK_FORMS`` are in the fast suite."""
QUICK_FORMS = ("quantization", "group_offload", "model_offload")


def places(name: str) -> bool:
    return "placement" in strategy(name).kind


def unnamed(name: str, parameters: Mapping[str, Any]) -> Option:
    return Option(strategy=name, parameters=parameters)


@functools.cache
def components(name: str, load: str = "") -> tuple[Component, ...]:
    """Return the components of a pipeline, or what the first form of strategy *load* makes of them.

    A load strategy decides what others, which come later, find.
    """
    with on_stage(untouched(name)[0], NO_LIBRARIES) as stage:
        for component, module in module_components(stage.pipe).items():
            one = strategy(load) if load else None
            about = describe_component(component, module, traits_of(module))
            if one is None or one.refusal(about, FORMS[load][0]) is not None:
                continue
            if isinstance(one, Imitated):
                one.imitate(stage.pipe, component, FORMS[load][0])
            else:
                one.apply(stage.pipe, component, FORMS[load][0], GPU)
        return tuple(
            describe_component(component, module, traits_of(module))
            for component, module in module_components(stage.pipe).items()
        )


def takers(name: str, option: Option, load: str = "") -> list[str]:
    """Return the components that take *option*."""
    one = strategy(option.strategy)
    return [c.name for c in components(name, load) if one.refusal(c, option.parameters) is None]


def is_possible(name: str, option: Option, load: str = "") -> bool:
    """Whether *option* can be had somewhere; for the whole pipeline it has to be everywhere."""
    found = takers(name, option, load)
    if strategy(option.strategy).kind == "pipeline_placement":
        return len(found) == len(components(name))
    return bool(found)


def on_half(name: str, first: int, option: Option) -> list[Option]:
    """Return *option* on every other component that takes it, beginning with number *first*."""
    half = [c.name for c in components(name)][first::2]
    return [replace(option, component=c) for c in takers(name, option) if c in half]


def pair(name: str, one: Option, other: Option) -> list[Option] | None:
    """Return the two together; two placements on different components; None: they exclude."""
    if not (places(one.strategy) and places(other.strategy)):
        together = set(takers(name, one)) & set(takers(name, other))
        return None if together and conflict_of([one, other]) else [one, other]
    if any(strategy(o.strategy).kind == "pipeline_placement" for o in (one, other)):
        return None
    return [*on_half(name, 0, one), *on_half(name, 1, other)]


def call_of(name: str, options: list[Option]) -> dict[str, Any]:
    """Return the small call, of two pictures where they may be decoded one by one."""
    call = small_call(name)
    if any(option.strategy == "vae_slicing" for option in options):
        several = "num_videos_per_prompt" if name in ("cogvideox", "wan_two_experts") else None
        if several is None:
            call["num_images_per_prompt"] = 2
    return call


def both(name: str, options: list[Option]) -> tuple[PredictedCall, Rehearsal]:
    pipe, _ = untouched(name)
    call = call_of(name, options)
    predicted = predict(pipe, options, call=call, machine=MACHINE)
    return predicted, rehearse(pipe, predicted.options, call, NO_LIBRARIES)


def check(predicted: PredictedCall, rehearsed: Rehearsal) -> None:
    assert [(p.component, p.entry) for p in rehearsed.phases] == [
        (p.component, p.entry) for p in predicted.phases
    ]
    for expected, found in zip(predicted.phases, rehearsed.phases, strict=True):
        assert found.allocated_bytes == pytest.approx(expected.allocated_bytes, rel=SAME)


def described(parameters: Mapping[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in parameters.items())


SINGLES = [
    pytest.param(
        name,
        unnamed(which, parameters),
        id=f"{name}-{which}-{described(parameters)}",
        marks=()
        if name in QUICK and (which in QUICK_FORMS and parameters in (FORMS[which][0], ON_DISK))
        else pytest.mark.slow,
    )
    for name in PIPELINES
    for which, forms in FORMS.items()
    for parameters in forms
]

PAIRS = [
    pytest.param(
        name,
        unnamed(*one),
        unnamed(*other),
        id=f"{name}-{one[0]}-{other[0]}{'-disk' if other[1] is ON_DISK else ''}",
        marks=()
        if name in QUICK and (one[0] == "quantization" and other[0] in QUICK_FORMS)
        else pytest.mark.slow,
    )
    for name in PIPELINES
    for one, other in itertools.combinations(SHOWN, 2)
]


def test_every_strategy_has_forms() -> None:
    # No virtual GPU executes compiled code; two GPUs are for test_device_map_rehearsals.py, files
    # for test_sharded_checkpoint.py.
    executed = {one.name for one in BUILT_IN if not isinstance(one, Consented)}
    assert set(FORMS) == executed - {"device_map", "sharded_checkpoint"}


@pytest.mark.parametrize(("name", "option"), SINGLES)
def test_a_strategy_needs_what_is_predicted(name: str, option: Option) -> None:
    if not is_possible(name, option):
        with pytest.raises(InvalidRequest, match="applies to no component"):
            both(name, [option])
        return
    check(*both(name, [option]))


@pytest.mark.parametrize(("name", "one", "other"), PAIRS)
def test_a_pair_needs_what_is_predicted(name: str, one: Option, other: Option) -> None:
    options = pair(name, one, other)
    is_load = strategy(one.strategy).kind == "load" != strategy(other.strategy).kind
    load = one.strategy if is_load else ""
    if not (is_possible(name, one) and is_possible(name, other, load)):
        with pytest.raises(InvalidRequest):
            both(name, [one, other])
    elif options is None:
        _both_say_no(name, one, other)
    else:
        check(*both(name, options))


def _both_say_no(name: str, one: Option, other: Option) -> None:
    """What excludes each other is neither predicted nor applied."""
    pipe, _ = untouched(name)
    with pytest.raises(InvalidRequest):
        predict(pipe, [one, other], call=small_call(name), machine=MACHINE)
    named = [
        replace(option, component=component)
        for option in (one, other)
        for component in (
            (None,)
            if strategy(option.strategy).kind in ("pipeline_placement", "process")
            else takers(name, option)
        )
    ]
    with on_stage(pipe, NO_LIBRARIES) as stage, pytest.raises(InvalidRequest):
        apply_options(stage.pipe, named, GPU)


# -- quantised weights


def test_quantised_weights_move_at_their_stored_size() -> None:
    load, moved = ("", "quantization"), []
    for name in load:
        options = [unnamed(name, FORMS[name][0])] if name else []
        _, rehearsed = both("flux", [*options, unnamed("model_offload", {})])
        moved.append({phase.component: phase.copies.to_gpu_bytes for phase in rehearsed.phases})
    for plain, stored in zip(*(components("flux", name) for name in load), strict=True):
        saved_bytes = moved[0][plain.name] - moved[1][plain.name]
        assert saved_bytes == plain.weight_bytes - stored.weight_bytes > 0


def test_a_plan_with_quantised_weights_is_rehearsed_and_not_applied() -> None:
    pipe, _ = untouched("flux")
    nf4 = unnamed("quantization", {"backend": "bitsandbytes", "type": "nf4"})
    predicted = predict(pipe, [nf4], call=small_call("flux"), machine=MACHINE)
    assert rehearse(pipe, predicted.options, small_call("flux"), NO_LIBRARIES)
    with pytest.raises(ApplyFailed, match="is loaded already"):
        apply_options(pipe, predicted.options, "cpu")


# -- budgets


@pytest.mark.parametrize(
    ("name", "share"),
    [
        pytest.param(
            name, share, marks=() if name in QUICK and share in (0, 0.5) else pytest.mark.slow
        )
        for name in PIPELINES
        for share in (0, 0.1, 0.25, 0.5, 0.75, 1)
    ],
)
def test_a_rehearsal_stays_within_the_budget_of_its_plan(name: str, share: float) -> None:
    pipe, _ = untouched(name)
    call = small_call(name)
    least_bytes, most_bytes = budgets(name)
    budget_bytes = round(least_bytes + share * (most_bytes - least_bytes))
    made = plan(pipe, budget_bytes, call=call, machine=BOUNDED)
    rehearsed = rehearse(pipe, made.options, call, BOUNDED.gpus[0], budget_bytes=budget_bytes)
    assert rehearsed.process_bytes <= budget_bytes


BOUNDED: Machine = replace(MACHINE, gpus=(replace(find_gpu("rtx-4060"), context_bytes=0),))
"""With the workspaces of a real card; its context would drown the small pipelines."""


@functools.cache
def budgets(name: str) -> tuple[int, int]:
    """Return the smallest budget that a plan keeps, and what everything resident is promised in."""
    pipe, _ = untouched(name)
    call = small_call(name)
    with pytest.raises(NoPlanFits) as nothing:
        plan(pipe, MIB, call=call, machine=BOUNDED)
    least_bytes = next(iter(nothing.value.smallest_budget_bytes.values()))
    (peak,) = predict(pipe, call=call, machine=BOUNDED).peak_vram
    return least_bytes, peak.process_bytes + peak.slack_bytes


# -- host memory

HOSTED = {
    "leaves, streamed": {**LEAVES, **STREAM},
    "leaves, streamed, little RAM": {**LEAVES, **STREAM, "low_cpu_mem_usage": True},
    "leaves, disk": {**LEAVES, **DISK},
    "leaves": LEAVES,
    "blocks, streamed": {**BLOCKS, **STREAM},
    "blocks, streamed, little RAM": {**BLOCKS, **STREAM, "low_cpu_mem_usage": True},
    "blocks, disk": {**BLOCKS, **DISK},
}


def host_marks(name: str, how: str) -> tuple[pytest.MarkDecorator, ...]:
    return () if name in QUICK and "streamed" in how else (pytest.mark.slow,)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(name, how, marks=host_marks(name, how))
        for name in ("flux", "stable_diffusion_xl", "cogvideox")
        for how in HOSTED
    ],
)
def test_host_memory_is_what_is_predicted(name: str, how: str) -> None:
    predicted, rehearsed = both(name, [unnamed("group_offload", HOSTED[how])])
    assert rehearsed.pinned_bytes == pytest.approx(predicted.pinned_bytes, rel=SAME)
    assert rehearsed.disk_bytes == predicted.disk_bytes
    assert rehearsed.host_bytes == pytest.approx(pageable_bytes(name, predicted), rel=SAME)


def pageable_bytes(name: str, predicted: PredictedCall) -> int:
    """Return what is predicted to lie in ordinary memory during the call: weights away from the
    GPU, or a file that is read, and the picture that the decoder hands over."""
    pipe, _ = untouched(name)
    modules = module_components(pipe)
    resting_bytes = file_bytes = 0
    for component, placement in placements_of(predicted.options, modules).items():
        module = modules[component]
        about = describe_component(component, module, traits_of(module))
        resting_bytes += host_bytes(about, placement).pageable_bytes
        if getattr(placement, "offload_to_disk_path", None):
            from pipefit.cost_models.residency import offload_groups

            groups = offload_groups(about, placement).all
            file_bytes = max(file_bytes, *(group.num_bytes for group in groups))
    call = small_call(name)
    picture_bytes = (
        torch.float32.itemsize * 3 * call["height"] * call["width"] * call.get("num_frames", 1)
    )
    return resting_bytes + max(file_bytes, picture_bytes)


def test_streams_from_disk_pin_a_whole_group_where_the_link_is_slow() -> None:
    slow = replace(find_gpu("rtx-4060"), h2d_pinned_bytes_per_s=1e3)
    pipe, _ = untouched("flux")
    streamed = unnamed("group_offload", {**BLOCKS, **STREAM, **DISK})
    option = replace(streamed, component="transformer")
    predicted = predict(pipe, [option], call=small_call("flux"), machine=MACHINE)
    rehearsed = rehearse(pipe, predicted.options, small_call("flux"), slow)
    assert rehearsed.pinned_bytes == pytest.approx(predicted.pinned_bytes, rel=SAME)
    quick = rehearse(pipe, predicted.options, small_call("flux"), NO_LIBRARIES)
    assert quick.pinned_bytes < rehearsed.pinned_bytes


def test_nothing_of_a_weight_s_size_is_written_to_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sizes: list[int] = []
    pipe, _ = untouched("flux")
    option = unnamed("group_offload", ON_DISK)
    predicted = predict(pipe, [option], call=small_call("flux"), machine=MACHINE)
    decode = type(pipe).__call__

    def looked(self: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.extend(p.stat().st_size for p in tmp_path.rglob("*.safetensors"))
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe), "__call__", looked)
    rehearsed = rehearse(pipe, predicted.options, small_call("flux"), NO_LIBRARIES)
    assert sizes
    assert sum(sizes) == 0
    assert rehearsed.disk_bytes > 0
    assert list(tmp_path.iterdir()) == []
