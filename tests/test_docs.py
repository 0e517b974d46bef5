"""What the README says about names is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from typer.main import get_command

from pipefit.planner import cli
from pipefit.planner.catalog import gpu_names, pipeline_names
from pipefit.strategies import BUILT_IN

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_strategies_is_the_list_of_strategies() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", README, flags=re.MULTILINE)
    assert dict(rows) == {one.name: one.quality.value for one in BUILT_IN}


def test_every_command_shown_exists() -> None:
    blocks = "\n".join(README.split("```")[1::2])
    shown = set(re.findall(r"^pipefit (\w+)", blocks, flags=re.MULTILINE))
    assert shown == set(get_command(cli.app).commands)


def test_the_catalogue_is_as_large_as_it_says() -> None:
    assert f"{len(pipeline_names())} pipelines, {len(gpu_names())} GPUs" in README


def test_the_errors_of_predicted_memory_are_those_of_the_report() -> None:
    report = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    pattern = r"^\| (?:allocated|reserved|process) \|.*$"
    assert re.findall(pattern, README, re.M) == re.findall(pattern, report, re.M)[:3]
    section = report.split("## Leave one pipeline out")[1].split("\n## ")[0]
    errors = [float(e) for e in re.findall(r"\| ([\d.]+)% \| [+-][\d.]+% \|$", section, re.M)]
    words = r"they predict its allocated peak within (\d+) %, and nine in ten within ([\d.]+) %"
    said = re.search(words, " ".join(README.split()))
    assert said is not None
    assert int(said[1]) - 1 < max(errors) <= int(said[1])
    ninetieth = re.search(r"\| 90 %: ([\d.]+)% \|", section)
    assert ninetieth is not None
    assert float(said[2]) - 0.1 < float(ninetieth[1]) <= float(said[2])
    records = report.split("\n## Allocated")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\S+) \| \S+ \| [\d.]+ \| [\d.]+†? \| ([+-][\d.]+)% \|", records, re.M)
    assert "Two allocated records are off by more than 3 %" in " ".join(README.split())
    far = {name: float(error) for name, error in rows if abs(float(error)) > 3}
    assert len(far) == 2
    assert all(error > 0 and name.startswith("diffusionfast-ssd-1b") for name, error in far.items())


def test_what_was_looked_up_afterwards_came_out_as_the_readme_says() -> None:
    report = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    section = report.split("## Looked up afterwards")[1].split("\n### Reserved")[0]
    rows = re.findall(r"^\| (\S+) \| \S+ \| [\d.]+ \| [\d.]+ \| ([+-][\d.]+)% \|", section, re.M)
    errors = {name: float(error) for name, error in rows if "qwenvae" not in name}
    said = " ".join(README.split())
    assert f"{len(errors)} allocated peaks of HunyuanVideo" in said
    off = {name: error for name, error in errors.items() if abs(error) > 0.4}
    assert f"{len(errors) - len(off)} of them are predicted within 0.4 %" in said
    assert all("8bit" in name for name in off)
    assert "come out 3 and 6 % too low" in said
    assert sorted(round(error) for error in off.values()) == [-6, -3]


def test_the_errors_of_predicted_times_are_those_of_the_report() -> None:
    report = (ROOT / "docs" / "latency.md").read_text(encoding="utf-8")
    rows, median, ninetieth = re.search(
        r"(\d+) fitted rows: median error ([\d.]+)%, ninetieth percentile ([\d.]+)%", report
    ).groups()
    fitted = re.findall(r"^\| [^|]+ \| ([\w-]+) \|.*\| [+-]\d+% \| [+-]\d+% \|", report, re.M)
    moved = re.search(r"(\d+) rows: median error ([\d.]+)%", report)
    said = " ".join(README.split())
    assert int(rows) == len(fitted)
    assert f"on {rows} published timings of {len(set(fitted))} GPUs the median error is" in said
    assert f"is {float(median):.0f} %, and nine in ten are within {float(ninetieth):.0f} %" in said
    assert f"have a median error of {moved.group(2)} %; none was held out" in said
