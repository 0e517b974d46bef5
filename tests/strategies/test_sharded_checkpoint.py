"""Checkpoints rewritten in shards: what they hold, what a process holds meanwhile, when refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from tests.end_to_end.small_runs import untouched
from tests.small_pipelines import small_call
from transformers import CLIPTextConfig, CLIPTextModel

import pipefit
from pipefit.cost_models.host_memory import (
    LOADING_PROCESS_BYTES,
    Checkpoint,
    host_peak,
    unmapped_bytes,
)
from pipefit.cost_models.units import MIB
from pipefit.planner.apply import apply_options
from pipefit.planner.catalog import reference_machine
from pipefit.planner.options import process_options
from pipefit.planner.policy import Policy
from pipefit.planner.workloads import observe
from pipefit.strategies.describe import describe_component
from pipefit.strategies.live import module_components
from pipefit.strategies.sharded_checkpoint import (
    describe_files,
    is_read_whole,
    rewrite,
    weight_files,
    with_shards,
)
from pipefit.strategies.strategy import Option, Quality

NAME = "stable_diffusion_xl"


def pickled(folder: Path, *, is_zipped: bool) -> Path:
    """Put the weights of every component in *folder* into pickles, as older repositories have."""
    for file in list(folder.rglob("*.safetensors")):
        module = getattr(untouched(NAME)[0], file.parent.name)
        stem = {"model": "pytorch_model"}.get(file.stem, file.stem)
        torch.save(
            module.state_dict(),
            file.with_name(f"{stem}.bin"),
            _use_new_zipfile_serialization=is_zipped,
        )
        file.unlink()
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("saved")
    untouched(NAME)[0].save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def old(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as pickles of torch before 1.6."""
    return pickled(shutil.copytree(saved, tmp_path_factory.mktemp("old") / NAME), is_zipped=False)


def loaded(folder: Path, **asked: Any) -> Any:
    settled = {"quality": "exact", "dtype": "float32", "rehearse": False, "device": "cpu"}
    return pipefit.load(folder, "4GB", call=small_call(NAME), **{**settled, **asked})


def same_weights(one: Any, other: Any) -> bool:
    return all(
        torch.equal(tensor, module.state_dict()[key])
        for name, module in module_components(one).items()
        for key, tensor in getattr(other, name).state_dict().items()
    )


# -- files


@pytest.mark.parametrize("kind", ["safetensors", "zipped", "old"])
def test_shards_hold_the_same_weights_in_files_of_the_size(
    kind: str, saved: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved, tmp_path / NAME)
    if kind != "safetensors":
        pickled(folder, is_zipped=kind == "zipped")
    most_bytes = 100_000
    shards = rewrite(folder / "unet", most_bytes, tmp_path / "cache")
    files, _, _ = weight_files(shards)
    tensors = untouched(NAME)[0].unet.state_dict().values()
    largest_bytes = max(most_bytes, *(t.numel() * t.element_size() for t in tensors))
    assert len(files) > 2
    header_bytes = 32_000
    assert all(file.stat().st_size <= largest_bytes + header_bytes for file in files)
    shutil.copy(folder / "unet" / "config.json", shards)
    model = type(untouched(NAME)[0].unet).from_pretrained(shards)
    assert all(
        torch.equal(tensor, model.state_dict()[key])
        for key, tensor in untouched(NAME)[0].unet.state_dict().items()
    )


def test_a_second_load_finds_the_shards_of_the_first(saved: Path, tmp_path: Path) -> None:
    first = rewrite(saved / "vae", 100_000, tmp_path)
    before = {file: file.stat().st_mtime_ns for file in first.iterdir()}
    assert rewrite(saved / "vae", 100_000, tmp_path) == first
    assert {file: file.stat().st_mtime_ns for file in first.iterdir()} == before
    assert rewrite(saved / "vae", 200_000, tmp_path) != first
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith("tmp")] == []


