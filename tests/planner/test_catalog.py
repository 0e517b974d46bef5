"""The pipeline half of the catalogue: names, files, and counts against the real classes."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipefit.errors import UnknownName
from pipefit.planner.catalog import catalog_json, gpu_names, pipeline_entry, pipeline_names

COMPONENTS = [
    (name, component)
    for name in pipeline_names()
    for component in pipeline_entry(name)["components"]
]
FAST = [
    ("flux.1-dev", "transformer"),
    ("flux.1-dev", "text_encoder_2"),
    ("stable-diffusion-xl-base-1.0", "unet"),
    ("stable-diffusion-xl-base-1.0", "text_encoder_2"),
    ("stable-diffusion-3.5-medium", "transformer"),
    ("kolors", "text_encoder"),
    ("qwen-image", "text_encoder"),
    ("wan2.1-t2v-1.3b", "vae"),
]
REFERENCE = Path(__file__).parents[3] / "shared" / "data" / "pipelines" / "expected.json"


def test_the_catalogue_has_as_many_pipelines_and_components_as_we_know_of() -> None:
    assert len(pipeline_names()) == 78
    assert len(COMPONENTS) == 288


def test_every_name_and_alias_finds_its_own_pipeline() -> None:
    for name in pipeline_names():
        entry = pipeline_entry(name)
        assert entry["name"] == name
        for spelling in (name, *entry["aliases"]):
            assert pipeline_entry(spelling) is entry
            assert pipeline_entry(spelling.upper().replace("-", " ")) is entry


def test_every_alias_belongs_to_one_pipeline() -> None:
    aliases = [alias for name in pipeline_names() for alias in pipeline_entry(name)["aliases"]]
    assert len(aliases) == len(set(aliases))
    assert not set(aliases) & set(pipeline_names())


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("sdxl", "stable-diffusion-xl-base-1.0"),
        ("SD 1.5", "stable-diffusion-v1-5"),
        ("sd15", "stable-diffusion-v1-5"),
        ("flux_dev", "flux.1-dev"),
        ("FLUX.1-dev", "flux.1-dev"),
        ("black-forest-labs/FLUX.1-dev", "flux.1-dev"),
        ("sd3.5 large", "stable-diffusion-3.5-large"),
        ("wan2.1-14b", "wan2.1-t2v-14b"),
    ],
)
def test_names_are_forgiving(written: str, name: str) -> None:
    assert pipeline_entry(written)["name"] == name


def test_an_entry_like_another_takes_over_what_it_does_not_change() -> None:
    base = pipeline_entry("stable-diffusion-v1-5")
    entry = pipeline_entry("stable-diffusion-inpainting")  # like one that is like the base
    assert "like" not in entry
    assert entry["name"] == "stable-diffusion-inpainting"
    assert not set(entry["aliases"]) & set(base["aliases"])
    assert entry["components"]["vae"] == base["components"]["vae"]
    changed, unet = (e["components"]["unet"] for e in (entry, base))
    assert changed["config"] == {**unet["config"], "in_channels": 9}
    assert changed["parameters"] == unet["parameters"] + 5 * 320 * 3 * 3


def test_null_removes_what_an_entry_would_take_over() -> None:
    base = pipeline_entry("stable-diffusion-v1-5")["components"]
    assert pipeline_entry("stable-diffusion-v1-5-unchecked")["components"] == {
        name: component for name, component in base.items() if name != "safety_checker"
    }


def test_one_component_can_be_like_one_of_another_pipeline() -> None:
    vae = pipeline_entry("cogview3-plus-3b")["components"]["vae"]
    changed = pipeline_entry("cogview4-6b")["components"]["vae"]
    assert changed["config"] == {**vae["config"], "scaling_factor": 1.0}
    assert changed["parameters"] == vae["parameters"]


@pytest.mark.parametrize(("written", "closest"), [("sdxxl", "sdxl"), ("FLUX.1-DEF", "flux.1-dev")])
def test_an_unknown_pipeline_offers_the_closest(written: str, closest: str) -> None:
    with pytest.raises(UnknownName, match=f"did you mean {closest}"):
        pipeline_entry(written)


@given(st.text(max_size=40))
def test_any_text_finds_a_pipeline_or_is_an_unknown_name(text: str) -> None:
    try:
        entry = pipeline_entry(text)
    except UnknownName:
        return
    assert entry["name"] in pipeline_names()


def test_reading_the_catalogue_imports_neither_torch_nor_diffusers() -> None:
    script = (
        "import sys; from pipefit.planner.catalog import catalog_json; catalog_json();"
        "sys.exit(bool({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_listing_is_json_with_a_name_for_each() -> None:
    listing = json.loads(json.dumps(catalog_json()))
    assert [pipeline["name"] for pipeline in listing["pipelines"]] == list(pipeline_names())
    assert [gpu["name"] for gpu in listing["gpus"]] == list(gpu_names())
    flux = next(p for p in listing["pipelines"] if p["name"] == "flux.1-dev")
    assert flux["pipeline_class"] == "FluxPipeline"
    assert flux["num_parameters"] == 16_870_599_139


@pytest.mark.slow
@pytest.mark.parametrize("name", pipeline_names())
def test_the_pipeline_class_takes_exactly_what_the_entry_names(name: str) -> None:
    import diffusers

    entry = pipeline_entry(name)
    cls = getattr(diffusers, entry["pipeline_class"])
    parameters = inspect.signature(cls.__init__).parameters
    groups = ("components", "schedulers", "guiders", "processors", "options")
    named = {key for group in groups for key in entry.get(group, {})} | set(entry.get("absent", ()))
    required = {
        key
        for key, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and key != "self"
    }
    assert required <= named <= set(parameters)
    call = inspect.signature(cls.__call__).parameters
    assert set(entry["call"]["effective"]) | set(entry["call"].get("recommended", {})) <= set(call)
    assert entry["offload_sequence"] == cls.model_cpu_offload_seq
    assert set(entry["dtype"]) - {"default"} <= set(entry["components"])
    assert set(entry["dtype"].values()) <= {"float16", "bfloat16", "float32"}


def model_class(library: str, name: str) -> Any:
    """The class, where the library is a package or a folder of diffusers' pipelines."""
    if library in ("diffusers", "transformers"):
        return getattr(importlib.import_module(library), name)
    folder = "deprecated.wuerstchen" if library == "wuerstchen" else library
    return getattr(importlib.import_module(f"diffusers.pipelines.{folder}"), name)


