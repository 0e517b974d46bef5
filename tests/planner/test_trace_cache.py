"""Traces on disk: what is read is what was made, and the cache never fails anybody."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipefit.cost_models import workload_json
from pipefit.cost_models.workload import (
    Component,
    Kernel,
    ModuleInfo,
    Phase,
    Routine,
    TensorInfo,
    Workload,
)
from pipefit.planner import trace_cache
from pipefit.planner.trace_cache import cache_folder, cache_info, cached_trace, clear_cache
from pipefit.strategies.sharded_checkpoint import SHARDS_SUFFIX, UNFINISHED_SUFFIX, rewrite

# -- generated workloads

NUMBERS = st.integers(min_value=0, max_value=1 << 45)
NAMES = st.text(max_size=8)
SHAPES = st.lists(NUMBERS, max_size=4).map(tuple)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | NAMES,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(NAMES, values, max_size=3),
    max_leaves=6,
)
CALLS = st.dictionaries(NAMES, PLAIN, max_size=3)
EVENTS = st.lists(
    st.tuples(st.just("a"), NUMBERS, NUMBERS)
    | st.tuples(st.sampled_from("fxk"), NUMBERS)
    | st.tuples(st.just("c"), NUMBERS, NAMES, SHAPES, st.lists(st.integers()).map(tuple))
    | st.tuples(st.just("w"), NAMES, st.integers()),
    max_size=6,
).map(tuple)


def tuples_of(values: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(values, max_size=3).map(tuple)


KERNELS = st.builds(
    Kernel,
    kind=st.sampled_from(["conv", "gemm", "norm"]),
    name=NAMES,
    dtype=NAMES,
    read_bytes=NUMBERS,
    write_bytes=NUMBERS,
    shape=SHAPES,
    masked=st.booleans(),
)
ROUTINES = st.builds(
    Routine,
    module_class=NAMES,
    entry=NAMES,
    events=EVENTS,
    returns=SHAPES,
    num_outside=NUMBERS,
)
TENSORS = st.builds(
    TensorInfo,
    path=NAMES,
    num_bytes=NUMBERS,
    dtype=NAMES,
    shape=SHAPES,
    is_buffer=st.booleans(),
    tied_to=st.none() | NAMES,
)
MODULES = st.builds(ModuleInfo, path=NAMES, class_name=NAMES, is_leaf_layer=st.booleans())
COMPONENTS = st.builds(
    Component,
    name=NAMES,
    class_name=NAMES,
    library=NAMES,
    tensors=tuples_of(TENSORS),
    modules=tuples_of(MODULES),
    traits=CALLS,
)
PHASES = st.builds(Phase, name=NAMES, component=NAMES, entry=NAMES, calls=SHAPES)
WORKLOADS = st.builds(
    Workload,
    pipeline=NAMES,
    pipeline_class=NAMES,
    call=CALLS,
    components=tuples_of(COMPONENTS),
    kernels=tuples_of(KERNELS),
    routines=tuples_of(ROUTINES),
    root=EVENTS,
    phases=tuples_of(PHASES),
    variants=st.dictionaries(NAMES, st.dictionaries(NUMBERS, NUMBERS, max_size=3), max_size=2),
    offload_sequence=tuples_of(NAMES),
    offload_excluded=tuples_of(NAMES),
    assumptions=tuples_of(NAMES),
    fingerprint=NAMES,
    versions=st.dictionaries(NAMES, NAMES, max_size=2),
)

WORKLOAD = Workload(
    pipeline="one-linear",
    pipeline_class="OneLinearPipeline",
    call={"prompt": "a cat", "height": None, "sizes": [1, 2.5, True]},
    components=(
        Component(
            name="unet",
            class_name="UNet",
            library="diffusers",
            tensors=(TensorInfo(path="w", num_bytes=32, dtype="float16", shape=(4, 4)),),
            modules=(ModuleInfo(path="", class_name="UNet", is_leaf_layer=True),),
            traits={"block_modules": ["blocks"], "dtype": None},
        ),
    ),
    kernels=(
        Kernel(
            kind="gemm", name="mm", dtype="float16", read_bytes=64, write_bytes=32, shape=(1, 4)
        ),
    ),
    routines=(
        Routine(
            module_class="UNet", entry="forward", events=(("a", 0, 32), ("k", 0)), returns=(0,)
        ),
    ),
    root=(("c", 0, "/unet", (0,), ()), ("f", 0), ("w", "unet", -32)),
    phases=(Phase(name="denoise", component="unet", entry="forward", calls=(0,)),),
    variants={"unet|channels_last:": {0: 0}},
)


def same(one: Workload, other: Workload) -> bool:
    """Whether they are equal down to the types: ``True`` is not 1, a list is not a tuple."""
    return one == other and repr(one) == repr(other)


def forbidden() -> Workload:
    raise AssertionError("the entry was not read")


class Counted:
    """Makes a workload, and counts how often it was asked to."""

    def __init__(self, workload: Workload = WORKLOAD) -> None:
        self.workload = workload
        self.num_calls = 0

    def __call__(self) -> Workload:
        self.num_calls += 1
        return self.workload


def entry_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.trace"))


# -- what is read is what was made


@settings(max_examples=40, deadline=None)
@given(WORKLOADS)
def test_a_workload_comes_back_from_json_with_its_types(workload: Workload) -> None:
    data = workload_json.to_json(workload)
    assert same(workload_json.from_json(data), workload)
    assert same(workload_json.from_json(json.loads(json.dumps(data))), workload)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("schema"),
        lambda data: data.update(schema="pipefit.workload/0"),
        lambda data: data.pop("kernels"),
        lambda data: data.update(extra=1),
        lambda data: data["kernels"][0].pop(),
        lambda data: data["root"].append(10**6),
        lambda data: data.update(routines=None),
    ],
)
def test_json_of_another_shape_is_refused(change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(json.dumps(workload_json.to_json(WORKLOAD)))
    change(data)
    with pytest.raises(ValueError, match="JSON"):
        workload_json.from_json(data)


def test_the_second_call_reads_what_the_first_one_made(tmp_path: Path) -> None:
    assert cached_trace({"n": 1}, lambda: WORKLOAD, folder=tmp_path) is WORKLOAD
    assert same(cached_trace({"n": 1}, forbidden, folder=tmp_path), WORKLOAD)


@pytest.mark.slow
def test_a_real_trace_comes_back_whole(tmp_path: Path) -> None:
    from tests.small_pipelines import small_call, stable_diffusion_xl

    from pipefit.planner.trace import trace
    from pipefit.strategies import traits_of

    pipe = stable_diffusion_xl()
    workload = trace(pipe, small_call("stable_diffusion_xl"), traits=traits_of)
    cached_trace({}, lambda: workload, folder=tmp_path)
    read = cached_trace({}, forbidden, folder=tmp_path)
    assert same(read, workload)
    assert sum(len(routine.events) for routine in read.routines) > 100


# -- what an entry belongs to


def test_any_difference_in_the_key_is_another_entry(tmp_path: Path) -> None:
    make = Counted()
    keys = [{"call": {}}, {"call": {"height": 512}}, {"call": {"height": "512"}}, {}]
    for key in keys:
        cached_trace(key, make, folder=tmp_path)
    assert make.num_calls == len(keys) == len(entry_paths(tmp_path))


def test_the_order_of_a_key_does_not_matter(tmp_path: Path) -> None:
    cached_trace({"a": 1, "b": 2}, Counted(), folder=tmp_path)
    cached_trace({"b": 2, "a": 1}, forbidden, folder=tmp_path)


@pytest.mark.parametrize("name", ["torch", "diffusers", "transformers", "accelerate"])
def test_another_library_version_is_another_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    make = Counted()
    cached_trace({}, make, folder=tmp_path / "traces")
    installed = tmp_path / f"{name}-99.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    trace_cache.library_versions.cache_clear()
    try:
        cached_trace({}, make, folder=tmp_path / "traces")
    finally:
        trace_cache.library_versions.cache_clear()
    assert make.num_calls == 2


def test_our_own_code_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = trace_cache.code_version()
    monkeypatch.setitem(trace_cache.SOURCES, "pipefit.planner", ("trace.py",))
    trace_cache.code_version.cache_clear()
    try:
        assert trace_cache.code_version() != before
    finally:
        trace_cache.code_version.cache_clear()


DO_NOT_DECIDE = {
    "catalog",  # its entries are in the callers' keys
    "policy",  # what it asks for is in the callers' keys
    "checkpoints",  # works on finished traces
    "apply",  # checks a live pipeline, whose state is in the callers' keys
    "prompt",  # says whether text encoders can be dropped, under the whole code's version
    "snapshot",  # takes back what was applied
    "search",  # works on finished traces
    "trace_cache",
}
"""Modules of the planner that a trace's code imports, but that do not decide what is in it."""


