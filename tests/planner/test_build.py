"""Pipelines without weights: what a real load gives, but for the data."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from tests.small_pipelines import SMALL_PIPELINES

from pipefit.errors import InvalidRequest, UnknownName, UnsupportedPipeline
from pipefit.planner.build import BuiltInfo, build_pipeline
from pipefit.planner.catalog import pipeline_entry, pipeline_names
from pipefit.planner.virtual import KNOWN_VALUE_LIMIT_ELEMENTS

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@functools.cache
def built(name: str, dtype: str | None = None) -> tuple[Any, BuiltInfo]:
    return build_pipeline(name, dtype=dtype)


@functools.cache
def saved(name: str, folder: Path) -> Path:
    """A small pipeline on disk, weights and all, without the vocabulary of its tokenizers."""
    SMALL_PIPELINES[name]().save_pretrained(folder)
    for vocabulary in folder.glob("tokenizer*/tokenizer.json"):
        vocabulary.unlink()
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("flux", tmp_path_factory.mktemp("flux"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A folder of configurations that a test may damage."""
    target = tmp_path / "pipeline"
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target


def modules(pipe: Any) -> dict[str, torch.nn.Module]:
    return {n: c for n, c in pipe.components.items() if isinstance(c, torch.nn.Module)}


def tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def test_no_weight_of_a_catalogue_pipeline_is_there() -> None:
    pipe, info = built("flux.1-dev")
    assert isinstance(pipe, diffusers.FluxPipeline)
    assert info.name == "flux.1-dev"
    assert info.stand_ins == ("tokenizer", "tokenizer_2")
    for module in modules(pipe).values():
        assert all(parameter.is_meta for parameter in module.parameters())
        assert not module.training


def test_recommended_dtypes_are_taken_unless_others_are_asked_for() -> None:
    assert set(built("flux.1-dev")[1].dtype.values()) == {"bfloat16"}
    recommended = built("wan2.1-t2v-1.3b")[1].dtype
    assert (recommended["transformer"], recommended["vae"]) == ("bfloat16", "float32")
    _, info = build_pipeline("kandinsky-2-2-decoder", dtype={"movq": "fp32"})
    assert info.dtype == {"unet": "float16", "movq": "float32"}
    _, info = build_pipeline("kandinsky-2-2-decoder", dtype={"default": "bf16"})
    assert info.dtype == {"unet": "bfloat16", "movq": "bfloat16"}


def test_t5_keeps_its_output_projections_in_float32_when_loaded_in_float16() -> None:
    """A naive estimate of T5-XXL in float16 is 9.5 GB; it takes 11.5 GB."""
    encoder = built("flux.1-dev", "float16")[0].text_encoder_2
    for name, parameter in encoder.named_parameters():
        assert parameter.dtype == (torch.float32 if ".wo." in name else torch.float16), name
    num_bytes = sum(p.numel() * p.element_size() for p in encoder.parameters())
    assert num_bytes == 2 * 4_762_310_656 + 2 * 24 * 4096 * 10240
    in_bfloat16 = built("flux.1-dev")[0].text_encoder_2
    assert {p.dtype for p in in_bfloat16.parameters()} == {torch.bfloat16}