@functools.cache
def counts(library: str, class_name: str, config_json: str) -> Mapping[str, int]:
    """Elements of the component, built from the compact configuration on the meta device."""
    import torch
    from accelerate import init_empty_weights
    from transformers import PreTrainedModel

    cls, config = model_class(library, class_name), json.loads(config_json)
    if issubclass(cls, PreTrainedModel):
        with torch.device("meta"):
            model = cls._from_config(cls.config_class(**config))
    else:
        with init_empty_weights(include_buffers=True):
            model = cls(**config)
    saved = set(model.state_dict())
    buffers = dict(model.named_buffers())
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "saved": sum(b.numel() for n, b in buffers.items() if n in saved),
        "unsaved": sum(b.numel() for n, b in buffers.items() if n not in saved),
    }


def assert_counts_are_those_of_the_class(name: str, component: str) -> None:
    stated = pipeline_entry(name)["components"][component]
    config_json = json.dumps(stated["config"], sort_keys=True)
    built = counts(stated["library"], stated["class"], config_json)
    assert built == {"parameters": stated["parameters"], **stated["buffers"]}


@pytest.mark.parametrize(("name", "component"), FAST)
def test_a_component_has_the_stated_counts(name: str, component: str) -> None:
    assert_counts_are_those_of_the_class(name, component)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "component"), sorted(set(COMPONENTS) - set(FAST)))
def test_every_other_component_has_the_stated_counts(name: str, component: str) -> None:
    assert_counts_are_those_of_the_class(name, component)


def test_stated_counts_are_those_of_the_reference() -> None:
    if not REFERENCE.is_file():
        pytest.skip(f"the reference counts are not beside this checkout: {REFERENCE}")
    reference = json.loads(REFERENCE.read_text())
    assert set(reference) <= set(pipeline_names())
    for name in reference:
        stated, expected = pipeline_entry(name)["components"], reference[name]["components"]
        assert set(stated) == set(expected)
        for component, counted in stated.items():
            other = expected[component]
            assert counted["class"] == other["class"]
            assert counted["parameters"] == other["params"], (name, component)
            assert counted["buffers"]["saved"] == other["persistent_buffers"]
            assert counted["buffers"]["unsaved"] == other["other_buffers"]


def test_stated_counts_lie_near_the_published_figure() -> None:
    for name, component in COMPONENTS:
        stated = pipeline_entry(name)["components"][component]
        certainty = stated["source"]["certainty"]
        if certainty == "close":
            assert stated["parameters"] == pytest.approx(stated["source"]["published"], rel=0.01)
        else:
            assert certainty in ("exact", "unverified")


@pytest.mark.slow
@pytest.mark.parametrize("name", pipeline_names())
def test_schedulers_are_built_from_their_compact_configuration(name: str) -> None:
    import diffusers
    from diffusers.utils import DummyObject

    for scheduler in pipeline_entry(name)["schedulers"].values():
        cls = getattr(diffusers, scheduler["class"])
        if isinstance(cls, DummyObject):
            pytest.skip(f"{scheduler['class']} needs {cls._backends}")
        built = cls(**scheduler["config"])
        assert scheduler["config"].items() <= json.loads(built.to_json_string()).items()
