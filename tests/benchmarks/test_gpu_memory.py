"""The instrument without a GPU: real small pipelines and kernels on the CPU, real processes."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu_memory import __main__ as command_line
from benchmarks.gpu_memory.cases import (
    CARDS,
    CONFIGURATIONS,
    PIPELINES,
    Case,
    all_cases,
    allocator_cases,
    card_bytes,
    finished,
    kernel_cases,
)
from benchmarks.gpu_memory.counters import CudaCounter, TensorCounter, numbered
from benchmarks.gpu_memory.kernels import measure_kernel, predict_kernel
from benchmarks.gpu_memory.phases import PhaseMeter
from benchmarks.gpu_memory.pipelines import (
    _held_to,
    give_weights,
    measure_pipeline,
    options_of,
    predict_pipeline,
)
from benchmarks.gpu_memory.probes import measure_context, replay
from benchmarks.gpu_memory.report import case_of, error_of, phase_pairs, predict_again, write_report
from benchmarks.gpu_memory.session import Pace, RowFile, batches, check_same, run
from benchmarks.gpu_memory.worker import Prepared, measured_row, predicted, prepare
from tests.small_pipelines import SMALL_PIPELINES, small_call

from pipefit.cost_models.context import context_bytes
from pipefit.cost_models.memory import SLACK_SHARE
from pipefit.cost_models.units import GIB, KIB, MIB
from pipefit.errors import ApplyFailed, InvalidRequest
from pipefit.planner.build import build_pipeline
from pipefit.planner.catalog import find_gpu, pipeline_names
from pipefit.planner.probe import allocator_settings, cpu_machine
from pipefit.strategies.live import module_components

CPU = cpu_machine().gpus[0]
PLENTY = {"24GB": 24 * GIB}

# -- what is measured, and in which order


def test_every_row_has_a_name_of_its_own_and_known_pipelines() -> None:
    cases = all_cases()
    assert len({case.key for case in cases}) == len(cases)
    assert {name for name, _ in PIPELINES} <= set(pipeline_names())
    asked = {(c.parameters["pipeline"], c.parameters["configuration"]) for c in cases
             if c.kind == "pipeline"}  # fmt: skip
    assert asked == set(itertools.product([name for name, _ in PIPELINES], CONFIGURATIONS))
    assert len(PIPELINES) >= 10
    assert all(json.loads(json.dumps(case.parameters)) == case.parameters for case in cases)


def test_what_says_most_comes_first() -> None:
    cases = all_cases()
    assert cases[0].kind == "context"
    pipelines = [case.parameters for case in cases if case.kind == "pipeline"]
    first = {p["pipeline"] for p in pipelines[: len(PIPELINES)]}
    assert len(first) >= 6
    assert {p["configuration"] for p in pipelines[: len(PIPELINES)]} >= set(CONFIGURATIONS[:3])
    seen = [p["configuration"] for p in pipelines if p["pipeline"] == PIPELINES[0][0]]
    assert seen == list(CONFIGURATIONS)


def test_cases_of_a_batch_are_neighbours() -> None:
    names = [batch[0].batch for batch in batches(all_cases())]
    assert len(set(names)) == len(names)


def test_a_bound_and_the_context_make_the_card_whole() -> None:
    for card, name in CARDS.items():
        gpu = find_gpu(name)
        assert card_bytes(card) + context_bytes(gpu) == gpu.total_bytes
        assert gpu.total_bytes <= int(card.removesuffix("GB")) * GIB
    assert list(CARDS) == sorted(CARDS, key=card_bytes)


def test_a_smaller_gpu_is_predicted_to_give_back_where_a_bound_would() -> None:
    gpu, limit_bytes = find_gpu("h200"), 5 * GIB
    held = _held_to(gpu, limit_bytes)
    capacity_bytes = int((held.total_bytes - context_bytes(held)) / (1 + SLACK_SHARE))
    assert 0 <= capacity_bytes - limit_bytes <= 1


def test_a_decode_is_native_whatever_the_user_has_set() -> None:
    for case in allocator_cases():
        assert set(case.environment.values()) == {case.parameters["conf"]}
        expandable, notes = allocator_settings(case.environment, "linux")
        assert (expandable, notes) == (not case.key.endswith("native"), ())


# -- phases of pipelines that really run


@pytest.mark.parametrize("name", ["flux", "stable_diffusion_xl_controlnet", "wan_two_experts"])
def test_phases_and_their_growth_are_as_predicted(name: str) -> None:
    torch.set_num_threads(1)
    pipe, call = SMALL_PIPELINES[name](), small_call(name)
    options = options_of("resident", pipe, 64)
    expected = predict_pipeline(pipe, call, options, CPU, cards=PLENTY)["phases"]
    with TensorCounter() as counter:
        pipe = SMALL_PIPELINES[name]()
        found = measure_pipeline(pipe, call, options, counter, cards={})
    (free,) = found["calls"]
    assert free["outcome"] == "measured"
    assert [(p["component"], p["entry"], p["calls"]) for p in free["phases"]] == [
        (p["component"], p["entry"], p["calls"]) for p in expected
    ]
    pairs = list(zip(free["phases"], expected, strict=True))
    # Small weights lie in other blocks when a constructor makes them among its temporaries.
    offsets = [said["allocated_bytes"] - phase["allocated_bytes"] for phase, said in pairs]
    assert max(offsets) - min(offsets) <= 16 * KIB
    assert max(map(abs, offsets)) <= 64 * KIB
    for phase, _ in pairs:
        assert phase["begin_bytes"] <= phase["allocated_bytes"] <= phase["reserved_bytes"]
        assert phase["process_bytes"] == phase["reserved_bytes"]


def test_hooks_of_real_strategies_do_not_hide_phases() -> None:
    for configuration in ("model-offload", "leaf"):
        pipe, call = SMALL_PIPELINES["flux"](), small_call("flux")
        with TensorCounter() as counter:
            options = options_of(configuration, pipe, 64)
            found = measure_pipeline(pipe, call, options, counter, cards={})
        entered = [(p["component"], p["calls"]) for p in found["calls"][0]["phases"]]
        assert entered == [
            ("text_encoder", 1),
            ("text_encoder_2", 1),
            ("transformer", 2),
            ("vae", 1),
        ]


@pytest.mark.slow
def test_what_is_compiled_is_measured_while_it_compiles_and_once_more() -> None:
    pipe, call = SMALL_PIPELINES["flux"](), small_call("flux")
    options = options_of("compile-max-autotune", pipe, 64)
    compiled = {o.component: o.parameters["mode"] for o in options if o.strategy == "compile"}
    assert compiled == {"vae": "max-autotune", "transformer": "max-autotune"}
    with TensorCounter() as counter, torch.compiler.set_stance("force_eager"):
        found = measure_pipeline(pipe, call, options, counter, cards={})
    assert pipe.transformer._compiled_call_impl is not None
    assert pipe.vae.decoder._compiled_call_impl is not None
    assert pipe.text_encoder._compiled_call_impl is None
    (first,) = found["calls"]
    phases = [[(p["component"], p["calls"]) for p in one["phases"]]
              for one in (first, found["compiled"])]  # fmt: skip
    assert phases[0] == phases[1]
    assert phases[0][-2:] == [("transformer", 2), ("vae", 1)]


def test_the_meter_leaves_modules_as_they_were() -> None:
    pipe = SMALL_PIPELINES["flux"]()
    before = {name: set(vars(module)) for name, module in module_components(pipe).items()}
    call_before = torch.nn.Module.__call__
    with TensorCounter() as counter:
        meter = PhaseMeter(module_components(pipe), counter)
        with pytest.raises(RuntimeError), meter.watching():
            pipe.vae.decode(torch.zeros(1, 7, 4, 4))  # it has one latent channel
    assert [(p.component, p.entry) for p in meter.phases] == [("vae", "decode")]
    assert meter.phases[0].allocated_bytes > 0
    assert torch.nn.Module.__call__ is call_before
    assert {name: set(vars(module)) for name, module in module_components(pipe).items()} == before


def test_bounds_are_tried_only_where_they_matter_and_out_of_memory_is_a_result() -> None:
    torch.set_num_threads(1)
    pipe, call = SMALL_PIPELINES["cogvideox"](), small_call("cogvideox")
    cards = {
        "huge": GIB,
        "enough": 64 * MIB,
        "between": 24 * MIB,
        "less": 20 * MIB,
        "tiny": 4 * MIB,
    }
    with TensorCounter() as counter:
        options = options_of("resident", pipe, 64)
        found = measure_pipeline(pipe, call, options, counter, cards=cards)
    assert [(c["card"], c["outcome"]) for c in found["calls"]] == [
        (None, "measured"),
        ("enough", "measured"),
        ("between", "out of memory"),
    ]
    assert {card: verdict["fits"] for card, verdict in found["cards"].items()} == {
        "huge": True, "enough": True, "between": False, "less": False, "tiny": False,
    }  # fmt: skip
    assert found["calls"][2]["phases"][-1]["reserved_bytes"] <= cards["between"]


def test_no_second_call_begins_that_would_not_end_in_time() -> None:
    pipe, call = SMALL_PIPELINES["flux"](), small_call("flux")
    with TensorCounter() as counter:
        options = options_of("resident", pipe, 64)
        found = measure_pipeline(pipe, call, options, counter, cards=PLENTY, until_s=0.0)
    assert len(found["calls"]) == 1
    assert found["cards"]["24GB"]["fits"] is None


# -- weights and options of full-size pipelines


def test_weights_keep_ties_order_and_dtypes() -> None:
    pipe, _ = build_pipeline("stable-diffusion-3-medium")
    before = {
        name: [(path, t.shape, t.dtype) for path, t in module.named_parameters()]
        for name, module in module_components(pipe).items()
    }
    tied = pipe.text_encoder_3.shared.weight is pipe.text_encoder_3.encoder.embed_tokens.weight
    give_weights(pipe, None)
    assert tied
    assert pipe.text_encoder_3.shared.weight is pipe.text_encoder_3.encoder.embed_tokens.weight
    for name, module in module_components(pipe).items():
        found = [(path, t.shape, t.dtype) for path, t in module.named_parameters()]
        assert found == before[name]
        tensors = [*module.parameters(), *module.buffers()]
        assert {t.device.type for t in tensors} == {"cpu"}
    assert not pipe.vae.decoder.conv_in.weight.any()


def test_what_cannot_stream_goes_leaf_by_leaf_and_what_cannot_do_that_stays() -> None:
    pipe, _ = build_pipeline("stable-diffusion-v1-5")
    options = {o.component: o for o in options_of("leaf-stream", pipe, 512)}
    assert options["unet"].parameters["use_stream"]
    assert "use_stream" not in options["vae"].parameters
    tiled = [o for o in options_of("tiling", pipe, 512) if o.strategy == "vae_tiling"]
    assert [(o.component, o.parameters) for o in tiled] == [("vae", {"tile_px": 256})]
    (offload,) = options_of("model-offload", pipe, 512)
    assert offload.component is None


# -- kernels, history, context


def small_kernel(op: str) -> dict[str, Any]:
    common = {"dtype": "float32", "layout": "contiguous"}
    return {
        "conv": {
            "op": "conv", "batch": 1, "channels": [8, 16], "size": [64, 64], "kernel": 3, **common
        },
        "linear": {"op": "linear", "rows": 512, "features": [256, 512], "bias": True, **common},
        "group_norm": {"op": "group_norm", "channels": 64, "size": [64, 64], **common},
    }[op]  # fmt: skip


@pytest.mark.parametrize("op", ["conv", "linear", "group_norm"])
def test_a_kernel_grows_as_predicted_where_there_is_no_workspace(op: str) -> None:
    expected = predict_kernel(small_kernel(op), CPU)
    with TensorCounter() as counter:
        found = measure_kernel(small_kernel(op), counter)
    first, second = found["calls"]
    assert first["growth_bytes"] == second["growth_bytes"] == expected["growth_bytes"]
    assert ("a", first["output_bytes"]) in {(e[0], e[2]) for e in first["events"]}


def test_every_kernel_of_the_list_can_be_predicted() -> None:
    gpu = find_gpu("rtx-4090")
    for case in kernel_cases():
        said = predict_kernel(case.parameters, gpu)
        assert said["growth_bytes"] > 0
        assert said["kernels"]


def test_a_replay_of_what_was_written_down_ends_where_the_counter_did() -> None:
    vae = SMALL_PIPELINES["flux"]().vae
    with TensorCounter() as counter, counter.history() as events, torch.no_grad():
        vae.decode(torch.zeros(1, 1, 32, 32))
        reading = counter.read()
    replayed = replay(events)
    assert replayed.peak_allocated_bytes == reading.peak_allocated
    assert replayed.peak_reserved_bytes == reading.peak_reserved
    grown = replay(events, is_expandable=True)
    assert grown.peak_allocated_bytes <= reading.peak_allocated
    assert grown.peak_allocated_bytes <= grown.peak_reserved_bytes


def test_addresses_that_are_used_again_are_other_blocks() -> None:
    def entry(action: str, addr: int, size: int, stream: int = 0) -> dict[str, Any]:
        return {"action": action, "addr": addr, "size": size, "stream": stream}

    trace = [
        entry("free_completed", 1, 9),  # allocated before anything was written down
        entry("segment_alloc", 1, 64),
        entry("alloc", 1, 8),
        entry("free_requested", 1, 8),
        entry("free_completed", 1, 8),
        entry("alloc", 1, 4, stream=94),
    ]
    assert numbered(trace) == [("a", 0, 8, 0), ("f", 0, 8, 0), ("a", 1, 4, 1)]


def test_a_counter_forgets_what_is_freed_and_refuses_what_is_above_its_bound() -> None:
    with TensorCounter() as counter:
        x = torch.zeros(4 * MIB, dtype=torch.uint8)
        y = x[: 2 * MIB].view(torch.float32)
        y += 1
        assert counter.read().requested == 4 * MIB
        with counter.held_to(64 * MIB), pytest.raises(torch.OutOfMemoryError):
            torch.zeros(128 * MIB, dtype=torch.uint8)
        del x, y
        assert counter.read().allocated == 0
        assert counter.read().peak_requested == 4 * MIB
        counter.release()
        assert counter.process_bytes() == 0


def test_the_stages_of_a_context_run() -> None:
    with TensorCounter() as counter:
        stages = measure_context(counter)["stages"]
    assert [s["context_bytes"] for s in stages] == [0] * len(stages)
    assert stages[-1]["reserved_bytes"] > 0


# -- rows


def test_whatever_happens_is_a_row() -> None:
    def fails(error: Exception) -> Prepared:
        def measure(counter: Any, until_s: float) -> dict[str, Any]:
            raise error

        return Prepared(measure=measure, predict=lambda measured: {})

    with TensorCounter() as counter:
        row = measured_row(fails(ValueError("wrong\nin two lines")), counter, 1.0)
        assert (row["outcome"], row["error"]) == ("error", "ValueError: wrong")
        wrapped = ApplyFailed("undone")
        wrapped.__cause__ = torch.OutOfMemoryError("too much")
        row = measured_row(fails(wrapped), counter, 1.0)
        assert (row["outcome"], row["error"]) == ("out of memory", "ApplyFailed: undone")


def test_what_was_measured_before_a_call_failed_is_kept() -> None:
    def stop(*given: Any) -> dict[str, Any]:
        raise ValueError("after a step")

    pipe, call = SMALL_PIPELINES["flux"](), {**small_call("flux"), "callback_on_step_end": stop}
    with TensorCounter() as counter:
        options = options_of("resident", pipe, 64)
        found = measure_pipeline(pipe, call, options, counter, cards=PLENTY)
    (free,) = found["calls"]
    assert (free["outcome"], free["error"]) == ("error", "ValueError: after a step")
    assert [p["component"] for p in free["phases"]][-1] == "transformer"


def test_a_decode_under_the_allocator_is_predicted_from_what_was_measured() -> None:
    (case, *_) = allocator_cases()
    one = prepare(case, CPU)
    assert predicted(one, None) == (None, None)
    events = [("a", 0, 3 * MIB, 0), ("f", 0, 3 * MIB, 0)]
    said, error = predicted(one, {"events": events})
    assert error is None
    assert said is not None
    assert said["peak_reserved"] == 20 * MIB


# The session itself is tested with processes that start at once: they speak the worker's language
# and do what the key says.
CHILD = """
import json, os, sys, time
request = json.loads(sys.stdin.readline())
say = lambda **m: print(json.dumps(m), flush=True)
for case in request["cases"]:
    key = case["key"]
    if "dies preparing" in key:
        os._exit(9)
    if "unpreparable" in key:
        say(prepared=key, failed="ValueError: no")
    else:
        say(prepared=key, predicted={}, prediction_error=None, options=[],
            estimate_s=case["estimate_s"])
