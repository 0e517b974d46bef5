"""`load` on saved small pipelines: planned from their folder, loaded and applied, same picture."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from tests.end_to_end.small_runs import untouched
from tests.small_pipelines import picture, small_call

import pipefit
from pipefit.planner.apply import apply_options
from pipefit.planner.load import folder_of
from pipefit.strategies.live import module_components

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @functools.cache
    def folder(name: str) -> Path:
        target = tmp_path_factory.mktemp(name)
        untouched(name)[0].save_pretrained(target)
        return target

    return folder


def loaded(folder: Path, name: str, budget: Any = "4GB", **asked: Any) -> Any:
    asked = {"quality": "exact", "dtype": "float32", "rehearse": False, **asked}
    asked = {"call": small_call(name), **asked}
    pipe = pipefit.load(folder, budget, device="cpu", **asked)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl"])
def test_what_was_loaded_makes_the_same_picture(name: str, saved: Callable[[str], Path]) -> None:
    plain = DiffusionPipeline.from_pretrained(saved(name))
    plain.set_progress_bar_config(disable=True)
    for module in module_components(plain).values():
        for tensor in (*module.parameters(), *module.buffers()):
            # In a file weights begin anywhere, and the CPU's kernels add up otherwise there.
            tensor.data = tensor.data.clone()
    expected = picture(plain, name)
    pipe = loaded(saved(name), name, with_=["group_offload:offload_type=leaf_level@unet"])
    assert "group_offload" in {option.strategy for option in pipe.pipefit.plan.options}
    assert torch.equal(picture(pipe, name), expected)
    pipe.pipefit.undo()
    assert torch.equal(picture(pipe, name), expected)


def test_the_dtype_that_is_planned_is_the_one_that_is_loaded(
    saved: Callable[[str], Path],
) -> None:
    """16 bits read as such: no original waits for an undo."""
    pipe = loaded(saved("stable_diffusion_xl"), "stable_diffusion_xl", dtype="bfloat16")
    assert {module.dtype for module in module_components(pipe).values()} == {torch.bfloat16}

    cast = loaded(
        saved("stable_diffusion_xl"),
        "stable_diffusion_xl",
        quality="high",
        with_=["precision:dtype=bfloat16"],
    )
    assert {option.strategy for option in cast.pipefit.plan.options} >= {"precision"}
    named = {o.component for o in cast.pipefit.plan.options if o.strategy == "precision"}
    assert named == set(module_components(cast))
    assert cast.unet.dtype == torch.bfloat16
    cast.pipefit.undo()
    assert cast.unet.dtype == torch.bfloat16


def test_a_budget_that_nothing_keeps_reads_no_weight(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", fail)
    with pytest.raises(pipefit.NoPlanFits):
        loaded(saved("stable_diffusion_xl"), "stable_diffusion_xl", 2048)


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="bitsandbytes is installed, so nothing is missing")
def test_a_missing_package_is_named_before_a_weight_is_read(saved: Callable[[str], Path]) -> None:
    nf4 = "quantization:backend=bitsandbytes,type=nf4@unet"
    with pytest.raises(pipefit.InvalidRequest, match="pip install bitsandbytes"):
        loaded(saved("stable_diffusion_xl"), "stable_diffusion_xl", quality="low", with_=[nf4])


@pytest.mark.parametrize(
    ("backend", "kind", "package"),
    [("torchao", "int8_weight_only", "torchao"), ("quanto", "int8", "optimum.quanto")],
)
@pytest.mark.parametrize("component", ["unet", "text_encoder"])  # of diffusers and transformers
def test_weights_are_quantised_while_they_are_read(
    saved: Callable[[str], Path], backend: str, kind: str, package: str, component: str
) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    int8 = f"quantization:backend={backend},type={kind}@{component}"
    pipe = loaded(
        saved("stable_diffusion_xl"), "stable_diffusion_xl", quality="balanced", with_=[int8]
    )
    layers = [m for m in getattr(pipe, component).modules() if isinstance(m, torch.nn.Linear)]
    assert layers
    assert all(package in type(layer.weight.data).__module__ for layer in layers)
    assert picture(pipe, "stable_diffusion_xl").isfinite().all()
    # Another plan would not know how these weights are stored.
    pipe.pipefit.undo()
    with pytest.raises(pipefit.UnsupportedPipeline, match="quantised"):
        apply_options(pipe, pipe.pipefit.plan.options, "cpu")


def test_what_is_neither_a_folder_nor_a_name_is_said() -> None:
    with pytest.raises(pipefit.UnknownName):
        folder_of("no-such-pipeline")


def test_a_folder_without_weights_is_said(saved: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    ignored = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(saved("stable_diffusion_xl"), tmp_path / "bare", ignore=ignored)
    with pytest.raises(pipefit.InvalidRequest, match="could not be loaded"):
        loaded(tmp_path / "bare", "stable_diffusion_xl")


def test_files_of_the_fp16_variant_alone_are_read(tmp_path: Path) -> None:
    untouched("stable_diffusion_xl")[0].save_pretrained(tmp_path, variant="fp16")
    pipe = loaded(tmp_path, "stable_diffusion_xl", dtype=torch.bfloat16)
    assert pipe.unet.dtype == torch.bfloat16