def imported_by(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_module_that_tracing_imports_is_part_of_the_code_version() -> None:
    (planner,) = importlib.util.find_spec("pipefit.planner").submodule_search_locations
    hashed = {path.resolve() for path in trace_cache.source_files()}
    imported = {
        name.split(".")[2]
        for path in hashed
        for name in imported_by(path)
        if name.startswith("pipefit.planner.")
    }
    unhashed = {name for name in imported if Path(planner, f"{name}.py").resolve() not in hashed}
    assert unhashed <= DO_NOT_DECIDE
    assert {"trace", "build", "call"} <= imported - unhashed


# -- damage


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60
)
@given(data=st.data())
def test_a_damaged_entry_is_remade_and_rewritten(tmp_path: Path, data: st.DataObject) -> None:
    cached_trace({}, lambda: WORKLOAD, folder=tmp_path)
    (path,) = entry_paths(tmp_path)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    if data.draw(st.booleans(), label="truncate"):
        del damaged[data.draw(st.integers(0, len(whole) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            damaged[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    damaged += data.draw(st.binary(max_size=4))
    path.write_bytes(damaged)
    make = Counted()
    assert same(cached_trace({}, make, folder=tmp_path), WORKLOAD)
    assert make.num_calls == (damaged != whole)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"null", b"{", b"\xff", b'{"identity": 1, "workload": {}}'],
)
def test_an_entry_with_a_right_checksum_but_foreign_content_is_remade(
    tmp_path: Path, content: bytes
) -> None:
    cached_trace({}, lambda: WORKLOAD, folder=tmp_path)
    (path,) = entry_paths(tmp_path)
    for body in (content, zlib.compress(content)):
        checksum = hashlib.sha256(body).hexdigest().encode()
        path.write_bytes(b"pipefit.trace/1 " + checksum + b"\n" + body)
        make = Counted()
        assert same(cached_trace({}, make, folder=tmp_path), WORKLOAD)
        assert make.num_calls == 1


def test_an_entry_under_the_name_of_another_is_remade(tmp_path: Path) -> None:
    cached_trace({"n": 1}, lambda: WORKLOAD, folder=tmp_path)
    (first,) = entry_paths(tmp_path)
    other = replace(WORKLOAD, pipeline="other")
    cached_trace({"n": 2}, lambda: other, folder=tmp_path)
    (second,) = set(entry_paths(tmp_path)) - {first}
    second.write_bytes(first.read_bytes())
    assert same(cached_trace({"n": 2}, lambda: other, folder=tmp_path), other)


def test_a_failed_trace_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> Workload:
        raise LookupError("the call failed")

    with pytest.raises(LookupError):
        cached_trace({}, fail, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("trait", [("a", "b"), {1: 2}, {"a"}, float("nan")])
def test_a_trace_that_json_would_change_is_not_remembered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, trait: Any
) -> None:
    component = replace(WORKLOAD.components[0], traits={"odd": trait})
    workload = replace(WORKLOAD, components=(component,))
    assert cached_trace({}, lambda: workload, folder=tmp_path) is workload
    assert entry_paths(tmp_path) == []
    assert "not remembered" in caplog.text


# -- folders


def test_a_folder_that_cannot_be_written_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("not a folder")
    make = Counted()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert same(cached_trace({}, make, folder=occupied / "traces"), WORKLOAD)
    assert make.num_calls == 3
    assert len(caplog.records) == 1
    assert str(occupied) in caplog.text


def test_a_folder_in_the_place_of_an_entry_does_not_matter(tmp_path: Path) -> None:
    cached_trace({}, Counted(), folder=tmp_path)
    (path,) = entry_paths(tmp_path)
    path.unlink()
    path.mkdir()
    assert same(cached_trace({}, Counted(), folder=tmp_path), WORKLOAD)
    assert list(tmp_path.iterdir()) == [path]


def test_the_least_recently_used_entries_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "traces"

    def add(number: int) -> None:
        cached_trace({"n": number}, Counted(), folder=folder)

    for number in range(3):
        add(number)
    entry_bytes = cache_info(tmp_path).entries_bytes // 3
    for age_s, path in enumerate(entry_paths(folder), start=1000):
        os.utime(path, (age_s, age_s))
    add(0)  # used again, and so the last to go
    monkeypatch.setattr(trace_cache, "LIMIT_BYTES", 2 * entry_bytes + entry_bytes // 2)
    add(3)
    assert cache_info(tmp_path).num_entries == 2
    for number in (0, 3):
        cached_trace({"n": number}, forbidden, folder=folder)


def test_the_cache_says_what_it_holds_and_forgets_it(tmp_path: Path) -> None:
    cache = tmp_path / "none yet"
    assert cache_info(cache).num_entries == 0
    folder = cache / "traces"
    cached_trace({}, Counted(), folder=folder)
    (folder / "from a killed process.unfinished").write_bytes(b"12345")
    (folder / "somebody's notes.txt").write_text("stay")
    held = cache_info(cache)
    assert held.entries_bytes == entry_paths(folder)[0].stat().st_size + 5
    assert clear_cache(cache).entries_bytes == 0
    assert [path.name for path in folder.iterdir()] == ["somebody's notes.txt"]


def test_weights_in_shards_are_counted_and_removed(tmp_path: Path) -> None:
    """Those that a killed process left as well, and nothing that somebody else put there."""
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({"a": torch.ones(8), "b": torch.ones(8)}, folder / "pytorch_model.bin")
    shards = rewrite(folder, 40, tmp_path / "checkpoints")
    killed = Path(tempfile.mkdtemp(suffix=UNFINISHED_SUFFIX, dir=shards.parent))
    (killed / "0").write_bytes(b"12345")
    (shards.parent / "somebody's weights").mkdir()
    (shards.parent / "somebody's notes.shards").write_text("stay")
    held = cache_info(tmp_path)
    assert held.num_checkpoints == 2
    assert held.checkpoints_bytes == sum(file.stat().st_size for file in shards.iterdir()) + 5
    left = clear_cache(tmp_path)
    assert (left.num_checkpoints, left.checkpoints_bytes) == (0, 0)
    assert {path.name for path in shards.parent.iterdir()} == {
        "somebody's weights",
        "somebody's notes.shards",
    }
    assert trace_cache.CHECKPOINT_SUFFIXES == (SHARDS_SUFFIX, UNFINISHED_SUFFIX)


def test_the_environment_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPEFIT_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    cached_trace({}, Counted())
    assert cache_info().folder == tmp_path
    assert cache_info().num_entries == 1


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="XDG is for the other platforms")
def test_the_default_folder_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIPEFIT_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    for value, folder in {
        str(tmp_path): tmp_path / "pipefit",
        "relative": Path("/home/somebody/.cache/pipefit"),
        "": Path("/home/somebody/.cache/pipefit"),
    }.items():
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == folder


# -- processes

WRITER = """
import sys
from pathlib import Path
from pipefit.cost_models.workload import Workload
from pipefit.planner.trace_cache import cached_trace, clear_cache
folder = Path(sys.argv[1])
def make(number):
    return Workload(pipeline=str(number) * 20000, pipeline_class="", call={}, components=(),
                    kernels=(), routines=(), root=(), phases=())
for i in range(60):
    number = i % 3
    workload = cached_trace({"n": number}, lambda: make(number), folder=folder / "traces")
    assert workload == make(number)
    if i % 10 == 9:
        clear_cache(folder)
assert "torch" not in sys.modules and "pipefit.strategies" not in sys.modules
"""


def test_processes_share_a_folder_and_none_imports_torch(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
