"""`prompt_first:drop=true`: the prompt is encoded while loading, and the text encoders are gone."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from tests.end_to_end.small_runs import save, untouched
from tests.small_pipelines import flux, picture, small_call

import pipefit
from pipefit.planner import load as loading
from pipefit.planner.apply import apply_options
from pipefit.planner.build import build_pipeline
from pipefit.planner.call import default_inputs
from pipefit.planner.catalog import reference_machine
from pipefit.planner.prompt import prompt_calls, text_encoders
from pipefit.planner.rehearse import rehearse
from pipefit.strategies.live import module_components
from pipefit.strategies.strategy import Option

DROP = "prompt_first:drop=true"
MACHINE = reference_machine(["rtx-4060"])

SLOW = ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_xl_img2img",
        "stable_diffusion_xl_controlnet", "stable_diffusion_3", "pixart_sigma",
        "cogvideox", "wan", "wan_two_experts", "ltx")  # fmt: skip
QUICK = ("flux", "sana")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @functools.cache
    def folder(name: str) -> Path:
        target = tmp_path_factory.mktemp(name)
        save(untouched(name)[0], target)
        return target

    return folder


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def loaded(folder: Path, name: str, *strategies: str, **asked: Any) -> Any:
    asked = {"quality": "exact", "dtype": "float32", "rehearse": False, **asked}
    asked = {"call": small_call(name), "with_": [DROP, *strategies], **asked}
    return quiet(pipefit.load(folder, "4GB", device="cpu", **asked))


@pytest.fixture
def encoders(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """What the prompts are encoded with, watched: every module and weight of it."""
    watched: list[weakref.ref[Any]] = []
    encoded = loading.encoded

    def watching(pipe: Any, *rest: Any) -> Any:
        for module in module_components(pipe).values():
            watched.extend(map(weakref.ref, (*module.modules(), *module.parameters())))
        return encoded(pipe, *rest)

    monkeypatch.setattr(loading, "encoded", watching)
    return watched


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_the_picture_is_the_same_and_the_text_encoders_are_gone(
    name: str, saved: Callable[[str], Path], encoders: list[weakref.ref[Any]]
) -> None:
    plain = quiet(DiffusionPipeline.from_pretrained(saved(name)))
    names, expected = text_encoders(plain), picture(plain, name)
    pipe = loaded(saved(name), name, "resident")
    gc.collect()
    assert encoders
    assert [found for one in encoders if (found := one()) is not None] == []
    assert all(getattr(pipe, one) is None for one in names)
    assert torch.equal(picture(pipe, name), expected)
    with pytest.raises(pipefit.InvalidRequest, match=r"dropped after .* 'a dog': load again"):
        picture(pipe, name, prompt="a dog")
    assert any("cannot be undone" in said for said in pipe.pipefit.plan.assumptions)
    pipe.pipefit.undo()
    assert all(getattr(pipe, one) is None for one in names)
    assert torch.equal(picture(pipe, name), expected)


@pytest.mark.parametrize(
    "placement",
    [
        pytest.param("model_offload", marks=pytest.mark.slow),
        pytest.param("sequential_offload", marks=pytest.mark.slow),
        "group_offload:offload_type=leaf_level",
    ],
)
def test_every_placement_goes_on_the_text_encoders_and_then_on_the_rest(
    placement: str, saved: Callable[[str], Path], encoders: list[weakref.ref[Any]]
) -> None:
    name = "flux"
    expected = picture(loaded(saved(name), name, "resident"), name)
    pipe = loaded(saved(name), name, placement)
    gc.collect()
    assert [found for one in encoders if (found := one()) is not None] == []
    assert torch.allclose(picture(pipe, name), expected, atol=1e-5)  # weights begin elsewhere
    pipe.pipefit.undo()
    assert torch.allclose(picture(pipe, name), expected, atol=1e-5)


@pytest.mark.parametrize(
    "placement", ["resident", pytest.param("model_offload", marks=pytest.mark.slow)]
)
def test_predicted_and_rehearsed_peaks_are_the_same_and_below_those_without(
    placement: str, saved: Callable[[str], Path]
) -> None:
    folder, call = saved("flux"), small_call("flux")
    plain = pipefit.predict(folder, [placement], call=call, machine=MACHINE)
    found = pipefit.predict(folder, [DROP, placement], call=call, machine=MACHINE)
    options = found.options
    rehearsed, whole = (
        rehearse(build_pipeline(folder)[0], chosen, call, MACHINE.gpus[0])
        for chosen in (options, [o for o in options if o.strategy != "prompt_first"])
    )
    assert [(p.component, p.entry) for p in rehearsed.phases] == [
        (p.component, p.entry) for p in found.phases
    ]
    for predicted, counted in zip(found.phases, rehearsed.phases, strict=True):
        assert predicted.allocated_bytes == pytest.approx(counted.allocated_bytes, rel=0.02)
    assert rehearsed.placing_host_bytes < whole.placing_host_bytes
    if placement == "model_offload":  # resident weights are not there in either
        assert rehearsed.host_bytes < whole.host_bytes
        assert found.host_ram_bytes < plain.host_ram_bytes
    else:
        for with_drop, without in zip(rehearsed.phases, whole.phases, strict=True):
            assert with_drop.allocated_bytes < without.allocated_bytes
        for one, other in zip(found.phases, plain.phases, strict=True):
            assert one.weights_bytes < other.weights_bytes


def test_a_catalogue_pipeline_needs_less_of_everything() -> None:
    machine = reference_machine(["rtx-4090"])
    plain = pipefit.predict("flux.1-dev", ["model_offload"], machine=machine)
    found = pipefit.predict("flux.1-dev", [DROP, "model_offload"], machine=machine)
    t5_bytes = 9 << 30
    assert found.host_ram_bytes < plain.host_ram_bytes - t5_bytes
    assert found.latency.first_call_s < plain.latency.first_call_s
    assert [p.seconds for p in found.phases if p.name == "encode_prompt"] == [0, 0]
    resident = pipefit.predict("flux.1-dev", [DROP], machine=machine)
    without = pipefit.predict("flux.1-dev", [], machine=machine)
    encoding = next(p for p in resident.phases if p.name == "encode_prompt")
    denoising = next(p for p in resident.phases if p.name == "denoise")
    weights_bytes = next(p for p in without.phases if p.name == "denoise").weights_bytes
    assert encoding.weights_bytes + denoising.weights_bytes == pytest.approx(
        weights_bytes, rel=1e-3
    )


def test_a_plan_uses_the_room_that_the_text_encoders_leave() -> None:
    machine = reference_machine(["rtx-4090"])
    plans = [
        pipefit.plan("flux.1-dev", "23.8GB", machine=machine, with_=chosen, rehearse=False)
        for chosen in ([], [DROP])
    ]
    assert plans[1].prediction.latency.call_s <= plans[0].prediction.latency.call_s
    assert [o.parameters for o in plans[1].options if o.strategy == "prompt_first"] == [
        {"drop": True}
    ]


def test_a_pipeline_that_is_loaded_is_refused_before_anything_moves() -> None:
    pipe, _ = untouched("flux")
    drop = Option(strategy="prompt_first", parameters={"drop": True})
    with pytest.raises(pipefit.InvalidRequest, match=r"pipefit\.load"):
        apply_options(pipe, [drop], "cpu")
    with pytest.raises(pipefit.InvalidRequest, match=r"pipefit\.load"):
        pipefit.auto_optimize(pipe, "4GB", device="cpu", with_=[DROP])


def test_a_pipeline_without_its_text_encoders_is_not_planned_for_again(
    saved: Callable[[str], Path],
) -> None:
    pipe = loaded(saved("sana"), "sana")
    pipe.pipefit.undo()
    with pytest.raises(pipefit.UnsupportedPipeline, match="load it again"):
        pipefit.auto_optimize(pipe, "4GB", device="cpu", call=small_call("sana"))


def test_a_plan_holds_in_its_rehearsal(saved: Callable[[str], Path]) -> None:
    folder, call = saved("stable_diffusion_xl"), small_call("stable_diffusion_xl")
    asked = {"call": call, "machine": MACHINE, "with_": [DROP], "rehearse": True}
    made = pipefit.plan(folder, "2GB", **asked)
    assert made.rehearsal is not None
    assert made.rehearsal.within_budget
    # Nothing is loaded along with a text encoder that is gone by then.
    assert all("text_encoder" not in str(o.parameters.get("load_with")) for o in made.options)


@pytest.mark.slow
def test_text_encoders_that_the_host_cannot_hold_are_refused() -> None:
    """They come back from the GPU before they go: 9.1 GiB beside the process."""
    asked: dict[str, Any] = {"machine": reference_machine(["a100-80gb"]), "rehearse": False}
    pipefit.plan("flux.1-dev", "60GB", with_=["resident"], ram="9GB", **asked)
    pipefit.plan("flux.1-dev", "60GB", with_=[DROP, "resident"], ram="14GB", **asked)
    with pytest.raises(pipefit.NoPlanFits):
        pipefit.plan("flux.1-dev", "60GB", with_=[DROP, "resident"], ram="9GB", **asked)


def test_several_gpus_are_refused() -> None:
    machine = reference_machine(["rtx-4090", "rtx-4090"])
    with pytest.raises(pipefit.InvalidRequest, match="several GPUs"):
        pipefit.plan("flux.1-dev", "20GB", machine=machine, with_=[DROP])


@pytest.mark.parametrize("call", [None, {"height": 64, "width": 64, "max_sequence_length": 16}])
def test_a_prompt_that_nobody_gave_is_not_encoded(
    call: Any, saved: Callable[[str], Path], encoders: list[weakref.ref[Any]]
) -> None:
    with pytest.raises(pipefit.InvalidRequest, match=r"names no prompt: load with call="):
        loaded(saved("flux"), "flux", call=call)
    assert not encoders
    # What needs no weights goes on with any prompt.
    pipefit.predict(saved("flux"), [DROP], call=call, machine=MACHINE)


def test_a_rehearsal_encodes_in_the_dtype_that_is_loaded() -> None:
    """HunyuanDiT gives encode_prompt the dtype of its denoiser."""
    pipe, info = build_pipeline("hunyuan-dit", dtype="float32")
    call = default_inputs(pipe, info.entry, {"prompt": "a cat", "num_inference_steps": 2})
    cast = [
        Option(strategy="precision", component=name, parameters={"dtype": "bfloat16"})
        for name in module_components(pipe)
    ]
    drop = Option(strategy="prompt_first", parameters={"drop": True})
    placed = [Option(strategy="resident", component=name) for name in module_components(pipe)]
    gpu = reference_machine(["a100-80gb"]).gpus[0]
    found = rehearse(pipe, [drop, *cast, *placed], call, gpu)
    assert [phase.name for phase in found.phases][-1] == "decode"


def bria() -> Any:
    """BRIA casts embeddings in encode_prompt to the dtype of the denoiser, asked or not."""
    parts = flux().components
    return diffusers.BriaPipeline(
        transformer=diffusers.BriaTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=[4, 4, 8],
        ),
        scheduler=parts["scheduler"],
        vae=parts["vae"],
        text_encoder=parts["text_encoder_2"],
        tokenizer=parts["tokenizer_2"],
    )


def test_embeddings_are_in_the_dtype_that_the_denoiser_is_loaded_in(tmp_path: Path) -> None:
    save(bria(), tmp_path)
    chosen = ["resident", "precision:dtype=bfloat16@transformer"]
    pipe = loaded(tmp_path, "flux", *chosen, quality="high")
    assert pipe.transformer.dtype == torch.bfloat16
    latents = picture(pipe, "flux", output_type="latent")
    assert latents.dtype == torch.bfloat16
    whole = loaded(tmp_path, "flux", quality="high", with_=chosen)
    assert torch.equal(picture(whole, "flux", output_type="latent"), latents)
    call = {**small_call("flux"), "output_type": "latent"}
    rehearse(build_pipeline(tmp_path)[0], pipe.pipefit.plan.options, call, MACHINE.gpus[0])


def test_calls_whose_prompt_cannot_be_encoded_beforehand_are_refused() -> None:
    """Embeddings come as tensors; a video from a picture has no prompt; weights may be shared."""
    flux, _ = untouched("flux")
    call = small_call("flux")
    del call["prompt"]
    call |= {"prompt_embeds": torch.zeros(1, 16, 32), "pooled_prompt_embeds": torch.zeros(1, 32)}
    with pytest.raises(pipefit.InvalidRequest, match=r"a tensor \(prompt_embeds\)"):
        prompt_calls(flux, call)
    video = "stable_video_diffusion"
    with pytest.raises(pipefit.InvalidRequest, match="no text encoders"):
        prompt_calls(untouched(video)[0], small_call(video))


def test_what_shares_a_weight_with_a_text_encoder_is_refused() -> None:
    pipe = build_pipeline("flux.1-dev")[0]
    pipe.transformer.register_parameter("shared", next(pipe.text_encoder.parameters()))
    with pytest.raises(pipefit.InvalidRequest, match="shares weights with transformer"):
        prompt_calls(pipe, {"prompt": "a cat"})


def test_a_call_that_asks_for_the_text_encoder_elsewhere_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe, _ = untouched("stable_diffusion")
    prepare = type(pipe).prepare_latents

    def asking(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert self.text_encoder.dtype is not None
        return prepare(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe), "prepare_latents", asking)
    with pytest.raises(pipefit.InvalidRequest, match="cannot do with its text encoders dropped"):
        prompt_calls(pipe, small_call("stable_diffusion"))
