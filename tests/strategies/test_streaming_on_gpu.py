"""Streaming on a real GPU: copies that run beside kernels, and a host that waits for neither."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.strategies.described import described

from pipefit.cost_models.streaming import streamed_bytes
from pipefit.strategies import page_locked, strategy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

STREAMING = strategy("streaming")

WIDTH = 2048
NUM_BLOCKS = 12
NUM_TOKENS = 4096
"""A block is 8 * WIDTH² weights of 2 bytes: 64 MiB, 3 ms on a PCIe 4.0 x16 link, and it computes
for a fraction of that to several times as long, depending on the GPU."""


class Block(torch.nn.Module):
    """What a transformer block is to streaming: a norm and four products."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.up = torch.nn.Linear(WIDTH, 4 * WIDTH)
        self.down = torch.nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Stack(torch.nn.Module):
    """Blocks between two small layers, as in a denoiser."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(64, WIDTH)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(NUM_BLOCKS))
        self.last = torch.nn.Linear(WIDTH, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


@pytest.fixture(scope="module")
def pipe() -> Any:
    torch.manual_seed(0)
    net = Stack().to(torch.bfloat16).requires_grad_(False).eval()
    other = torch.nn.Linear(8, 8).requires_grad_(False).cuda()
    return SimpleNamespace(components={"net": net, "other": other}, net=net, other=other)


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(1)
    return torch.randn(NUM_TOKENS, 64, generator=generator, device="cuda", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def expected(pipe: Any, rows: torch.Tensor) -> list[torch.Tensor]:
    """What the resident component returns, each output being the next input."""
    pipe.net.cuda()
    found = three_steps(pipe.net, rows)
    pipe.net.cpu()
    torch.cuda.empty_cache()
    return found


def three_steps(net: Any, x: torch.Tensor) -> list[torch.Tensor]:
    found = []
    for _ in range(3):
        x = net(x)
        found.append(x)
    return found


@contextmanager
def streamed(pipe: Any, **parameters: Any) -> Iterator[None]:
    assert STREAMING.refusal(described(pipe.net, "net"), parameters) is None
    undo = STREAMING.apply(pipe, "net", parameters, "cuda")
    try:
        yield
    finally:
        undo()


def litter() -> None:
    """Take all the memory that the allocator has free, fill it with NaN, and give it back."""
    free_bytes = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    taken = [
        torch.full((1 << 24,), 0xFF, dtype=torch.uint8, device="cuda")
        for _ in range(free_bytes >> 24)
    ]
    del taken


parameters_of = st.fixed_dictionaries(
    {
        "resident_blocks": st.integers(0, NUM_BLOCKS - 1),
        "num_slots": st.integers(1, 4),
        "look_ahead": st.integers(0, 5),
        "when_idle": st.sampled_from(("stay", "leave")),
        "host_memory": st.sampled_from(("pinned", "pinned", "pageable")),
        "max_block_bytes": st.sampled_from((40 << 20, 128 << 20)),
    }
)


@settings(max_examples=25, deadline=None)
@given(parameters=parameters_of)
def test_streamed_outputs_are_the_resident_ones_to_the_bit(
    pipe: Any, rows: torch.Tensor, expected: list[torch.Tensor], parameters: dict[str, Any]
) -> None:
    with torch.no_grad(), streamed(pipe, **parameters):
        found = []
        for _ in range(3):
            found.append(three_steps(pipe.net, rows))
            pipe.other(torch.zeros(1, 8, device="cuda"))  # what leaves when idle leaves now
            litter()
    for outputs in found:
        for output, one in zip(outputs, expected, strict=True):
            assert torch.equal(output, one)


def test_an_interrupted_forward_is_followed_by_right_ones(
    pipe: Any, rows: torch.Tensor, expected: list[torch.Tensor]
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad(), streamed(pipe, num_slots=1, max_block_bytes=128 << 20):
        for number in (0, 5, NUM_BLOCKS - 1):
            handle = pipe.net.blocks[number].down.register_forward_pre_hook(stop)
            with pytest.raises(KeyboardInterrupt):
                pipe.net(rows)
            handle.remove()
            assert torch.equal(pipe.net(rows), expected[0])


@pytest.mark.parametrize("num_slots", [1, 2, 3])
@pytest.mark.parametrize("when_idle", ["stay", "leave"])
def test_the_host_waits_for_nothing_once_it_runs(
    pipe: Any, rows: torch.Tensor, expected: list[torch.Tensor], num_slots: int, when_idle: str
) -> None:
    how = {"num_slots": num_slots, "when_idle": when_idle, "max_block_bytes": 128 << 20}
    with torch.no_grad(), streamed(pipe, **how):
        pipe.net(rows)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            outputs = three_steps(pipe.net, rows)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))


def test_the_gpu_holds_what_is_predicted(
    pipe: Any, rows: torch.Tensor, expected: list[torch.Tensor]
) -> None:
    assert expected  # cuBLAS has its workspace, which the allocator counts
    for when_idle in ("stay", "leave"):
        how = {"resident_blocks": 4, "when_idle": when_idle, "max_block_bytes": 128 << 20}
        found = streamed_bytes(described(pipe.net, "net"), STREAMING.placement(how))
        before_bytes = torch.cuda.memory_allocated()
        with torch.no_grad(), streamed(pipe, **how):
            pipe.net(rows)
            assert torch.cuda.memory_allocated() - before_bytes == pytest.approx(
                found.loaded_bytes, rel=0.001
            )
            pipe.other(torch.zeros(1, 8, device="cuda"))
            idle_bytes = torch.cuda.memory_allocated() - before_bytes
            assert idle_bytes == pytest.approx(found.idle_bytes, rel=0.001, abs=1 << 16)


def test_streamed_weights_are_page_locked_while_they_wait_and_not_afterwards(pipe: Any) -> None:
    with streamed(pipe, max_block_bytes=128 << 20):
        assert all(one.is_pinned() for one in pipe.net.blocks.parameters() if one.is_cpu)
        assert any(one.is_cpu for one in pipe.net.blocks.parameters())
    assert not any(one.is_pinned() for one in pipe.net.parameters())
    assert all(one.is_cpu for one in pipe.net.parameters())


def test_a_refused_page_lock_is_not_reported_by_the_next_kernel() -> None:
    buffer = torch.zeros(1 << 20, dtype=torch.uint8)
    unlock = page_locked.page_lock(buffer, "cuda")
    assert unlock is not None
    assert page_locked.page_lock(buffer, "cuda") is None  # it is locked already
    assert torch.ones(1, device="cuda").add(1).item() == 2
    unlock()
    assert not buffer.is_pinned()
