"""Working on a part at a time: the same picture, and the memory that is predicted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tests.end_to_end.small_runs import PLACEMENTS, untouched
from tests.end_to_end.test_strategy_rehearsals import MACHINE, NO_LIBRARIES, check
from tests.small_pipelines import picture, small_call

from pipefit import predict
from pipefit.cost_models.workload import Workload
from pipefit.errors import InvalidRequest
from pipefit.planner.apply import apply_options
from pipefit.planner.policy import Policy
from pipefit.planner.rehearse import rehearse
from pipefit.planner.snapshot import differences, snapshot
from pipefit.planner.workloads import observe
from pipefit.strategies import strategy
from pipefit.strategies.feed_forward_chunking import _inputs
from pipefit.strategies.strategy import Option, Quality

ROUNDING = 1e-4
"""Largest difference of a pixel (0 to 1) that smaller batches may make; seen: 6e-6."""

CASES: Mapping[str, tuple[str, Option]] = {
    f"{name}-{option.strategy}": (name, option)
    for name, options in {
        "stable_diffusion": [("guidance_split", "unet", {})],
        "stable_diffusion_xl": [
            ("guidance_split", "unet", {}),
            ("feed_forward_chunking", "unet", {"chunk_size": 64, "dim": 1}),
        ],
        "stable_diffusion_xl_controlnet": [("guidance_split", "controlnet", {})],
        "stable_diffusion_3": [
            ("guidance_split", "transformer", {}),
            ("feed_forward_chunking", "transformer", {"chunk_size": 1}),
        ],
        "cogvideox": [("guidance_split", "transformer", {})],
        "ltx": [("guidance_split", "transformer", {}), ("decode_chunks", "vae", {})],
        "stable_video_diffusion": [
            ("guidance_split", "unet", {}),
            ("feed_forward_chunking", "unet", {"chunk_size": 1}),
            ("decode_chunks", "vae", {"num_frames": 2}),
        ],
    }.items()
    for option in (Option(strategy=s, component=c, parameters=p) for s, c, p in options)
}

APPROXIMATE = ("ltx-decode_chunks", "stable_video_diffusion-decode_chunks")
"""Cases in which frames at the ends of parts do not see their neighbours."""


QUICK = ("stable_diffusion-", "stable_video_diffusion-", "ltx-")

MARKED = [
    pytest.param(case, marks=() if case.startswith(QUICK) else pytest.mark.slow) for case in CASES
]


@pytest.mark.parametrize("case", MARKED)
def test_the_picture_only_rounds_differently(case: str) -> None:
    name, option = CASES[case]
    pipe, expected = untouched(name)
    before = snapshot(pipe, with_values=True)
    with apply_options(pipe, [option], "cpu"):
        under = picture(pipe, name)
    assert under.shape == expected.shape
    apart = (under - expected).abs().max()
    if case in APPROXIMATE:
        assert apart > ROUNDING
    else:
        assert apart <= ROUNDING
    assert differences(before, snapshot(pipe, with_values=True)) == ()


@pytest.mark.parametrize("case", MARKED)
def test_memory_is_what_is_predicted(case: str) -> None:
    name, option = CASES[case]
    pipe, _ = untouched(name)
    call = small_call(name)
    predicted = predict(pipe, [option], call=call, machine=MACHINE)
    check(predicted, rehearse(pipe, predicted.options, call, NO_LIBRARIES))
    plain = predict(pipe, [], call=call, machine=MACHINE)
    phases = zip(predicted.phases, plain.phases, strict=True)
    saved = {p.component: q.activation_bytes - p.activation_bytes for p, q in phases}
    assert saved[str(option.component)] > 0


STREAMED = Option(
    strategy="streaming",
    parameters={"resident_blocks": 1, "num_slots": 2, "max_block_bytes": 16 << 10},
)


PLACED_EXACTLY = ("streaming", "leaves", "blocks", "model_offload", "sequential_offload")


@pytest.mark.parametrize("placed", PLACED_EXACTLY)
def test_a_split_batch_is_the_same_to_the_bit_wherever_the_weights_are(placed: str) -> None:
    pipe, _ = untouched("stable_diffusion")
    split = Option(strategy="guidance_split", component="unet")
    with apply_options(pipe, [split], "cpu"):
        expected = picture(pipe, "stable_diffusion")
    if placed == "streaming":
        options = [
            Option(strategy="streaming", component="unet", parameters=STREAMED.parameters),
            *(Option(strategy="resident", component=c) for c in ("vae", "text_encoder")),
        ]
    else:
        options = PLACEMENTS[placed](pipe)
    before = snapshot(pipe, with_values=True)
    with apply_options(pipe, [split, *options], "cpu"):
        for _ in range(2):  # some hooks are put anew after a call
            assert torch.equal(picture(pipe, "stable_diffusion"), expected)
    assert differences(before, snapshot(pipe, with_values=True)) == ()


PLACED: Mapping[str, Mapping[str, Any]] = {
    "streaming": STREAMED.parameters,
    "group_offload": {"offload_type": "leaf_level", "use_stream": True},
}


@pytest.mark.parametrize("placed", PLACED)
@pytest.mark.parametrize(
    "case",
    [
        "stable_diffusion-guidance_split",
        "stable_video_diffusion-feed_forward_chunking",
        "stable_video_diffusion-decode_chunks",
    ],
)
def test_memory_is_what_is_predicted_where_weights_come_and_go(case: str, placed: str) -> None:
    name, option = CASES[case]
    pipe, _ = untouched(name)
    call = small_call(name)
    weights = Option(strategy=placed, component=option.component, parameters=PLACED[placed])
    predicted = predict(pipe, [option, weights], call=call, machine=MACHINE)
    check(predicted, rehearse(pipe, predicted.options, call, NO_LIBRARIES))


VIDEO_INPUTS = {(10, 1024, True), (10, 256, True), (2048, 5, False), (512, 5, False)}


@pytest.mark.parametrize(
    ("name", "component", "expected"),
    [
        # Blocks over space see 2 x 5 frames of 32 x 32 latents, those over time 5 frames.
        ("stable_video_diffusion", "unet", VIDEO_INPUTS),
        # Two pictures' worth of tokens and, on their own, of the text's.
        ("stable_diffusion_3", "transformer", {(2, 1024, True), (2, 93, True)}),
    ],
)
def test_what_feed_forward_layers_are_given_is_read_off_the_trace(
    name: str, component: str, expected: set[tuple[int, int, bool]]
) -> None:
    workload = observed(name)
    assert set(_inputs(workload.component(component), workload)) == expected


def test_sizes_and_halves_are_offered_where_the_call_allows_them() -> None:
    offered = {}
    for name, component in (
        ("stable_diffusion_3", "transformer"),
        ("stable_video_diffusion", "unet"),
        ("flux", "transformer"),
        ("wan_two_experts", "transformer"),
    ):
        workload = observed(name)
        offered[name] = [
            list(strategy(one).options(workload.component(component), workload, NO_LIBRARIES))
            for one in ("guidance_split", "feed_forward_chunking")
        ]
    assert offered == {
        "stable_diffusion_3": [[{}], [{"chunk_size": 1, "dim": 0}]],
        "stable_video_diffusion": [[{}], [{"chunk_size": 1, "dim": 0}]],
        "flux": [[], []],  # guidance is an argument of the model
        "wan_two_experts": [[], []],  # the pipeline calls it twice
    }


def observed(name: str) -> Workload:
    pipe, _ = untouched(name)
    policy = Policy(budget_bytes={}, quality=Quality.EXACT)  # without variants
    return observe(pipe, small_call(name), gpu=NO_LIBRARIES, policy=policy)[0].workload


def test_a_size_that_does_not_divide_is_refused_before_the_call() -> None:
    pipe, _ = untouched("stable_diffusion")
    option = Option(
        strategy="feed_forward_chunking", component="unet", parameters={"chunk_size": 7, "dim": 1}
    )
    with pytest.raises(InvalidRequest, match=r"unet fails in this call.*divisible by chunk size"):
        predict(pipe, [option], call=small_call("stable_diffusion"), machine=MACHINE)
