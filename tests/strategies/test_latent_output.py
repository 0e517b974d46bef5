"""A call that stops before it decodes makes the same picture later; undone without a trace."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from tests.end_to_end.small_runs import PLACEMENTS, untouched
from tests.small_pipelines import (
    FURTHER_PIPELINES,
    SMALL_PIPELINES,
    picture,
    small_call,
    stable_diffusion_xl,
)

from pipefit import InvalidRequest, UnsupportedPipeline, auto_optimize, plan, predict
from pipefit.planner.apply import apply_options
from pipefit.planner.catalog import find_gpu, reference_machine
from pipefit.planner.rehearse import on_stage, rehearse
from pipefit.planner.snapshot import differences, snapshot
from pipefit.strategies.latent_output import DECODE_LATER_NOTE, Undecoded
from pipefit.strategies.strategy import Option

LATENT_OUTPUT = Option(strategy="latent_output")
PROMPT_FIRST = Option(strategy="prompt_first")


def pictures_of(output: Any) -> torch.Tensor:
    return torch.as_tensor(output.frames if hasattr(output, "frames") else output.images)


def waiting(pipe: Any, name: str, **changed: Any) -> Undecoded:
    found = pipe(**{**small_call(name), **changed})
    assert isinstance(found, Undecoded)
    assert all(tensor.device.type == "cpu" for tensor in found.latents)
    return found


@pytest.mark.parametrize("name", [*SMALL_PIPELINES, *FURTHER_PIPELINES])
def test_decoded_later_the_picture_is_the_same(name: str) -> None:
    pipe, expected = untouched(name)
    cls, before = type(pipe), snapshot(pipe)
    with apply_options(pipe, [LATENT_OUTPUT], "cpu"):
        assert type(pipe).__name__ == cls.__name__
        one = waiting(pipe, name)
        assert torch.equal(pictures_of(one.decode(pipe)), expected)
    assert type(pipe) is cls
    assert differences(before, snapshot(pipe)) == ()
    assert torch.equal(pictures_of(one.decode(pipe)), expected)
    assert torch.equal(picture(pipe, name), expected)


@pytest.mark.parametrize("placement", ["model_offload", "leaves"])
def test_it_waits_under_a_plan_and_is_decoded_under_it_or_after_it(placement: str) -> None:
    pipe, expected = untouched("stable_diffusion_xl")
    before = snapshot(pipe)
    with apply_options(pipe, [LATENT_OUTPUT, *PLACEMENTS[placement](pipe)], "cpu"):
        first, second = (waiting(pipe, "stable_diffusion_xl") for _ in range(2))
        assert torch.equal(pictures_of(first.decode(pipe)), expected)
    assert differences(before, snapshot(pipe)) == ()
    assert torch.equal(pictures_of(second.decode(pipe)), expected)


def test_nothing_of_the_call_outlives_it_but_what_waits() -> None:
    pipe, _ = untouched("flux")
    made: list[weakref.ref[torch.Tensor]] = []

    def note(module: Any, args: Any, output: Any) -> None:
        made.append(weakref.ref(output[0]))

    handles = [m.register_forward_hook(note) for m in (pipe.transformer, pipe.text_encoder_2)]
    gc.disable()
    try:
        with apply_options(pipe, [LATENT_OUTPUT], "cpu"):
            waiting(pipe, "flux")
        assert len(made) == 3
        assert [ref() is None for ref in made] == [True] * 3
    finally:
        gc.enable()
        for handle in handles:
            handle.remove()


def test_the_callers_numbers_are_drawn_as_without_it() -> None:
    pipe, _ = untouched("stable_diffusion")
    plain, later = (torch.Generator().manual_seed(3) for _ in range(2))
    expected = [picture(pipe, "stable_diffusion", generator=plain, eta=1.0) for _ in range(2)]
    torch.manual_seed(5)
    unseeded = [picture(pipe, "stable_diffusion", generator=None) for _ in range(2)]
    with apply_options(pipe, [LATENT_OUTPUT], "cpu"):
        first = waiting(pipe, "stable_diffusion", generator=later, eta=1.0)
        made = [pictures_of(first.decode(pipe))]
        second = waiting(pipe, "stable_diffusion", generator=later, eta=1.0)
        made.append(pictures_of(second.decode(pipe)))
        assert torch.equal(later.get_state(), plain.get_state())
        torch.manual_seed(5)
        one = waiting(pipe, "stable_diffusion", generator=None)
        state = torch.get_rng_state()
        assert torch.equal(pictures_of(one.decode(pipe)), unseeded[0])
        assert torch.equal(torch.get_rng_state(), state)
        two = waiting(pipe, "stable_diffusion", generator=None)
        assert torch.equal(pictures_of(two.decode(pipe)), unseeded[1])
    assert all(map(torch.equal, made, expected))


def test_a_callback_is_called_once_a_step_and_its_changes_hold() -> None:
    pipe, _ = untouched("stable_diffusion_xl")
    steps: list[int] = []

    def without_guidance_from_the_second(pipe: Any, step: int, time: Any, given: Any) -> Any:
        steps.append(step)
        if step == 0:
            pipe._guidance_scale = 1.0
            return {name: tensor.chunk(2)[-1] for name, tensor in given.items()}
        return {}

    changed = {
        "callback_on_step_end": without_guidance_from_the_second,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds", "add_text_embeds", "add_time_ids"],
    }
    expected = picture(pipe, "stable_diffusion_xl", **changed)
    assert not torch.equal(expected, untouched("stable_diffusion_xl")[1])
    with apply_options(pipe, [LATENT_OUTPUT], "cpu"):
        one = waiting(pipe, "stable_diffusion_xl", **changed)
        assert steps == [0, 1] * 2
        assert torch.equal(pictures_of(one.decode(pipe)), expected)
    assert steps == [0, 1] * 2


def test_a_callback_may_ask_components_for_a_preview() -> None:
    pipe, expected = untouched("stable_diffusion")
    previews: list[torch.Tensor] = []

    def preview(pipe: Any, step: int, time: Any, given: Any) -> Any:
        previews.append(pipe.vae.decode(given["latents"], return_dict=False)[0])
        return {}

    def early_preview(step: int, time: Any, latents: torch.Tensor) -> None:
        previews.append(pipe.vae.decode(latents, return_dict=False)[0])

    early = {"callback": early_preview, "callback_steps": 1}  # deprecated, and still taken
    for callback in ({"callback_on_step_end": preview}, early):
        previews.clear()
        assert torch.equal(picture(pipe, "stable_diffusion", **callback), expected)
        plain = list(previews)
        previews.clear()
        with apply_options(pipe, [LATENT_OUTPUT], "cpu"):
            one = waiting(pipe, "stable_diffusion", **callback)
            assert len(previews) == len(plain)
            assert all(map(torch.equal, previews, plain))
            assert torch.equal(pictures_of(one.decode(pipe)), expected)


def test_prompts_that_are_remembered_are_those_that_were_encoded() -> None:
    pipe, expected = untouched("flux")
    with apply_options(pipe, [LATENT_OUTPUT], "cpu"):
        one = waiting(pipe, "flux")
    with apply_options(pipe, [PROMPT_FIRST], "cpu"):
        assert torch.equal(pictures_of(one.decode(pipe)), expected)
        assert torch.equal(picture(pipe, "flux"), expected)
    with apply_options(pipe, [PROMPT_FIRST, LATENT_OUTPUT], "cpu"):
        waiting(pipe, "flux")
        one = waiting(pipe, "flux")  # its prompt was encoded by the call before
    assert torch.equal(pictures_of(one.decode(pipe)), expected)


@pytest.mark.parametrize("name", ["flux", "sana", "pixart_sigma"])
def test_a_decoder_that_the_plan_left_on_the_cpu_decodes_on_the_gpu(name: str) -> None:
    pipe, _ = untouched(name)
    call = {key: value for key, value in small_call(name).items() if key != "generator"}
    machine = reference_machine(["rtx-4060"])
    found = plan(pipe, "4GB", call=call, machine=machine, with_="latent_output", rehearse=False)
    devices: list[Any] = []
    with on_stage(pipe, machine.gpus[0]) as stage:
        twin = stage.pipe
        with apply_options(twin, found.options, torch.device("cuda", 0), plan=found):
            one = twin(**call)
            assert next(twin.vae.parameters()).device.type == "cpu"

            def decoded(module: Any, args: Any, output: Any) -> None:
                devices.append((args[0].device.type, output.device.type))

            handle = twin.vae.decoder.register_forward_hook(decoded)
            one.decode(twin)
            handle.remove()
            assert next(twin.vae.parameters()).device.type == "cpu"
    assert devices == [("cuda", "cuda")]


def test_a_picture_of_no_numbers_is_decoded_as_such() -> None:
    pipe, _ = untouched("flux")
    with apply_options(pipe, [LATENT_OUTPUT], "cpu"):
        one = waiting(pipe, "flux", output_type="pt")
        one.latents[0].fill_(torch.nan)
        assert pictures_of(one.decode(pipe)).isnan().all()


def test_an_interrupted_call_is_decoded_from_where_it_was() -> None:
    pipe, _ = untouched("flux")

    def interrupt(pipe: Any, *given: Any) -> Any:
        pipe._interrupt = True
        return {}

    expected = picture(pipe, "flux", callback_on_step_end=interrupt)
    with apply_options(pipe, [LATENT_OUTPUT], "cpu"):
        one = waiting(pipe, "flux", callback_on_step_end=interrupt)
        assert torch.equal(pictures_of(one.decode(pipe)), expected)


@pytest.mark.parametrize("kind", ["pil", "pt"])
def test_two_pictures_of_any_kind_of_output_are_decoded_together(kind: str) -> None:
    pipe, _ = untouched("flux")
    call = {"num_images_per_prompt": 2, "output_type": kind}
    expected = pipe(**{**small_call("flux"), **call}).images
    with apply_options(pipe, [LATENT_OUTPUT], "cpu"):
        made = waiting(pipe, "flux", **call).decode(pipe).images
    assert len(made) == 2
    assert torch.equal(made, expected) if kind == "pt" else made == expected


def test_an_autoencoder_that_is_cast_for_decoding_is_cast_back_while_it_waits() -> None:
    pipe = stable_diffusion_xl()  # its own: halved weights do not come back
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.half()
    expected = picture(pipe, "stable_diffusion_xl")
    with apply_options(pipe, [LATENT_OUTPUT], "cpu"):
        one = waiting(pipe, "stable_diffusion_xl")
        assert pipe.vae.dtype == torch.float16
        assert torch.equal(pictures_of(one.decode(pipe)), expected)
        assert pipe.vae.dtype == torch.float16


def test_a_call_that_decodes_nothing_is_as_ever() -> None:
    pipe, _ = untouched("flux")
    expected = picture(pipe, "flux", output_type="latent")
    with apply_options(pipe, [LATENT_OUTPUT], "cpu"):
        assert torch.equal(picture(pipe, "flux", output_type="latent"), expected)
    with pytest.raises(InvalidRequest, match="decodes nothing"):
        predict(
            pipe,
            ["latent_output"],
            call={**small_call("flux"), "output_type": "latent"},
            machine=reference_machine(["rtx-4060"]),
        )


def test_several_calls_of_the_decoder_are_refused_before_and_after() -> None:
    name = "stable_video_diffusion"
    pipe, _ = untouched(name)
    with pytest.raises(InvalidRequest, match="decodes 3 times"):
        predict(
            pipe,
            ["latent_output"],
            call={**small_call(name), "decode_chunk_size": 2},
            machine=reference_machine(["rtx-4060"]),
        )
    with apply_options(pipe, [LATENT_OUTPUT], "cpu"):
        one = waiting(pipe, name, decode_chunk_size=2)
        with pytest.raises(UnsupportedPipeline, match="decodes more than once"):
            one.decode(pipe)
    with pytest.raises(InvalidRequest, match="give the pipeline that was called"):
        one.decode(untouched("flux")[0])


def test_what_depends_on_more_than_the_decoded_is_refused(monkeypatch: Any) -> None:
    pipe, _ = untouched("flux")
    reached: list[torch.Tensor] = []
    step = pipe.scheduler.step

    def stepped(*args: Any, **kwargs: Any) -> Any:
        found = step(*args, **kwargs)
        reached.append(found[0])
        return found

    def tinted(picture: torch.Tensor, **_: Any) -> Any:
        return picture + reached[-1].mean()

    monkeypatch.setattr(pipe.scheduler, "step", stepped)
    monkeypatch.setattr(pipe.image_processor, "postprocess", tinted)
    with apply_options(pipe, [LATENT_OUTPUT], "cpu"):
        one = waiting(pipe, "flux")
        with pytest.raises(UnsupportedPipeline, match="depends on more than what it decodes"):
            one.decode(pipe)


@pytest.mark.parametrize("name", ["stable_diffusion_xl", "stable_diffusion_xl_img2img", "wan"])
def test_predicted_and_rehearsed_peaks_leave_decoding_out(name: str) -> None:
    pipe, _ = untouched(name)
    machine = reference_machine(["rtx-4060"])
    plain, cut = (
        predict(pipe, with_, call=small_call(name), machine=machine)
        for with_ in ([], ["latent_output"])
    )
    assert [p.entry for p in plain.phases if p.name == "decode"] == ["decode"]
    assert [p.name for p in cut.phases] == [p.name for p in plain.phases if p.name != "decode"]
    assert cut.peak_vram[0].allocated_bytes < plain.peak_vram[0].allocated_bytes
    assert cut.latency.call_s < plain.latency.call_s
    assert LATENT_OUTPUT in cut.options
    found = rehearse(pipe, cut.options, small_call(name), find_gpu("rtx-4060"))
    assert [p.name for p in found.phases] == [p.name for p in cut.phases]
    for rehearsed, predicted in zip(found.phases, cut.phases, strict=True):
        assert rehearsed.allocated_bytes == pytest.approx(predicted.allocated_bytes, rel=0.02)


@pytest.mark.parametrize(("quality", "apart"), [("exact", 0.0), ("high", 0.1)])
def test_pictures_wait_under_one_plan_and_are_decoded_after_it(quality: str, apart: float) -> None:
    pipe, expected = untouched("flux")
    call = {key: value for key, value in small_call("flux").items() if key != "generator"}
    applied = auto_optimize(
        pipe, "8GB", call=call, with_="latent_output", device="cpu", quality=quality
    )
    assert "latent_output" in {option.strategy for option in applied.plan.options}
    assert DECODE_LATER_NOTE in applied.plan.prediction.assumptions
    found = [waiting(pipe, "flux") for _ in range(2)]
    assert (found[0].latents[0].dtype == torch.bfloat16) == (quality == "high")
    applied.undo()
    for one in found:
        assert (pictures_of(one.decode(pipe)) - expected).abs().max() <= apart