def test_what_cannot_be_rewritten_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(pipefit.InvalidRequest, match="more than tensors"):
        rewrite(tmp_path / "model", 10, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_pipeline_that_cannot_be_rewritten_leaves_no_folder_of_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pipeline" / "unet").mkdir(parents=True)
    file = tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.bin"
    torch.save({"state_dict": {"a": torch.ones(2)}}, file)
    (tmp_path / "links").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "links"))
    with pytest.raises(pipefit.InvalidRequest, match="more than tensors"):
        with_shards(tmp_path / "pipeline", ["unet"], 10, tmp_path / "cache")
    assert list((tmp_path / "links").iterdir()) == []


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("diffusion_pytorch_model.safetensors", POINTER),
        ("pytorch_model.bin", POINTER),
        ("pytorch_model.bin", b""),
        ("pytorch_model.bin", [torch.ones(2)]),
        ("model.safetensors", (5).to_bytes(8, "little") + b"[1,2]"),
        ("model.safetensors", (7).to_bytes(8, "little") + b'{"a":1}'),
        ("model.safetensors.index.json", b"[1]"),
        ("model.safetensors.index.json", b'{"weight_map": [1]}'),
    ],
)
def test_what_holds_no_tensors_by_name_is_no_checkpoint(
    tmp_path: Path, name: str, content: Any
) -> None:
    file = tmp_path / name
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    assert describe_files(tmp_path) is None


# -- load


