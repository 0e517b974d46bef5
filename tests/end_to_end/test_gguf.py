"""A GGUF file in the place of a component's own weights: read, held to its plan, and placed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, GGUFQuantizationConfig
from tests.end_to_end.small_runs import save, untouched
from tests.small_pipelines import picture, small_call

import pipefit
from pipefit.cost_models.storage import GGUF_LEAST_ELEMENTS, gguf_type
from pipefit.planner.catalog import reference_machine
from pipefit.strategies.live import module_components

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

NAME = "flux"


def write_gguf(module: torch.nn.Module, file: Path, file_type: str) -> None:
    """Store *module* as the files of that type are, by the names of diffusers."""
    writer = gguf.GGUFWriter(file, NAME)
    class_names = [base.__name__ for base in type(module).__mro__]
    linear = {path for path, part in module.named_modules() if isinstance(part, torch.nn.Linear)}
    for name, tensor in module.state_dict().items():
        values, layer = tensor.float().numpy(), name.removesuffix(".weight")
        type_ = "F32"
        if layer in linear and name.endswith(".weight") and tensor.numel() > GGUF_LEAST_ELEMENTS:
            type_ = gguf_type(file_type, class_names, layer)
        raw = gguf.GGMLQuantizationType[type_]
        writer.add_tensor(name, gguf.quants.quantize(values, raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp(NAME)
    pipe, _ = untouched(NAME)
    save(pipe, target)
    for type_ in ("Q8_0", "Q4_0"):
        write_gguf(pipe.transformer, target / f"small-{type_}.gguf", type_)
    for file in (target / "transformer").glob("*.safetensors"):
        file.unlink()  # who has the GGUF file need not have the weights that it is made of
    return target


def asked(
    folder: Path,
    type_: str,
    *,
    file: str | None = None,
    with_: Sequence[str] = (),
    rehearse: bool = False,
) -> Any:
    stored = folder / (file or f"small-{type_}.gguf")
    spec = f"quantization:backend=gguf,type={type_},file={stored}@transformer"
    pipe = pipefit.load(
        folder,
        "4GB",
        device="cpu",
        call=small_call(NAME),
        dtype="float32",
        rehearse=rehearse,
        with_=[spec, *with_],
        without=["precision", "layerwise_casting"],  # so that all else is as in the file
        quality="balanced" if type_ == "Q8_0" else "low",
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("type_", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("placement", ["resident", "model_offload", "streaming", "group_offload"])
def test_a_gguf_file_is_read_and_placed(folder: Path, type_: str, placement: str) -> None:
    plain = DiffusionPipeline.from_pretrained(
        folder,
        transformer=FluxTransformer2DModel.from_single_file(
            str(folder / f"small-{type_}.gguf"),
            config=str(folder),
            subfolder="transformer",
            quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
            torch_dtype=torch.float32,
        ),
    )
    plain.set_progress_bar_config(disable=True)
    for module in module_components(plain).values():
        for tensor in (*module.parameters(), *module.buffers()):
            # In a file weights begin anywhere, and the CPU's kernels add up otherwise there.
            tensor.data = tensor.data.clone()
    expected = picture(plain, NAME)
    option = {
        "streaming": "streaming:resident_blocks=1,num_slots=2,max_block_bytes=16384@transformer",
        "group_offload": "group_offload:offload_type=leaf_level@transformer",
        "resident": "resident@transformer",
    }.get(placement, placement)
    pipe = asked(folder, type_, with_=[option])
    assert placement in {option.strategy for option in pipe.pipefit.plan.options}
    assert torch.equal(picture(pipe, NAME), expected)
    pipe.pipefit.undo()
    assert torch.equal(picture(pipe, NAME), expected)


def test_what_a_file_makes_is_rehearsed_as_it_was_planned(folder: Path) -> None:
    pipe = asked(folder, "Q8_0", rehearse=True, with_=["resident"])
    found = pipe.pipefit.plan
    assert found.rehearsal is not None
    assert found.rehearsal.within_budget
    for rehearsed, planned in zip(found.rehearsal.phases, found.prediction.phases, strict=True):
        assert rehearsed.allocated_bytes == pytest.approx(planned.allocated_bytes, rel=0.01)


def test_a_file_that_stores_more_than_was_planned_is_refused(folder: Path) -> None:
    with pytest.raises(pipefit.InvalidRequest, match="give type= as the file was made"):
        asked(folder, "Q4_0", file="small-Q8_0.gguf")


def test_a_plan_without_a_file_says_that_a_load_needs_one(folder: Path) -> None:
    asked_for = ["quantization:backend=gguf,type=Q8_0@transformer"]
    found = pipefit.predict(folder, asked_for, machine=reference_machine(["rtx-4060"]))
    assert "needs file=PATH" in " ".join(found.assumptions)


@pytest.mark.parametrize("file", ["missing.gguf", "."])
def test_a_file_that_is_not_there_is_said(folder: Path, file: str) -> None:
    with pytest.raises(pipefit.InvalidRequest, match=r"path of a \.gguf file"):
        asked(folder, "Q8_0", file=file)


def test_a_file_is_for_gguf_alone(folder: Path) -> None:
    int8 = "quantization:backend=quanto,type=int8,file=small.gguf@transformer"
    with pytest.raises(pipefit.InvalidRequest, match="for backend=gguf only"):
        pipefit.predict(folder, [int8], machine=reference_machine(["rtx-4060"]))
