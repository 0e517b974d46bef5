"""What a graph makes of operators: pure, on made-up calls small enough to check by hand."""

from __future__ import annotations

from typing import Any

from pipefit.cost_models.fusion import Operator, graph_steps
from pipefit.cost_models.workload import Kernel, KernelKind

WEIGHT = -1
INPUT = -2


def operator(
    kind: KernelKind, reads: dict[int, int], writes: dict[int, int], **facts: Any
) -> Operator:
    kernel = Kernel(
        kind=kind,
        name=kind,
        dtype="float16",
        read_bytes=sum(reads.values()),
        write_bytes=sum(writes.values()),
        **facts,
    )
    return Operator(kernel=kernel, reads=tuple(reads.items()), writes=tuple(writes.items()))


def launched(steps: list[Any]) -> list[Kernel]:
    return [step[1] for step in steps if step[0] == "k"]


CALL = [
    ("a", 0, 100),
    operator("gemm", {INPUT: 100, WEIGHT: 50}, {0: 100}),
    ("a", 1, 100),
    operator("norm", {0: 100}, {1: 100}),
    ("a", 2, 100),
    operator("elementwise", {1: 100, INPUT: 100}, {2: 100}),
    ("f", 1),
    ("f", 0),
    ("a", 3, 100),
    operator("gemm", {2: 100, WEIGHT: 50}, {3: 100}),
    ("f", 2),
]


def test_what_lies_between_two_products_is_one_kernel_that_reads_its_inputs_once() -> None:
    kernels = launched(graph_steps(CALL, {3}, "compiled"))
    assert [k.kind for k in kernels] == ["gemm", "elementwise", "gemm"]
    assert (kernels[1].read_bytes, kernels[1].write_bytes) == (200, 100)
    assert {k.launcher for k in kernels} == {"compiled"}


def test_memory_stays_that_of_the_eager_call() -> None:
    steps = graph_steps(CALL, {3}, "compiled")
    assert [step for step in steps if step[0] != "k"] == [e for e in CALL if isinstance(e, tuple)]


def test_each_different_product_is_tried_before_the_graph_runs() -> None:
    wider = operator("gemm", {3: 100, WEIGHT: 70}, {4: 100})
    recorded = [*CALL, ("a", 4, 100), wider]
    kernels = launched(graph_steps(recorded, {4}, "captured", is_tried=True))
    tried = [k for k in kernels if k.launcher == "tried"]
    assert kernels[: len(tried)] == tried
    assert [k.read_bytes for k in tried] == [150, 170]
    untried = launched(graph_steps(recorded, {4}, "captured"))
    assert kernels[len(tried) :] == untried
    assert {k.launcher for k in untried} == {"captured"}


def test_a_buffer_that_is_read_again_later_is_written() -> None:
    late = operator("gemm", {1: 100, WEIGHT: 50}, {4: 100})
    steps = graph_steps([*CALL[:6], CALL[8], CALL[9], ("a", 4, 100), late], {3, 4}, "compiled")
    assert launched(steps)[1].write_bytes == 200


def test_a_script_fuses_pointwise_operators_and_leaves_normalisations() -> None:
    chain = [
        CALL[0], CALL[1], CALL[2], CALL[3], CALL[4], CALL[5], ("a", 3, 100),
        operator("elementwise", {2: 100}, {3: 100}),
    ]  # fmt: skip
    kernels = launched(graph_steps(chain, {3}, "traced"))
    assert [(k.kind, k.name) for k in kernels] == [
        ("gemm", "gemm"),
        ("norm", "norm"),
        ("elementwise", "fused"),
    ]


def test_a_wait_of_the_host_divides_a_graph() -> None:
    wait = ("k", 7)
    recorded = [CALL[2], CALL[3], wait, CALL[4], CALL[5]]
    steps = graph_steps(recorded, {1, 2}, "compiled")
    kernels = [step[1] for step in steps if step[0] == "k"]
    assert [getattr(kernel, "kind", kernel) for kernel in kernels] == ["norm", 7, "elementwise"]


def test_what_nobody_reads_is_not_launched() -> None:
    steps = graph_steps([*CALL[2:6], ("f", 1), ("f", 2)], set(), "compiled")
    assert launched(steps) == []


def test_of_a_table_only_the_rows_that_are_written_are_read() -> None:
    rows = operator("index", {WEIGHT: 10_000}, {0: 100})
    double = operator("elementwise", {0: 100}, {1: 100})
    recorded = [("a", 0, 100), rows, ("a", 1, 100), double, ("f", 0)]
    (kernel,) = launched(graph_steps(recorded, {1}, "compiled"))
    assert (kernel.read_bytes, kernel.write_bytes) == (100, 100)
