"""A prompt is encoded once; what was encoded is the same to the bit, and taken back on undo."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.end_to_end.small_runs import untouched
from tests.small_pipelines import picture, small_call

from pipefit import InvalidRequest, UnsupportedPipeline, predict
from pipefit.planner.apply import apply_options
from pipefit.planner.catalog import find_gpu, reference_machine
from pipefit.planner.rehearse import rehearse
from pipefit.planner.snapshot import differences, snapshot
from pipefit.strategies import strategy
from pipefit.strategies.prompt_first import MAX_REMEMBERED, Remembered
from pipefit.strategies.strategy import Option

PROMPT_FIRST = Option(strategy="prompt_first")


class Counter:
    def __init__(self, module: Any) -> None:
        self.calls = 0
        self.handle = module.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self.calls += 1


@pytest.mark.parametrize("name", ["stable_diffusion_xl", "flux", "wan", "ltx"])
def test_the_second_picture_of_a_prompt_needs_no_text_encoder(name: str) -> None:
    pipe, expected = untouched(name)
    before = snapshot(pipe)
    counter = Counter(pipe.text_encoder)
    with apply_options(pipe, [PROMPT_FIRST], "cpu"):
        assert torch.equal(picture(pipe, name), expected)
        once = counter.calls
        assert once > 0
        assert torch.equal(picture(pipe, name), expected)
        assert counter.calls == once
        picture(pipe, name, prompt="something else")
        assert counter.calls > once
        assert torch.equal(picture(pipe, name), expected)
    counter.handle.remove()
    assert differences(before, snapshot(pipe)) == ()
    assert torch.equal(picture(pipe, name), expected)


def test_what_is_remembered_is_nobody_s_to_change() -> None:
    made = [torch.ones(2), {"pooled": torch.zeros(3)}, None]
    remembered = Remembered()

    def encode(prompt: str, scale: float = 1.0) -> Any:
        return made

    first = remembered(encode, "a")
    first[0].mul_(0)
    again = remembered(encode, prompt="a", scale=1.0)
    assert again is not made
    assert again[0].tolist() == [1, 1]
    again[1]["pooled"].add_(1)
    assert remembered(encode, "a")[1]["pooled"].tolist() == [0, 0, 0]
    for number in range(2 * MAX_REMEMBERED):
        remembered(encode, str(number))
    assert len(remembered.results) == MAX_REMEMBERED


def test_arguments_are_remembered_as_they_were() -> None:
    remembered, calls = Remembered(), []

    def encode(prompt: Any, image: Any = None, generator: Any = None) -> Any:
        calls.append(prompt)
        return torch.ones(1)

    prompt, image = ["a cat"], np.zeros(3)
    remembered(encode, prompt, image)
    remembered(encode, ["a cat"], np.zeros(3))
    assert len(calls) == 1
    prompt[0] = "a dog"
    remembered(encode, prompt, image)
    image[1] = 1
    remembered(encode, prompt, image)
    remembered(encode, prompt, np.zeros(4))
    assert len(calls) == 4
    embedded = torch.zeros(2)
    remembered(encode, embedded)
    embedded.add_(1)
    remembered(encode, embedded)
    assert len(calls) == 6
    for _ in range(2):  # whose state nobody compares
        remembered(encode, "a", generator=torch.Generator())
    assert len(calls) == 8


def test_later_calls_are_predicted_without_encoding() -> None:
    pipe, _ = untouched("flux")
    machine = reference_machine(["rtx-4060"])
    plain = predict(pipe, [], call=small_call("flux"), machine=machine)
    first = predict(pipe, ["prompt_first"], call=small_call("flux"), machine=machine)
    encoding = [p for p in plain.phases if p.name == "encode_prompt"]
    saved_s = plain.latency.call_s - first.latency.call_s
    assert saved_s == pytest.approx(sum(p.seconds for p in encoding), rel=1e-6)
    assert first.latency.first_call_s == pytest.approx(plain.latency.first_call_s)
    assert [p.allocated_bytes for p in first.phases] == [p.allocated_bytes for p in plain.phases]


def test_it_rehearses_like_the_call_without_it() -> None:
    pipe, _ = untouched("flux")
    gpu = find_gpu("rtx-4060")
    resident = [Option(strategy="resident", component=c) for c in ("transformer", "vae")]
    resident += [Option(strategy="resident", component=f"text_encoder{n}") for n in ("", "_2")]
    plain, first = (
        rehearse(pipe, options, small_call("flux"), gpu)
        for options in (resident, [PROMPT_FIRST, *resident])
    )
    assert [p.allocated_bytes for p in first.phases] == [p.allocated_bytes for p in plain.phases]


def test_a_pipeline_without_the_method_is_refused() -> None:
    with pytest.raises(UnsupportedPipeline, match="no encode_prompt"):
        strategy("prompt_first").apply(object(), None, {}, "cpu")
    pipe, _ = untouched("stable_video_diffusion")
    with pytest.raises(InvalidRequest, match="encodes no prompt"):
        predict(
            pipe,
            ["prompt_first"],
            call=small_call("stable_video_diffusion"),
            machine=reference_machine(["rtx-4060"]),
        )
