"""What a graph makes of operators: pure, on made-up calls small enough to check by hand."""

from __future__ import annotations

from typing import Any

from pipefit.cost_models.fusion import Operator, graph_steps
from pipefit.cost_models.workload import SYNCHRONISE, Kernel, KernelKind

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


def test_buffers_between_fused_operators_are_never_allocated_and_results_take_a_place() -> None:
    steps = graph_steps(CALL, {3}, "compiled")
    memory = [step[:2] for step in steps if step[0] in "af"]
    # 1 lies within the fused kernel; 2 takes the place of 0, which nobody reads after it.
    assert memory == [("a", 0), ("f", 0), ("a", 2), ("a", 3), ("f", 2)]


def test_a_buffer_that_is_read_again_later_is_written() -> None:
    late = operator("gemm", {1: 100, WEIGHT: 50}, {4: 100})
    steps = graph_steps([*CALL[:6], CALL[8], CALL[9], ("a", 4, 100), late], {3, 4}, "compiled")
    assert launched(steps)[1].write_bytes == 200
    assert ("a", 1, 100) in steps


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
    assert [step[1] for step in steps if step[0] == "k"][1] == 7
    assert SYNCHRONISE not in launched(steps)


def test_a_weight_in_nchw_is_turned_at_every_call_and_freed_after_it() -> None:
    shape = (1, 4, 4, 1, 0, 8, 8, 8, 8, 3, 3)
    conv = operator("conv", {INPUT: 64, WEIGHT: 36}, {0: 64}, shape=shape, weight_bytes=36)
    steps = graph_steps([("a", 0, 64), conv], {0}, "compiled")
    assert [step[0] for step in steps] == ["a", "a", "k", "k", "f"]
    turned, kernel = launched(steps)
    assert (turned.kind, turned.read_bytes) == ("copy", 36)
    assert kernel.channels_last and kernel.weight_channels_last
    as_it_is = operator(
        "conv", {INPUT: 64, WEIGHT: 36}, {0: 64}, shape=shape, weight_channels_last=True
    )
    assert len(launched(graph_steps([("a", 0, 64), as_it_is], {0}, "compiled"))) == 1


def test_the_callers_buffers_are_let_go_at_the_end() -> None:
    steps = graph_steps([*CALL[:2], ("x", 0), *CALL[2:]], {3}, "compiled")
    assert steps[-1] == ("x", 0)