say(ready={"torch": "9"})
for line in sys.stdin:
    key = json.loads(line)["measure"]
    if "dies" in key:
        os.kill(os.getpid(), 9)
    if "hangs" in key:
        time.sleep(60)
    broken = "breaks" in key
    say(row=key, is_broken=broken, outcome="error" if broken else "measured",
        measured=None if broken else {"pid": os.getpid()}, error="CUDA error" if broken else None,
        took_s=0.1)
"""


def session(
    keys: Sequence[str], folder: Path, *, batch: str = "", limit_s: float = 30.0, **estimates: float
) -> tuple[RowFile, list[str]]:
    rows = RowFile(folder / "rows.jsonl")
    cases = [
        Case(key=key, kind="context", parameters={}, estimate_s=estimates.get(key, 0.1),
             batch=batch or key)
        for key in keys
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        left = run(
            cases, rows, gpu=CPU, device="cpu", limit_s=limit_s, log=log, ahead=1,
            command=(sys.executable, "-c", CHILD),
        )  # fmt: skip
    return rows, left


def outcomes(rows: RowFile) -> dict[str, str]:
    return {row["key"]: row["outcome"] for row in rows.rows}


def test_rows_come_in_order_each_in_a_process_of_its_own(tmp_path: Path) -> None:
    rows, left = session(["a", "b", "c"], tmp_path)
    assert [row["key"] for row in rows.rows] == ["a", "b", "c"]
    assert left == []
    assert len({row["measured"]["pid"] for row in rows.rows}) == 3
    rows, _ = session(["d", "e"], tmp_path, batch="together")
    assert len({row["measured"]["pid"] for row in rows.rows[-2:]}) == 1


def test_a_restart_skips_what_is_there_and_drops_what_was_cut_off(tmp_path: Path) -> None:
    session(["a", "b"], tmp_path)
    path = tmp_path / "rows.jsonl"
    path.write_text(path.read_text() + '{"key": "c", "outc')
    before = {row["key"]: row["measured"]["pid"] for row in RowFile(path).rows}
    rows, _ = session(["a", "b", "c"], tmp_path)
    after = {row["key"]: row["measured"]["pid"] for row in rows.rows}
    assert list(after) == ["a", "b", "c"]
    assert {key: after[key] for key in before} == before
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b", "c"]


def test_a_process_that_dies_or_breaks_costs_one_row(tmp_path: Path) -> None:
    keys = ["a", "dies", "b", "breaks", "c", "unpreparable", "d", "dies preparing", "e"]
    rows, left = session(keys, tmp_path, batch="together")
    found = outcomes(rows)
    assert left == []
    assert {key for key, outcome in found.items() if outcome == "measured"} == set("abcde")
    assert {key for key, outcome in found.items() if outcome == "error"} == set(keys) - set("abcde")
    errors = {row["key"]: row["error"] for row in rows.rows}
    assert "signal 9" in errors["dies"]
    assert "exit code 9" in errors["dies preparing"]


def test_a_run_ends_in_time_and_leaves_what_it_cannot_finish(tmp_path: Path) -> None:
    start_s = time.monotonic()
    keys = ["a", "long", "hangs", "b"]
    rows, left = session(keys, tmp_path, limit_s=7.0, long=100.0)
    assert time.monotonic() - start_s < 8
    assert outcomes(rows) == {"a": "measured", "hangs": "stopped"}
    assert left == ["long", "hangs", "b"]
    assert finished(rows.rows) == {"a"}
    rows, left = session(["b"], tmp_path)
    assert (outcomes(rows)["b"], left) == ("measured", [])


def test_estimates_follow_the_pace_of_the_machine() -> None:
    pace = Pace()
    assert pace.expected_s(2.0) == 2.0
    for _ in range(3):
        pace.learn(1.0, 3.0)
    pace.learn(1.0, 100.0)
    assert pace.expected_s(2.0) == 6.0


def test_rows_of_two_machines_do_not_mix(tmp_path: Path) -> None:
    described = {"gpu_name": "one", "driver": "5", "software": {"torch": "2"}, "command": "x"}
    check_same(tmp_path, described)
    check_same(tmp_path, {**described, "command": "y"})
    with pytest.raises(InvalidRequest, match="gpu_name one"):
        check_same(tmp_path, {**described, "gpu_name": "other"})


# -- the report and the command line


def a_row() -> dict[str, Any]:
    phase = {"component": "vae", "entry": "decode"}
    peaks = {"allocated_bytes": 2 * GIB, "reserved_bytes": 3 * GIB, "process_bytes": 4 * GIB}
    said = {**phase, **peaks, "name": "decode", "allocated_bytes": GIB}
    verdict = {"fits": False, "how": "tried"}
    return {
        "key": "pipeline p resident",
        "kind": "pipeline",
        "parameters": {"pipeline": "p", "configuration": "resident"},
        "environment": {},
        "outcome": "measured",
        "error": None,
        "took_s": 2.0,
        "measured": {"calls": [{"phases": [{**phase, **peaks}]}], "cards": {"8GB": verdict}},
        "predicted": {"phases": [said], "cards": {"8GB": {"fits": True}}},
    }


def test_the_report_puts_predicted_beside_measured(tmp_path: Path) -> None:
    failed = {**a_row(), "key": "pipeline q resident", "measured": None, "predicted": None}
    failed |= {"outcome": "error", "error": "ValueError: no"}
    machine = {"gpu_name": "a card", "driver": "5", "software": {"torch": "2.11"}, "gpu": {},
               "allocator": "", "command": "python -m benchmarks.gpu_memory"}  # fmt: skip
    write_report(tmp_path, machine, [a_row(), failed])
    text = (tmp_path / "gpu_memory.md").read_text()
    assert (
        "| p, resident: decode (vae) | 1.000 | 2.000 | -50.00% | 3.000 | 3.000 | +0.00% |" in text
    )
    assert "| p, resident | 8GB | fits | does not | tried | NO |" in text
    assert "- pipeline q resident: ValueError: no" in text
    assert "torch 2.11" in text
    whole = json.loads((tmp_path / "gpu_memory.json").read_text())
    assert whole["schema"] == "pipefit.gpu_memory/1"
    assert [row["key"] for row in whole["rows"]] == ["pipeline p resident", "pipeline q resident"]
    assert (error_of(99, 100), error_of(1, 0)) == (-0.01, None)
    # Nine of ten peaks are exact.
    exact = {**a_row(), "predicted": {"phases": a_row()["measured"]["calls"][0]["phases"]}}
    exact["predicted"]["phases"][0]["name"] = "decode"
    write_report(tmp_path, machine, [a_row(), *[exact] * 9])
    text = (tmp_path / "gpu_memory.md").read_text()
    assert (
        "allocated: 10 peaks, median error 0.00%, ninetieth percentile 0.00%, worst -50.00%" in text
    )


def test_old_rows_are_predicted_again_without_a_gpu() -> None:
    case = kernel_cases()[0]
    row = {"key": case.key, "kind": "kernel", "parameters": case.parameters, "environment": {},
           "measured": {"calls": []}, "predicted": {"growth_bytes": 1}}  # fmt: skip
    gpu = find_gpu("h200")
    (again,) = predict_again([row], lambda c, measured: predicted(prepare(c, gpu), measured))
    assert case_of(row).key == case.key
    assert again["predicted"] == predict_kernel(case.parameters, gpu)
    assert again["measured"] == row["measured"]
    assert phase_pairs({"measured": None, "predicted": None}) == []


def test_a_dry_run_lists_rows_with_predictions(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["--dry-run", "--gpu", "h200", "--only", "kernel op=linear*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "predicted for h200" in lines[0]
    assert "32.00 of it workspace" in lines[1]
    assert command_line.main(["--dry-run", "--only", "nothing"]) == 2
    assert "--dry-run lists them" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_instrument_runs_on_the_cpu_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--device", "cpu", "--out", str(tmp_path), "--minutes", "2"]
    assert command_line.main([*asked, "--only", "*float32 rows=1 *"]) == 0
    assert command_line.main([*asked, "--only", "*float32 rows=1*4 *"]) == 0
    assert "2 rows in" in capsys.readouterr().out
    whole = json.loads((tmp_path / "gpu_memory.json").read_text())
    assert [row["outcome"] for row in whole["rows"]] == ["measured", "measured"]
    assert whole["software"]["torch_build"] == torch.__version__
    for row in whole["rows"]:
        said, found = row["predicted"]["growth_bytes"], row["measured"]["calls"][0]["growth_bytes"]
        assert said == found
    assert command_line.main(["--report", "--out", str(tmp_path)]) == 0


# -- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_tiny_row_is_measured_on_a_gpu(tmp_path: Path) -> None:
    asked = ["--out", str(tmp_path), "--minutes", "2", "--only", "kernel op=linear*rows=154*"]
    assert command_line.main(asked) == 0
    rows = json.loads((tmp_path / "gpu_memory.json").read_text())["rows"]
    assert {row["outcome"] for row in rows} == {"measured"}
    for row in rows:
        first = row["measured"]["calls"][0]
        assert first["growth_bytes"] >= first["output_bytes"] > 0
        assert first["phase"]["context_bytes"] > 0
        assert first["events"]


def test_a_counter_of_a_gpu_has_what_the_instrument_asks_of_one() -> None:
    asked = {name for name in vars(TensorCounter) if not name.startswith("_")}
    assert asked <= set(dir(CudaCounter))
