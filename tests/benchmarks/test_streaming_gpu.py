"""The instrument on the CPU: a small FLUX transformer under real strategies, real processes."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import streaming_gpu
from benchmarks.gpu_memory.counters import TensorCounter
from benchmarks.gpu_memory.pipelines import GROUPS
from benchmarks.gpu_memory.session import RowFile, batches
from benchmarks.gpu_memory.worker import Missing, Prepared, measured_row
from benchmarks.streamed_steps import (
    COMPONENT,
    SMALL_TEXT_TOKENS,
    WARM_UP_STEPS,
    Subject,
    build_subject,
    check_mmgp,
    make_real,
    measure_link,
    measure_placed,
    measure_resident,
    nearer,
    next_budget,
    option_of,
    streamed,
    take_mmgp_off,
)
from benchmarks.streaming_gpu import (
    GROUP_CONFIGURATIONS,
    LAYERS,
    LEVELS,
    SINGLE_LAYERS,
    TRANSFORMER_BYTES,
    cases_of,
    model_for,
)
from benchmarks.streaming_report import beside, derived, rate_of, verdict, write_report

from pipefit.cost_models.units import MIB
from pipefit.planner.apply import apply_options
from pipefit.planner.build import build_pipeline
from pipefit.planner.catalog import pipeline_entry
from pipefit.strategies.streamer import CopyStream

SMALL = model_for(0, is_small=True)


def real_subject(*, is_resident: bool = True) -> Subject:
    torch.set_num_threads(1)
    subject = build_subject(SMALL)
    make_real(subject, torch.device("cpu"), is_resident=is_resident)
    return subject


@pytest.fixture
def counter() -> Iterator[TensorCounter]:
    with TensorCounter() as one:
        yield one


# -- which rows there are


def test_every_row_has_a_name_of_its_own_and_the_streaming_ones_come_first() -> None:
    cases = cases_of(model_for(10**12))
    assert len({case.key for case in cases}) == len(cases)
    assert [case.kind for case in cases[:7]] == ["link", "resident", *["streaming"] * len(LEVELS)]
    assert len(LEVELS) == 5
    names = [batch[0].batch for batch in batches(cases)]
    assert len(set(names)) == len(names)
    assert set(GROUP_CONFIGURATIONS) == set(GROUPS)
    keys = {case.key: place for place, case in enumerate(cases)}
    for place, case in enumerate(cases):
        if case.kind == "mmgp":
            assert keys[case.parameters["like"]] < place
    assert all(json.loads(json.dumps(case.parameters)) == case.parameters for case in cases)


def test_a_host_that_is_too_small_gets_fewer_blocks_and_the_rows_say_how_many() -> None:
    transformer = build_pipeline("flux.1-dev")[0].transformer
    num_bytes = sum(p.numel() * p.element_size() for p in transformer.parameters())
    assert num_bytes == TRANSFORMER_BYTES
    blocks = transformer.transformer_blocks, transformer.single_transformer_blocks
    assert [len(one) for one in blocks] == [LAYERS, SINGLE_LAYERS]
    model = model_for(TRANSFORMER_BYTES)
    assert model == {"layers": 9, "single_layers": 19, "is_small": False}
    subject = build_subject(model)
    held = sum(p.numel() * p.element_size() for p in subject.transformer.parameters())
    assert 0.4 * num_bytes < held < 0.5 * num_bytes
    assert {case.parameters["model"]["layers"] for case in cases_of(model)} == {9}
    assert subject.call["height"] == 1024
    assert subject.call["prompt_embeds"].shape == (1, 512, 4096)


def test_the_call_is_the_one_that_the_pipeline_makes_when_nothing_is_said() -> None:
    pipe, info = build_pipeline("flux.1-dev")
    assert info.entry == pipeline_entry("flux.1-dev")
    assert pipe.default_sample_size * pipe.vae_scale_factor == 1024


# -- what a row measures


def test_inputs_and_weights_are_the_same_wherever_the_weights_lie() -> None:
    one, other = real_subject(), real_subject(is_resident=False)
    assert one.arguments["encoder_hidden_states"].shape[1] == SMALL_TEXT_TOKENS
    assert one.arguments.keys() == other.arguments.keys()
    for key, value in one.arguments.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other.arguments[key])
    weights = other.transformer.state_dict()
    for key, value in one.transformer.state_dict().items():
        assert torch.equal(value, weights[key])
        assert value.any()


def test_blocks_brought_one_by_one_compute_what_resident_ones_do(
    tmp_path: Path, counter: TensorCounter
) -> None:
    resident, carried = real_subject(), real_subject(is_resident=False)
    before = {key: value.data_ptr() for key, value in carried.transformer.state_dict().items()}
    found = measure_resident(resident, counter, tmp_path / "a")
    again = measure_resident(carried, counter, tmp_path / "b")
    assert found["output_sha256"] == again["output_sha256"]
    assert (found["is_resident"], again["is_resident"]) == (True, False)
    assert "step_s" not in again
    assert again["compute_s"] == pytest.approx(sum(gpu_s for _, gpu_s, _ in again["windows"]))
    called = [path for path, *_ in found["windows"] if path is not None]
    assert called == [path for path, *_ in again["windows"] if path is not None]
    cut = resident.cut
    assert sorted(called) == sorted(cut.blocks[number].path for number in cut.called)
    assert len(found["windows"]) == 2 * len(called) + 1
    after = {key: value.data_ptr() for key, value in carried.transformer.state_dict().items()}
    assert before == after
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in carried.transformer.modules())


@pytest.mark.parametrize(
    "placement",
    [
        {"level": 0, "num_slots": 1},
        {"level": 8, "num_slots": 2},
        {"level": 14, "num_slots": 3},
        {"configuration": "leaf"},
        {"configuration": "block"},
    ],
    ids=str,
)
def test_the_output_under_a_placement_is_the_resident_one_and_the_placement_is_taken_back(
    placement: dict[str, Any], tmp_path: Path, counter: TensorCounter
) -> None:
    subject, reference = real_subject(), tmp_path / "reference.safetensors"
    resident = measure_resident(subject, counter, reference)
    weights = {key: value.clone() for key, value in subject.transformer.state_dict().items()}
    option = option_of(subject, placement)
    found = measure_placed(subject, option, counter, reference)
    assert found["output_sha256"] == resident["output_sha256"]
    assert (found["largest_difference"], found["is_finite"]) == (0.0, True)
    assert found["largest_reference"] > 0
    assert len(found["steps_s"]) >= 3
    assert min(found["steps_s"]) <= found["step_s"] <= max(found["steps_s"])
    assert found["process_bytes"] >= found["reserved_bytes"] >= found["allocated_bytes"] > 0
    for key, value in subject.transformer.state_dict().items():
        assert torch.equal(value, weights[key])
    if option.strategy == "streaming":
        count = len(subject.cut.called)
        assert found["resident_blocks"] == round(count * placement["level"] / 16)
        assert found["streamed_blocks"] + found["resident_blocks"] == count


def test_the_streamed_bytes_are_those_that_the_engine_copies_in_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    subject, copied = real_subject(), []
    copy = CopyStream.copy

    def counting(self: CopyStream, target: Any, source: Any) -> None:
        copied.append(source.numel())
        copy(self, target, source)

    monkeypatch.setattr(CopyStream, "copy", counting)
    for level in LEVELS:
        option = option_of(subject, {"level": level, "num_slots": 2})
        applied = apply_options(subject.pipe, [option], "cpu")
        for _ in range(WARM_UP_STEPS):
            subject.step()
        copied.clear()
        subject.step()
        expected = streamed(subject.cut, option.parameters["resident_blocks"])
        assert (len(copied), sum(copied)) == (
            expected["streamed_blocks"],
            expected["streamed_bytes"],
        )
        applied.undo()


def test_an_output_that_differs_says_by_how_much(tmp_path: Path, counter: TensorCounter) -> None:
    subject, reference = real_subject(), tmp_path / "reference.safetensors"
    resident = measure_resident(subject, counter, reference)
    subject.transformer.proj_out.bias.data += 0.5
    option = option_of(subject, {"level": 8, "num_slots": 2})
    found = measure_placed(subject, option, counter, reference)
    assert found["output_sha256"] != resident["output_sha256"]
    assert found["largest_difference"] == pytest.approx(0.5, abs=0.02)


def test_what_cannot_be_applied_is_an_error_of_its_row_alone(
    tmp_path: Path, counter: TensorCounter
) -> None:
    subject, reference = real_subject(), tmp_path / "reference.safetensors"
    resident = measure_resident(subject, counter, reference)
    streams = option_of(subject, {"configuration": "leaf-record-stream"})
    prepared = Prepared(
        measure=lambda c, until_s: measure_placed(subject, streams, c, reference),
        predict=lambda measured: {},
    )
    row = measured_row(prepared, counter, 60.0)
    assert row["outcome"] == "error"
    assert "streams" in row["error"]
    after = measure_placed(
        subject, option_of(subject, {"level": 4, "num_slots": 2}), counter, reference
    )
    assert after["output_sha256"] == resident["output_sha256"]


def test_a_cpu_copies_in_memory(counter: TensorCounter) -> None:
    assert rate_of(measure_link(counter)) > 1e6


# -- mmgp


def test_mmgp_says_what_it_needs(counter: TensorCounter) -> None:
    with pytest.raises(Exception, match=r"pip install mmgp|first CUDA GPU"):
        check_mmgp(counter.device)
    absent = Prepared(measure=functools.partial(_needs, "mmgp"), predict=lambda measured: {})
    row = measured_row(absent, counter, 1.0)
    assert (row["outcome"], row["error"]) == ("missing", "It needs `pip install mmgp`.")


def _needs(package: str, counter: Any, until_s: float) -> dict[str, Any]:
    raise Missing(f"It needs `pip install {package}`.")


def test_budgets_come_as_near_to_the_asked_memory_as_whole_blocks_allow() -> None:
    block_bytes, target_bytes = 300 * MIB, 5000 * MIB

    def allocated(budget_bytes: float) -> int:
        """As mmgp does: whole blocks below the budget, with activations and two on their way."""
        return int(budget_bytes // block_bytes + 2) * block_bytes + 480 * MIB

    tries: list[Sequence[float]] = []
    best: dict[str, Any] | None = None
    budget = float(target_bytes)
    for _ in range(3):
        one = {"allocated_bytes": allocated(budget), "budget": budget}
        tries.append((budget, one["allocated_bytes"], 1.0))
        best = one if best is None else nearer(best, one, target_bytes)
        budget = next_budget(tries, target_bytes)
    assert best is not None
    assert abs(best["allocated_bytes"] - target_bytes) <= block_bytes
    assert abs(tries[0][1] - target_bytes) > block_bytes


def test_forwards_and_marks_of_mmgp_come_off_and_the_output_is_as_before() -> None:
    subject = real_subject()
    before = subject.step()
    for part in subject.transformer.modules():
        part._mm_id, part._mm_forward = COMPONENT, part.forward
        part.forward = functools.partial(lambda inner, *a, **k: inner(*a, **k), part.forward)
    assert "forward" in subject.transformer.__dict__
    take_mmgp_off(subject.transformer)
    for part in subject.transformer.modules():
        assert not any(n == "forward" or n.startswith("_mm_") for n in part.__dict__)
    assert torch.equal(subject.step(), before)
    apply_options(subject.pipe, [option_of(subject, {"level": 0, "num_slots": 2})], "cpu").undo()


# -- what rows say together


def a_row(kind: str, key: str = "", **measured: Any) -> dict[str, Any]:
    parameters: dict[str, Any] = {}
    if kind == "streaming":
        parameters = {"level": measured.pop("level"), "num_slots": 2}
        key = f"streaming {parameters['level']}/16 slots=2"
    peaks = {
        "allocated_bytes": 2**30, "reserved_bytes": 2**31, "process_bytes": 2**31, "step_s": 1.0,
        "output_sha256": "a", "is_finite": True, "largest_difference": 0.0,
        "largest_reference": 1.0,
    }  # fmt: skip
    if kind == "link":
        peaks = {}
    return {
        "key": key or kind, "kind": kind, "parameters": parameters, "environment": {},
        "outcome": "measured", "error": None, "prediction_error": None, "took_s": 1.0,
        "predicted": None, "measured": peaks | measured,
    }  # fmt: skip


LINK = a_row("link", registered_bytes_per_s=20e9, torch_pinned_bytes_per_s=25e9)
RESIDENT = a_row("resident", compute_s=0.5, is_resident=True, windows=[])


def a_streaming_row(level: int, step_s: float, streamed_bytes: int, **more: Any) -> dict[str, Any]:
    counts = {"resident_blocks": level, "streamed_blocks": 16 - level}
    return a_row(
        "streaming", level=level, step_s=step_s, streamed_bytes=streamed_bytes, **counts, **more
    )


def test_a_step_is_held_to_the_larger_of_two_limits() -> None:
    linked = a_streaming_row(0, 1.08, 25 * 10**9)
    computing = a_streaming_row(8, 0.6, 10**9)
    *_, one, other = derived([LINK, RESIDENT, linked, computing], None)
    assert one["derived"] == {"is_equal": True, "bound_s": 1.0, "ratio": pytest.approx(1.08)}
    assert other["derived"] == {"is_equal": True, "bound_s": 0.5, "ratio": pytest.approx(1.2)}
    (alone,) = derived([linked], None)
    assert alone["derived"] == {}


def test_the_goal_is_met_only_when_all_levels_are() -> None:
    rows = [a_streaming_row(level, 0.54, 10**9) for level in LEVELS]
    assert "5 of 5 levels are measured, and the goal of 1.10 is met" in verdict(
        derived([LINK, RESIDENT, *rows], None)
    )
    assert "4 of 5 levels are measured, and the goal of 1.10 is open" in verdict(
        derived([LINK, RESIDENT, *rows[1:]], None)
    )
    slow = a_streaming_row(4, 0.56, 10**9)
    said = verdict(derived([LINK, RESIDENT, rows[0], slow, *rows[2:]], None))
    assert "at most 1.120 of the larger limit, at 4/16" in said
    assert "is MISSED" in said
    assert verdict(derived(rows, None)) == "No ratio was measured with 2 slots."


def test_a_peer_stands_beside_the_fastest_row_that_takes_no_more_memory() -> None:
    rows = [
        a_streaming_row(0, 2.0, 10**9, allocated_bytes=100),
        a_streaming_row(4, 1.5, 10**9, allocated_bytes=200),
        a_streaming_row(8, 1.0, 10**9, allocated_bytes=300),
    ]
    peer = {"allocated_bytes": 250, "step_s": 3.0}
    assert beside(peer, rows) == {"beside": "streaming 4/16 slots=2", "speedup": 2.0}
    assert beside({**peer, "allocated_bytes": 50}, rows) == {"beside": None, "speedup": None}


def test_the_model_of_streaming_runs_on_measured_windows_at_the_measured_rate() -> None:
    subject = build_subject(SMALL)
    cut = subject.cut
    windows = [(block.path, 0.010, 0.001) for block in cut.blocks]
    compute_s = 0.010 * len(cut.blocks)
    resident = a_row("resident", compute_s=compute_s, is_resident=True, windows=windows)
    measured = streamed(cut, 0)
    row = a_row("streaming", level=0, **measured)
    fast, slow = 1e12, measured["streamed_bytes"] / (10 * compute_s)
    for rate, limit_s in ((fast, compute_s), (slow, 10 * compute_s)):
        link = a_row("link", registered_bytes_per_s=rate, torch_pinned_bytes_per_s=rate / 2)
        seen = derived([link, resident, row], cut)[-1]["derived"]
        assert seen["bound_s"] == pytest.approx(limit_s)
        assert 0.999 * limit_s <= seen["from_measured_s"] <= 1.05 * limit_s


def test_the_report_has_a_line_for_every_row_and_says_what_failed(tmp_path: Path) -> None:
    peer = a_row("group_offload", "group_offload leaf", step_s=2.0, output_sha256="b",
                 largest_difference=0.25)  # fmt: skip
    absent = {**a_row("mmgp", "mmgp like x"), "measured": None, "outcome": "missing",
              "error": "It needs `pip install mmgp`."}  # fmt: skip
    streaming = a_streaming_row(0, 1.08, 25 * 10**9, warnings=["could not be page-locked"])
    machine = {"gpu_name": "a card", "driver": "5", "software": {"torch": "2.13"}, "gpu": {},
               "allocator": "", "command": "x", "model": model_for(10**12)}  # fmt: skip
    rows = derived([LINK, RESIDENT, streaming, peer, absent], None)
    write_report(tmp_path, machine, rows)
    text = (tmp_path / "streaming_gpu.md").read_text()
    assert "4 measured, 1 missing" in text
    assert "19 double and 38 single blocks" in text
    assert "20.00 GB/s from registered, 25.00 from torch's memory" in text
    assert (
        "| 0/16 slots=2 | 16: 23.28 | 1.00 | 2.00 | 2.00 | – | 1080.00 | 1000.00 | 1.080 | – | – "
        "| equal |" in text
    )
    assert (
        "| group_offload leaf | 1.00 | 2.00 | 2.00 | 2000.00 | – | differs by 0.25 of 1 "
        "| streaming 0/16 slots=2 | 1.85 |" in text
    )
    assert "- mmgp like x: It needs `pip install mmgp`." in text
    assert "- could not be page-locked" in text
    whole = json.loads((tmp_path / "streaming_gpu.json").read_text())
    assert whole["schema"] == "pipefit.streaming_gpu/1"
    assert [row["derived"].get("ratio") for row in whole["rows"]] == [None, None, 1.08, None, None]


# -- the command


def test_the_command_measures_goes_on_and_does_not_measure_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--dry-run", "--out", str(tmp_path), "--minutes", "2"]
    assert streaming_gpu.main([*asked, "--only", "[lr]*"]) == 0
    before = RowFile(tmp_path / "rows.jsonl").rows
    assert [(row["key"], row["outcome"]) for row in before] == [
        ("link", "measured"),
        ("resident", "measured"),
    ]
    assert streaming_gpu.main([*asked, "--only", "*[!d]* */16 slots=2"]) == 0
    rows = RowFile(tmp_path / "rows.jsonl").rows
    assert rows[:2] == before
    said = capsys.readouterr().out
    assert said.count("resident: measured") == 1
    assert "streaming 14/16 slots=2: measured" in said
    whole = json.loads((tmp_path / "streaming_gpu.json").read_text())
    streaming = [row for row in whole["rows"] if row["kind"] == "streaming"]
    assert [row["parameters"]["level"] for row in streaming] == list(LEVELS)
    resident = before[1]["measured"]
    for row in streaming:
        seen, measured = row["derived"], row["measured"]
        assert seen["is_equal"]
        assert measured["largest_difference"] == 0.0
        assert seen["bound_s"] >= resident["compute_s"]
        assert seen["ratio"] == pytest.approx(measured["step_s"] / seen["bound_s"])
        assert seen["from_measured_s"] > 0
        assert row["predicted"]["step_s"] > 0
        assert row["prediction_error"] is None
    mmgp = [row for row in whole["rows"] if row["kind"] == "mmgp"]
    assert mmgp
    assert {row["outcome"] for row in mmgp} <= {"missing", "error"}
    text = (tmp_path / "streaming_gpu.md").read_text()
    assert "no figure means anything" in text
    assert text.count("| equal |") == 1 + len(LEVELS)


def test_folders_are_not_shared_by_dry_runs_and_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = {"model": model_for(10**12)}
    (tmp_path / "machine.json").write_text(json.dumps(machine))
    assert streaming_gpu.main(["--dry-run", "--out", str(tmp_path)]) == 2
    assert "give another folder" in capsys.readouterr().err
    assert streaming_gpu.main(["--report", "--out", str(tmp_path / "none")]) == 2
    assert "There are no rows" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_link_is_measured_on_a_gpu(tmp_path: Path) -> None:
    asked = ["--out", str(tmp_path), "--minutes", "2", "--only", "link"]
    assert streaming_gpu.main(asked) == 0
    (row,) = json.loads((tmp_path / "streaming_gpu.json").read_text())["rows"]
    assert row["outcome"] == "measured"
    assert rate_of(row["measured"]) > 1e9