def test_wan_keeps_its_list_in_float32_in_bfloat16_too() -> None:
    transformer = built("wan2.1-t2v-1.3b")[0].transformer
    kept = {n for n, p in transformer.named_parameters() if p.dtype == torch.float32}
    assert "scale_shift_table" in kept
    assert "condition_embedder.time_embedder.linear_1.weight" in kept
    assert "blocks.0.norm2.weight" in kept
    assert "blocks.0.attn1.to_q.weight" not in kept
    listed = set(transformer._keep_in_fp32_modules)
    assert all(listed & set(name.split(".")) for name in kept)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("flux", "float16"), ("flux", "bfloat16"), ("sana", "bfloat16"), ("wan", "bfloat16")],
)
def test_every_tensor_is_as_a_real_load_leaves_it(
    name: str, dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = saved(name, tmp_path_factory.getbasetemp() / name)
    pipe, _ = build_pipeline(folder, dtype=dtype)
    for component, module in modules(pipe).items():
        loaded = type(module).from_pretrained(folder / component, dtype=FLOATS[dtype])
        assert module.training == loaded.training
        made, real = dict(tensors(module)), dict(tensors(loaded))
        assert list(made) == list(real)
        unsaved = real.keys() - loaded.state_dict(keep_vars=True).keys()
        for key, tensor in made.items():
            facts = (tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad)
            wanted = real[key]
            assert facts == (wanted.dtype, wanted.shape, wanted.stride(), wanted.requires_grad), key
            if key in unsaved and tensor.numel() <= KNOWN_VALUE_LIMIT_ELEMENTS:
                torch.testing.assert_close(tensor, wanted, msg=key)
            else:
                assert tensor.is_meta, key
        for same in (made, real):
            same["ties"] = {tuple(k for k, u in same.items() if u is t) for t in same.values()}
        assert made["ties"] == real["ties"]


def test_tied_weights_are_one_tensor() -> None:
    encoder = built("flux.1-dev", "float16")[0].text_encoder_2
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight


def test_a_folder_gives_the_same_models_as_the_catalogue(folder: Path) -> None:
    pipe, info = build_pipeline(str(folder))
    assert info.entry is None
    assert info.pipeline_class == "FluxPipeline"
    assert set(modules(pipe)) == {"text_encoder", "text_encoder_2", "transformer", "vae"}
    assert pipe.tokenizer(["a horse"], padding="max_length").input_ids


def test_a_component_that_needs_tiling_is_tiled_and_said_to_be() -> None:
    pipe, info = built("allegro")
    assert info.required == {"vae": {"vae_tiling": {}}}
    assert pipe.vae.use_tiling
    assert built("flux.1-dev")[1].required == {}
    assert not built("flux.1-dev")[0].vae.use_tiling


def test_a_pipeline_that_builds_a_component_of_its_own_is_weightless_too() -> None:
    pipe, _ = built("animatediff-sd15-v1-5-2")
    assert isinstance(pipe.unet, diffusers.UNetMotionModel)
    assert {p.device.type for p in pipe.unet.parameters()} == {"meta"}
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.float16}


def test_large_tables_are_not_computed() -> None:
    """Stable Diffusion 3's position table is in the checkpoint; computing it takes seconds."""
    pipe, _ = built("stable-diffusion-3-medium")
    assert pipe.transformer.pos_embed.pos_embed.shape == (1, 36864, 1536)
    assert pipe.transformer.pos_embed.pos_embed.is_meta
    assert pipe.transformer.pos_embed.pos_embed.dtype == torch.float16


def test_building_leaves_the_process_as_it_was() -> None:
    before = (
        torch.get_default_dtype(),
        diffusers.utils.logging.get_verbosity(),
        transformers.utils.logging.get_verbosity(),
        torch.nn.init.normal_,
        torch.nn.Module.register_parameter,
    )
    build_pipeline("kandinsky-2-2-decoder")
    with pytest.raises(UnknownName):
        build_pipeline("kandinsky-2-2-decoder", dtype={"text_encoder": "float16"})
    assert before == (
        torch.get_default_dtype(),
        diffusers.utils.logging.get_verbosity(),
        transformers.utils.logging.get_verbosity(),
        torch.nn.init.normal_,
        torch.nn.Module.register_parameter,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", pipeline_names())
def test_every_catalogue_pipeline_builds_with_its_parameter_counts(name: str) -> None:
    pipe, _ = build_pipeline(name)
    for component, entry in pipeline_entry(name)["components"].items():
        module = getattr(pipe, component)
        if isinstance(module, diffusers.UNetMotionModel):
            continue  # the pipeline's own; the catalogue counts the two that it is made of
        assert sum(p.numel() for p in module.parameters()) == entry["parameters"]
        assert all(parameter.is_meta for parameter in module.parameters())


# -- bad input: one sentence, the name in it


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"no model_index\.json in"):
        build_pipeline(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_damaged_index_is_refused(copy: Path, content: str) -> None:
    (copy / "model_index.json").write_text(content)
    with pytest.raises(InvalidRequest, match=r"model_index\.json"):
        build_pipeline(copy)


def test_a_damaged_component_is_refused(copy: Path) -> None:
    (copy / "vae" / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRequest, match=r"vae.config\.json cannot be read as JSON"):
        build_pipeline(copy)


def change_index(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | changes))