def test_a_pipeline_of_old_pickles_is_loaded_from_shards(
    old: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPEFIT_CACHE", str(tmp_path))
    assert is_read_whole(weight_files(old / "unet")[0][0])
    before = sorted(old.rglob("*"))
    pipe = loaded(old, with_=["sharded_checkpoint:max_shard_size=100kB"])
    plain = DiffusionPipeline.from_pretrained(saved)
    assert same_weights(plain, pipe)
    assert Option(strategy="sharded_checkpoint", parameters={"max_shard_size": "100kB"}) in [
        Option(strategy=o.strategy, parameters=o.parameters) for o in pipe.pipefit.plan.options
    ]
    written = list((tmp_path / "checkpoints").rglob("*.safetensors"))
    assert len(written) > len(module_components(pipe))
    stored_bytes = sum(file.stat().st_size for file in old.rglob("*.bin"))
    assert pipe.pipefit.plan.prediction.disk_bytes == stored_bytes
    [note] = [a for a in pipe.pipefit.plan.prediction.assumptions if "in shards" in a]
    assert f"stay in {tmp_path / 'checkpoints'} " in note
    assert "unless an earlier load did it" in note
    # Undoing takes nothing away: the weights are mapped from there.
    pipe.pipefit.undo()
    assert all(file.is_file() for file in written)
    assert same_weights(plain, pipe)
    assert sorted(old.rglob("*")) == before


def test_files_of_the_fp16_variant_stay_that_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPEFIT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / NAME
    untouched(NAME)[0].save_pretrained(folder, variant="fp16")
    pipe = loaded(folder, dtype="bfloat16", with_=["sharded_checkpoint:max_shard_size=100kB"])
    plain = DiffusionPipeline.from_pretrained(folder, variant="fp16", dtype=torch.bfloat16)
    assert same_weights(plain, pipe)
    written = {file.parent.name for file in (tmp_path / "cache").rglob("*.fp16.safetensors")}
    assert written


def test_a_plan_with_it_is_rehearsed_without_reading_a_file(
    old: Path,
) -> None:
    asked: dict[str, Any] = {
        "call": small_call(NAME),
        "machine": reference_machine(["rtx-4060"]),
        "dtype": "float32",
        "rehearse": True,
    }
    plain = pipefit.plan(old, "4GB", **asked)
    shards = pipefit.plan(old, "4GB", with_=["sharded_checkpoint"], **asked)
    assert shards.rehearsal is not None
    assert shards.rehearsal == plain.rehearsal
    assert shards.prediction.peak_vram == plain.prediction.peak_vram
    said = next(o.reason for o in shards.options if o.strategy == "sharded_checkpoint")
    assert "of RAM instead of" in said


def test_it_is_chosen_where_the_ram_budget_asks_for_it_and_nowhere_else(old: Path) -> None:
    """A transformer in two old pickles of 3 GB: read whole 6, rewritten one of them and a shard."""
    gpu = reference_machine(["rtx-4060"]).gpus[0]

    def chosen(room_bytes: float, **files: Any) -> set[str]:
        policy = Policy(
            budget_bytes={0: gpu.total_bytes},
            ram_bytes=LOADING_PROCESS_BYTES + int(room_bytes),
            quality=Quality.EXACT,
        )
        seen = observe(old, small_call(NAME), gpu=gpu, policy=policy, dtype="float32")[0]
        large = {"file_bytes": [3 * 10**9] * 2, "is_read_whole": True, "dtype": "float32", **files}
        workload = replace(
            seen.workload,
            components=tuple(
                replace(c, traits={**c.traits, "checkpoint": large}) if c.name == "unet" else c
                for c in seen.workload.components
            ),
        )
        return {option.strategy for option in process_options(workload, gpu, policy)}

    assert chosen(5.5e9) == {"sharded_checkpoint"}
    assert chosen(7e9) == set()  # there is room
    assert chosen(4e9) == set()  # it would not help
    assert chosen(5.5e9, is_read_whole=False) == set()  # they are mapped
    assert chosen(5.5e9, file_bytes=[6 * 10**9]) == set()  # rewriting takes as much


def test_without_a_ram_budget_it_is_chosen_where_what_is_available_asks_for_it(
    old: Path, tmp_path: Path
) -> None:
    """Several old pickles, so that rewriting one takes less than reading all."""
    folder = shutil.copytree(old, tmp_path / NAME)
    [file], stem, _ = weight_files(folder / "unet")
    tensors = list(torch.load(file).items())
    files = {f"{n}.bin": dict(tensors[2 * n :: 4] + tensors[2 * n + 1 :: 4]) for n in range(2)}
    for name, part in files.items():
        torch.save(part, file.with_name(name), _use_new_zipfile_serialization=False)
    placed = {key: name for name, part in files.items() for key in part}
    file.with_name(f"{stem}.bin.index.json").write_text(json.dumps({"weight_map": placed}))
    file.unlink()
    stored = [one.stat().st_size for one in folder.rglob("*.bin")]
    machine = reference_machine(["rtx-4060"])

    def chosen(available_bytes: int) -> bool:
        host = replace(machine.host, available_bytes=available_bytes)
        made = pipefit.plan(
            folder,
            "4GB",
            call=small_call(NAME),
            machine=replace(machine, host=host),
            dtype="float32",
            quality="exact",
            rehearse=False,
        )
        return any(option.strategy == "sharded_checkpoint" for option in made.options)

    assert chosen(int(0.9 * sum(stored)))
    assert not chosen(2 * sum(stored))  # there is room
    assert not chosen(max(stored))  # rewriting takes a file and a shard


@pytest.mark.parametrize(
    ("parameters", "said"), [({"max_shard_size": "large"}, "is a size"), ({"size": 1}, "parameter")]
)
def test_what_is_no_size_is_refused(parameters: dict[str, Any], said: str, saved: Path) -> None:
    option = Option(strategy="sharded_checkpoint", parameters=parameters)
    with pytest.raises(pipefit.InvalidRequest, match=said):
        loaded(saved, with_=[option])


def test_a_pipeline_that_is_loaded_refuses_it() -> None:
    pipe, _ = untouched(NAME)
    with pytest.raises(pipefit.InvalidRequest, match="loaded already"):
        apply_options(pipe, [Option(strategy="sharded_checkpoint")], "cpu")
    with pytest.raises(pipefit.InvalidRequest, match="loaded already"):
        pipefit.plan(
            pipe,
            "4GB",
            call=small_call(NAME),
            machine=reference_machine(["rtx-4060"]),
            with_=["sharded_checkpoint"],
        )


def test_mapped_files_in_the_dtype_that_is_loaded_gain_nothing(saved: Path) -> None:
    with pytest.raises(pipefit.InvalidRequest, match="no effect"):
        loaded(saved, with_=["sharded_checkpoint:max_shard_size=100kB"])


def test_files_that_are_cast_gain_where_diffusers_reads_them(saved: Path) -> None:
    asked: dict[str, Any] = {
        "call": small_call(NAME),
        "machine": reference_machine(["rtx-4060"]),
        "dtype": "bfloat16",
    }
    plain = pipefit.predict(saved, [], **asked)
    shards = pipefit.predict(saved, ["sharded_checkpoint:max_shard_size=100kB"], **asked)
    large = [
        file.stat().st_size
        for file in saved.glob("*/diffusion_pytorch_model.safetensors")
        if file.stat().st_size > 100_000
    ]
    assert plain.disk_bytes == 0
    assert shards.disk_bytes == sum(large) > 0
    assert shards.peak_vram == plain.peak_vram
    with pytest.raises(pipefit.InvalidRequest, match="no effect"):
        pipefit.predict(saved, ["sharded_checkpoint:max_shard_size=1GB"], **asked)


# -- measured


MEASURE = """
import gc, json, sys, threading, time
from pathlib import Path
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel
from pipefit.strategies.sharded_checkpoint import rewrite

def resident():
    lines = (line.split(":") for line in open("/proc/self/status"))
    return {k: int(v.split()[0]) << 10 for k, v in lines if k in ("RssAnon", "RssFile")}

class Watch(threading.Thread):
    def run(self):
        self.on, self.anonymous, self.peak = True, 0, 0
        while self.on:
            held = resident()
            self.anonymous = max(self.anonymous, held["RssAnon"])
            self.peak = max(self.peak, sum(held.values()))
            time.sleep(0.001)

kind, what, folder, cache, most_bytes = sys.argv[1:]
base = resident()
watch = Watch()
watch.start()
time.sleep(0.02)
if what == "rewrite":
    rewrite(Path(folder), int(most_bytes), Path(cache))
else:
    dtype = {"torch_dtype" if kind == "AutoencoderKL" else "dtype": torch.bfloat16}
    module = globals()[kind].from_pretrained(folder, **dtype)
watch.on = False
watch.join()
print(json.dumps({
    "anonymous": watch.anonymous - base["RssAnon"],
    "peak": watch.peak - sum(base.values()),
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("kind", "stored", "files"),
    [
        ("AutoencoderKL", "bfloat16", "safetensors"),
        ("AutoencoderKL", "bfloat16", "zipped"),
        ("AutoencoderKL", "bfloat16", "old"),
        ("AutoencoderKL", "float32", "zipped"),
        ("AutoencoderKL", "float32", "old"),
        ("CLIPTextModel", "float32", "safetensors"),
        ("CLIPTextModel", "bfloat16", "old"),
    ],
)
def test_loading_from_shards_takes_what_is_said(
    tmp_path: Path, kind: str, stored: str, files: str
) -> None:
    module: Any
    if kind == "AutoencoderKL":
        module = AutoencoderKL(
            block_out_channels=(256, 512, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    else:
        module = CLIPTextModel(CLIPTextConfig(hidden_size=1024, num_hidden_layers=8))
    component = describe_component("any", module.to(torch.bfloat16), {})
    folder = tmp_path / "whole"
    module.to(getattr(torch, stored)).save_pretrained(folder, max_shard_size="10GB")
    [file], stem, _ = weight_files(folder)
    if files != "safetensors":
        name = {"model": "pytorch_model"}.get(stem, stem)
        torch.save(
            module.state_dict(),
            folder / f"{name}.bin",
            _use_new_zipfile_serialization=files == "zipped",
        )
        file.unlink()
    about = describe_files(folder)
    assert about is not None
    assert about["is_read_whole"] == (files == "old")
    assert about["dtype"] == (None if files == "old" else stored)
    whole = Checkpoint(
        file_bytes=tuple(about["file_bytes"]),
        is_read_whole=about["is_read_whole"],
        is_cast=stored == "float32",
    )
    most_bytes = 80 * MIB if stored == "float32" else 40 * MIB

    def measured(what: str, source: Path) -> dict[str, int]:
        command = [kind, what, str(source), str(tmp_path / "cache"), str(most_bytes)]
        answer = subprocess.run(
            [sys.executable, "-c", MEASURE, *command], capture_output=True, text=True, check=True
        )
        found: dict[str, int] = json.loads(answer.stdout.splitlines()[-1])
        return found

    plain = measured("load", folder)
    writing = measured("rewrite", folder)
    [shards] = (tmp_path / "cache").iterdir()
    shutil.copy(folder / "config.json", shards)
    sharded = measured("load", shards)

    # Code that runs for the first time takes some MiB, and the token table is larger than a shard.
    tolerance = 24 * MIB + max(0, component.tensors[0].num_bytes - most_bytes)
    for found, checkpoint in ((plain, whole), (sharded, whole.in_shards(most_bytes))):
        predicted = host_peak([component], {}, [], checkpoints={"any": checkpoint}).load_bytes
        assert found["peak"] == pytest.approx(predicted - LOADING_PROCESS_BYTES, abs=tolerance)
        assert found["anonymous"] == pytest.approx(
            unmapped_bytes([component], {"any": checkpoint}), abs=tolerance
        )
    if whole.gains_from(most_bytes, component.library):
        assert sharded["peak"] < 0.5 * plain["peak"]
    else:
        assert sharded["peak"] == pytest.approx(plain["peak"], abs=tolerance)
    held = sum(whole.file_bytes) if whole.is_read_whole else most_bytes
    assert writing["peak"] < held + most_bytes + 3 * tolerance
