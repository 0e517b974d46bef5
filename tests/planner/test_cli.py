"""The command as a shell meets it: exit codes, standard output, one sentence for a mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipefit.errors import InvalidRequest
from pipefit.planner.cli import main, read_call, read_dtypes, read_machine, read_strategies
from pipefit.planner.plan import Plan


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipefit", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["bogus"],
        ["plan"],
        ["plan", "sdxl", "--bogus"],
        ["plan", "sdxl", "--gpu", "rtx-4060", "--vram", "8 gigs"],
        ["plan", "sdxl", "--gpu", "rtx-4060", "--vram", "-1GB"],
        ["plan", "sdxl", "--gpu", "rtx-4060", "--vram", "0"],
        ["plan", "sdxl", "--gpu", "rtx-4060", "--vram", "150%"],
        ["plan", "sdxl", "--gpu", "rtx-4060", "--vram", "nan"],
        ["plan", "sdxl", "--gpu", "rtx-4060", "--vram", "3=8GB"],
        ["plan", "sdxl", "--gpu", "rtx-9999", "--vram", "8GB"],
        ["plan", "sdxl", "--gpu", "rtx-4060", "--gpus", "rtx-4060,rtx-3060"],
        ["plan", "sdxl", "--gpu", "rtx-4060", "--pcie", "fast"],
        ["plan", "sdxl", "--pcie", "4x8"],
        ["plan", "sdxl", "--gpu", "rtx-4060", "--ram", "lots"],
        ["plan", "sdxl", "--gpu", "rtx-4060", "--quality", "superb"],
        ["plan", "sdxl", "--gpu", "rtx-4060", "--with", "magic"],
        ["plan", "sdxl", "--gpu", "rtx-4060", "--with", "vae_tiling:tile_px@vae"],
        ["plan", "sdxl", "--gpu", "rtx-4060", "--without", "magic"],
        ["plan", "sdxl", "--gpu", "rtx-4060", "--set", "height"],
        ["plan", "sdxl", "--gpu", "rtx-4060", "--dtype", "vae="],
        ["predict", "sdxl", "--gpu", "rtx-4060", "--with", "magic"],
        ["catalog", "--json", "--out", "/no/such/folder/catalogue.json"],
        ["verify"],
        ["verify", "/no/such/plan.json"],
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, capsys) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


def test_debug_shows_where_an_error_was_raised(monkeypatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(InvalidRequest):
        main(["plan", "sdxl", "--gpu", "rtx-4060", "--vram", "8 gigs", "--debug"])


def test_the_help_names_every_command(capsys) -> None:
    assert main([]) == 0
    without_command = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.strip() == without_command.strip()
    for command in ("probe", "plan", "predict", "verify", "run", "catalog", "cache"):
        assert f"\n  {command} " in without_command


def test_the_version_is_shown(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("pipefit 0.")


def test_the_catalogue_is_json_on_standard_output(capsys, tmp_path) -> None:
    out = tmp_path / "catalogue.json"
    assert main(["catalog", "--json", "--out", str(out)]) == 0
    catalogue = json.loads(capsys.readouterr().out)
    assert {"name": "rtx-4060"}.items() <= next(
        gpu for gpu in catalogue["gpus"] if gpu["name"] == "rtx-4060"
    ).items()
    assert len(catalogue["pipelines"]) >= 46
    assert json.loads(out.read_text("utf-8")) == catalogue


def test_the_cache_is_shown_and_cleared(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PIPEFIT_CACHE", str(tmp_path))
    assert main(["plan", "sdxl", "--gpu", "rtx-4060", "--vram", "8GB", "--no-rehearse"]) == 0
    (tmp_path / "checkpoints" / "one.shards").mkdir(parents=True)
    (tmp_path / "checkpoints" / "one.shards" / "weights").write_bytes(bytes(3000))
    capsys.readouterr()
    assert main(["cache", "--json"]) == 0
    held = json.loads(capsys.readouterr().out)
    assert held["folder"] == str(tmp_path)
    assert held["num_entries"] > 0
    assert (held["num_checkpoints"], held["checkpoints_bytes"]) == (1, 3000)
    assert main(["cache"]) == 0
    assert "weights in shards, by component" in capsys.readouterr().out
    assert main(["cache", "--clear", "--json"]) == 0
    left = json.loads(capsys.readouterr().out)
    assert (left["num_entries"], left["num_checkpoints"]) == (0, 0)
    assert list(tmp_path.rglob("weights")) == []


def test_probe_answers_without_a_driver() -> None:
    """As a process of its own: a stand-in driver of another test must not answer here."""
    done = run_command("probe", "--json")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) >= {"gpus", "host", "links"}


def test_an_unforeseen_error_is_one_line_and_exit_code_1(tmp_path) -> None:
    """A name that the shell's locale cannot print is such an error."""
    done = run_command("catalog", PYTHONIOENCODING="ascii:strict", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: UnicodeEncodeError")
    assert "Traceback" not in done.stderr


def test_call_arguments_are_numbers_words_or_json() -> None:
    assert read_call(["height=1024", "prompt=a=b", "eta=0.5", "sigmas=[1, 0.5]", "x=[no json"]) == {
        "height": 1024,
        "prompt": "a=b",
        "eta": 0.5,
        "sigmas": [1, 0.5],
        "x": "[no json",
    }
    with pytest.raises(InvalidRequest, match="twice"):
        read_call(["height=1", "height=2"])


def test_dtypes_are_for_all_or_for_one_component() -> None:
    assert read_dtypes(None) is None
    assert read_dtypes(["bfloat16", "vae=float32"]) == {"default": "bfloat16", "vae": "float32"}
    with pytest.raises(InvalidRequest, match="once"):
        read_dtypes(["bfloat16", "float16"])


@pytest.mark.parametrize("slot", ["3x8", "3.0 x8", "gen3x8"])
def test_a_catalogue_machine_has_the_ram_and_the_slot_asked_for(slot) -> None:
    machine = read_machine("rtx-3090", None, "32GB", slot)
    [gpu] = machine.gpus
    assert (gpu.pcie_generation, gpu.pcie_lanes) == (3, 8)
    assert machine.host.total_bytes == 32 * 10**9


def test_several_catalogue_gpus_make_one_machine() -> None:
    machine = read_machine(None, "rtx-3090, rtx-4060", None, None)
    assert [(gpu.index, gpu.name) for gpu in machine.gpus] == [(0, "rtx-3090"), (1, "rtx-4060")]
    assert read_machine(None, None, "32GB", None) is None


def test_strategies_are_options() -> None:
    [option] = read_strategies(["vae_tiling:tile_px=512@vae"])
    assert (option.strategy, option.component, option.parameters) == (
        "vae_tiling",
        "vae",
        {"tile_px": 512},
    )


@pytest.mark.slow
def test_a_plan_is_json_alone_and_can_be_read_back(capsys, tmp_path) -> None:
    out = tmp_path / "plan.json"
    arguments = ["plan", "sdxl", "--vram", "8GB", "--gpu", "rtx-4060", "--ram", "32GB"]
    assert main([*arguments, "--json", "--out", str(out)]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data == json.loads(out.read_text("utf-8"))
    found = Plan.from_json(data)
    assert found.prediction.peak_vram[0].process_bytes <= 8 * 10**9
    assert main(arguments) == 0
    assert capsys.readouterr().out == str(found)


@pytest.mark.slow
def test_a_hopeless_budget_exits_with_3_and_names_the_smallest(capsys) -> None:
    arguments = ["plan", "sdxl", "--gpu", "rtx-4060", "--json", "--vram"]
    assert main([*arguments, "300MB"]) == 3
    captured = capsys.readouterr()
    smallest = json.loads(captured.out)["smallest_budget_bytes"]["high"]
    assert captured.err.count("\n") == 1
    assert main([*arguments, str(smallest)]) == 0
    assert main([*arguments, str(smallest * 9 // 10)]) == 3


@pytest.mark.slow
def test_a_saved_plan_is_verified_and_a_broken_budget_exits_with_3(capsys, tmp_path) -> None:
    file = tmp_path / "plan.json"
    arguments = ["plan", "sdxl", "--gpu", "rtx-4060", "--vram", "4GB", "--json"]
    assert main([*arguments, "--out", str(file)]) == 0
    made = json.loads(capsys.readouterr().out)
    timeline = tmp_path / "timeline.json"
    assert main(["verify", str(file), "--json", "--timeline", str(timeline)]) == 0
    assert json.loads(timeline.read_text(encoding="utf-8"))["traceEvents"]
    verified = json.loads(capsys.readouterr().out)
    assert verified["holds"]
    assert verified["process_bytes"] <= verified["budget_bytes"]
    for phase in verified["phases"]:
        predicted_bytes = phase["predicted_allocated_bytes"]
        assert phase["allocated_bytes"] == pytest.approx(predicted_bytes, rel=0.02)
    # What is cached goes back where memory is short; what is allocated cannot.
    held_bytes = max(phase["allocated_bytes"] for phase in verified["phases"])
    made["policy"]["budget_bytes"] = {"0": held_bytes}
    file.write_text(json.dumps(made), encoding="utf-8")
    assert main(["verify", str(file)]) == 3
    assert "does NOT hold" in capsys.readouterr().out


@pytest.mark.slow
def test_a_prediction_is_of_exactly_what_was_asked(capsys) -> None:
    arguments = ["predict", "sdxl", "--gpu", "rtx-4060", "--json"]
    assert main(arguments) == 0
    resident = json.loads(capsys.readouterr().out)
    assert main([*arguments, "--with", "model_offload"]) == 0
    offloaded = json.loads(capsys.readouterr().out)
    assert offloaded["peak_vram"][0]["process_bytes"] < resident["peak_vram"][0]["process_bytes"]
    assert [option["strategy"] for option in offloaded["options"]] == ["model_offload"]


@pytest.mark.slow
def test_run_writes_the_picture(capsys, tmp_path: Path) -> None:
    from PIL import Image
    from tests.small_pipelines import stable_diffusion

    stable_diffusion().save_pretrained(tmp_path / "model")
    out = tmp_path / "picture.png"
    settings = ["height=64", "width=64", "num_inference_steps=2"]
    arguments = ["run", str(tmp_path / "model"), "a cat", "--device", "cpu", "--vram", "4GB"]
    arguments += [part for setting in settings for part in ("--set", setting)]
    assert main([*arguments, "--seed", "0", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == [str(out)]
    with Image.open(out) as picture:
        assert picture.size == (64, 64)


def test_run_says_in_one_sentence_that_the_pipeline_refused_the_call(
    capsys, tmp_path: Path
) -> None:
    from tests.small_pipelines import stable_diffusion

    stable_diffusion().save_pretrained(tmp_path / "model")
    arguments = ["run", str(tmp_path / "model"), "--device", "cpu", "--vram", "4GB"]
    arguments += ["--set", "height=64", "--set", "width=64", "--out", str(tmp_path / "a.png")]
    assert main([*arguments, "--no-rehearse"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "StableDiffusionPipeline refused the call" in said
    assert "prompt" in said


def test_run_refuses_what_makes_no_file_before_anything_is_loaded(capsys, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert main(["run", str(tmp_path), "a cat", "--with", "latent_output"]) == 2
    assert "latent_output" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def _hook(monkeypatch):
    """``main`` replaces the hook for uncaught errors, for good; here it is put back."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.mark.slow
def test_two_gpus_are_planned_for_with_a_budget_each(tmp_path: Path) -> None:
    arguments = ["--gpus", "rtx-4060,rtx-3060-12gb", "--vram", "0=4GB,1=5GB", "--no-rehearse"]
    done = run_command("plan", "sdxl", *arguments, "--json")
    assert done.returncode == 0
    plan = json.loads(done.stdout)
    peaks = {peak["device"]: peak["process_bytes"] for peak in plan["peak_vram"]}
    assert plan["policy"]["budget_bytes"] == {"0": 4 * 10**9, "1": 5 * 10**9}
    assert all(held < (4, 5)[index] * 10**9 for index, held in peaks.items())
    assert {row["device"] for row in plan["phases"]} == set(peaks)
    refused = run_command(
        "predict", "sdxl", "--gpu", "rtx-4060", "--with", "device_map:device=3@vae"
    )
    assert refused.returncode == 2
    assert "device_map names GPU 3" in refused.stderr