def test_classes_that_do_not_exist_are_answered_with_the_closest(copy: Path) -> None:
    change_index(copy, transformer=["diffusers", "FluxTransformer3DModel"])
    with pytest.raises(UnknownName, match="FluxTransformer2DModel"):
        build_pipeline(copy)
    change_index(copy, transformer=["flux_kontext", "FluxTransformer2DModel"])
    with pytest.raises(UnknownName, match="flux_kontext"):
        build_pipeline(copy)
    change_index(copy, _class_name="FluxPipelin")
    with pytest.raises(UnknownName, match="FluxPipeline"):
        build_pipeline(copy)


@pytest.mark.parametrize("name", [None, ["my_code", "MyPipeline"]])
def test_a_pipeline_with_code_of_its_own_is_refused(copy: Path, name: Any) -> None:
    change_index(copy, _class_name=name)
    with pytest.raises(InvalidRequest, match="_class_name"):
        build_pipeline(copy)


def test_what_is_no_pipeline_is_refused(copy: Path) -> None:
    change_index(copy, _class_name="AutoencoderKL")
    with pytest.raises(InvalidRequest, match="not a pipeline"):
        build_pipeline(copy)


def test_components_that_are_missing_or_too_many_are_named(copy: Path) -> None:
    change_index(copy, unet=["diffusers", "UNet2DConditionModel"])
    with pytest.raises(InvalidRequest, match="'unet', but there is no folder"):
        build_pipeline(copy)
    shutil.copytree(copy / "vae", copy / "unet")
    change_index(copy, unet=["diffusers", "AutoencoderKL"])
    with pytest.raises(UnknownName, match="unet"):
        build_pipeline(copy)
    index = json.loads((copy / "model_index.json").read_text())
    del index["unet"], index["vae"]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidRequest, match="FluxPipeline needs vae"):
        build_pipeline(copy)


def test_a_component_without_configuration_is_refused(copy: Path) -> None:
    (copy / "vae" / "config.json").unlink()
    with pytest.raises(InvalidRequest, match="no configuration in"):
        build_pipeline(copy)


def test_a_configuration_that_does_not_fit_its_class_is_refused(copy: Path) -> None:
    config = json.loads((copy / "vae" / "config.json").read_text())
    config["down_block_types"] = ["NoSuchBlock"]
    (copy / "vae" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidRequest, match="'vae' does not make a AutoencoderKL"):
        build_pipeline(copy)


@pytest.mark.skipif(diffusers.utils.is_onnx_available(), reason="needs a package to be missing")
def test_a_class_whose_package_is_missing_says_which(copy: Path) -> None:
    change_index(copy, _class_name="OnnxStableDiffusionPipeline")
    with pytest.raises(UnsupportedPipeline, match="pip install onnx"):
        build_pipeline(copy)


def test_names_that_are_nowhere_say_what_to_do() -> None:
    with pytest.raises(UnknownName, match="flux"):
        build_pipeline("flux.1-def")
    with pytest.raises(InvalidRequest, match="downloads nothing"):
        build_pipeline("nobody/no-such-pipeline")


def test_unknown_dtypes_and_components_are_refused() -> None:
    with pytest.raises(UnknownName, match="float16"):
        build_pipeline("kandinsky-2-2-decoder", dtype="float61")
    with pytest.raises(UnknownName, match="unet"):
        build_pipeline("kandinsky-2-2-decoder", dtype={"unett": "float16"})
