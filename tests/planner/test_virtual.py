"""The virtual GPU against real CPU tensors: layouts, values, devices, and what it leaves behind."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from pipefit.planner.virtual import Observer, VirtualMachine, VirtualTensor, buffer_of, known_value

GPU = torch.device("cuda", 0)


class Counter(Observer):
    """Counts bytes and launches."""

    def __init__(self) -> None:
        self.live = self.peak = self.launches = 0
        self.reads: list[bool] = []

    def allocated(self, buffer: Any) -> None:
        self.live += buffer.num_bytes
        self.peak = max(self.peak, self.live)

    def freed(self, buffer: Any) -> None:
        self.live -= buffer.num_bytes

    def launched(self, *_: Any) -> None:
        self.launches += 1

    def value_read(self, known: bool, func: Any) -> None:
        self.reads.append(known)


@pytest.fixture
def machine() -> Iterator[VirtualMachine]:
    with VirtualMachine(Counter()) as opened, torch.no_grad():
        yield opened


def odd_batch_stride(x: torch.Tensor) -> torch.Tensor:
    """(1, C, H, W) from (1, HW, C): a channels_last view whose batch stride is C, not HWC."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h * w).transpose(1, 2).contiguous().transpose(1, 2).reshape(b, c, h, w)


LAYOUTS: dict[str, Callable[[], torch.Tensor]] = {
    "contiguous": lambda: torch.ones(2, 4, 6, 8),
    "channels_last": lambda: torch.ones(2, 4, 6, 8).to(memory_format=torch.channels_last),
    "channels_last_one": lambda: torch.ones(1, 4, 6, 8).to(memory_format=torch.channels_last),
    "odd_one": lambda: odd_batch_stride(torch.ones(1, 4, 6, 8)),
    "slice": lambda: torch.ones(2, 8, 6, 8)[:, ::2],
    "rows": lambda: torch.ones(2, 4, 12, 8)[:, :, 3:9],
    "permuted": lambda: torch.ones(6, 2, 8, 4).permute(1, 3, 0, 2),
    "expanded": lambda: torch.ones(2, 1, 6, 8).expand(2, 4, 6, 8),
}

OPERATORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "neg": torch.neg,
    "exp": torch.exp,
    "add number": lambda x: x + 1.0,
    "number minus": lambda x: 1.0 - x,
    "times number": lambda x: x * 2,
    "over number": lambda x: x / 3.0,
    "compare": lambda x: x > 0,
    "square": lambda x: x**2,
    "clamp": lambda x: x.clamp(-1, 1),
    "add itself": lambda x: x + x,
    "times mean": lambda x: x * x.mean(),
    "to half": lambda x: x.to(torch.float16),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "zeros_like": torch.zeros_like,
    "softmax": lambda x: x.softmax(-1),
    "view after": lambda x: (x * 2).flatten(2).transpose(1, 2),
}


def on_gpu(machine: VirtualMachine, real: torch.Tensor) -> VirtualTensor:
    """Return a virtual tensor of the geometry and values of *real*, holes included."""
    store = real.untyped_storage()
    base = machine.empty((store.nbytes(),), (1,), torch.uint8, GPU)
    return base.view(real.dtype).as_strided(real.size(), real.stride(), real.storage_offset())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_result_has_the_strides_of_a_real_one(layout: str, operator: str) -> None:
    real = LAYOUTS[layout]()
    wanted = OPERATORS[operator](real)
    with VirtualMachine(Counter()) as machine, torch.no_grad():
        got = OPERATORS[operator](on_gpu(machine, real))
    assert (got.size(), got.stride(), got.dtype) == (wanted.size(), wanted.stride(), wanted.dtype)


PAIRS = [
    (a, b)
    for a, b in itertools.product(LAYOUTS, LAYOUTS)
    if LAYOUTS[a]().shape == LAYOUTS[b]().shape
]


@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_a_sum_of_two_layouts_has_the_strides_of_a_real_one(left: str, right: str) -> None:
    one, other = LAYOUTS[left](), LAYOUTS[right]()
    with VirtualMachine(Counter()) as machine, torch.no_grad():
        got = on_gpu(machine, one) + on_gpu(machine, other)
    assert got.stride() == (one + other).stride()


def test_bytes_are_counted_from_the_first_to_the_last_alias() -> None:
    counter = Counter()
    with VirtualMachine(counter), torch.no_grad():
        x = torch.empty(1024, device="cuda")
        assert counter.live == 4096
        row = x.view(32, 32)[3]
        del x
        assert counter.live == 4096
        del row
        assert counter.live == 0


def test_moving_data_moves_the_device(machine: VirtualMachine) -> None:
    linear = torch.nn.Linear(4, 4)
    linear.weight = machine.parameter(linear.weight, torch.device("cpu"))
    linear.weight.data = linear.weight.to("cuda")
    assert linear.weight.device == GPU
    assert isinstance(linear.weight, torch.nn.Parameter)


def test_two_devices_raise_torchs_own_message(machine: VirtualMachine) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        torch.ones(3, 3, device="cuda") @ torch.ones(3, 3)
    zero_dim = torch.tensor(2.0)
    assert (torch.ones(3, device="cuda") * zero_dim).device == GPU


def test_what_cpp_makes_lies_where_it_is_filled_from(machine: VirtualMachine) -> None:
    rows = [torch.ones(3, 4, device="cuda"), torch.ones(5, 4, device="cuda")]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    assert padded.shape == (2, 5, 4)
    assert padded.device == GPU
    counter = machine.observer
    assert isinstance(counter, Counter)
    assert counter.live == 4 * (12 + 20 + 40)
    assert torch.nn.utils.rnn.pad_sequence([row.cpu() for row in rows]).device.type == "cpu"


# -- values


def test_small_values_are_computed(machine: VirtualMachine) -> None:
    ids = torch.tensor([3, 1, 2], device="cuda")
    assert (ids * 2).tolist() == [6, 2, 4]
    assert ids.max().item() == 3
    assert ids[ids > 1].shape == (2,)
    ids[0] = 7
    assert ids.tolist() == [7, 1, 2]


def test_large_uniform_values_are_kept_through_operators(machine: VirtualMachine) -> None:
    zeros = torch.zeros(1, 729, 1152, device="cuda", dtype=torch.bfloat16)
    assert torch.all(zeros == 0).item()
    assert torch.all(zeros.view(729, 1152).t()[5:] == 0).item()
    assert torch.all(zeros.float() + 1.0 == 1).item()
    assert torch.all(torch.cat([zeros, zeros.clone()]) == 0).item()
    assert not torch.any(torch.full_like(zeros, 2.0) * zeros).item()
    assert (zeros + 3).amax().item() == 3
    assert zeros.cpu().float().numpy().max() == 0
    assert all(machine.observer.reads)  # type: ignore[attr-defined]


def test_a_write_into_a_part_ends_what_is_known_of_a_large_tensor(machine: VirtualMachine) -> None:
    mask = torch.zeros(300, 300, device="cuda")
    mask[3, :50] = 1
    assert known_value(mask) is None
    mask.fill_(4.0)
    assert mask.amin().item() == 4.0
    mask.copy_(torch.zeros(300, 300, device="cuda"))
    assert mask.amin().item() == 0.0
    mask.mul_(torch.empty(300, 300, device="cuda"))
    assert known_value(mask) is None


def test_uninitialised_and_random_values_are_unknown(machine: VirtualMachine) -> None:
    assert known_value(torch.empty(3, device="cuda")) is None
    assert known_value(torch.randn(3, device="cuda")) is None
    assert known_value(torch.zeros(3, device="cuda").normal_()) is None


def test_what_is_unknown_reads_as_zero_and_is_told(machine: VirtualMachine) -> None:
    x = torch.randn(3, device="cuda")
    assert x.sum().item() == 0
    assert machine.observer.reads == [False]  # type: ignore[attr-defined]


def test_a_large_video_becomes_an_array_without_memory(machine: VirtualMachine) -> None:
    video = torch.empty(1, 100_000, 1000, 3, device="cuda")
    frames = np.stack([video[0].cpu().numpy(), video[0].cpu().numpy()])
    assert frames.shape == (2, 100_000, 1000, 3)
    assert not any(((frames * 255).round().astype("uint8")).strides)


# -- what is left behind


def test_replaced_functions_come_back_by_identity() -> None:
    functional = torch.nn.functional
    owners = (torch, torch.cuda, functional)
    before = [dict(vars(owner)) for owner in owners]
    with VirtualMachine(Counter()):
        assert torch.cuda.is_available()
        assert torch.cuda.get_device_properties(0).total_memory
    for owner, names in zip(owners, before, strict=True):
        assert [n for n in names if vars(owner)[n] is not names[n]] == []


def test_another_thread_sees_the_real_machine(machine: VirtualMachine) -> None:
    seen: dict[str, Any] = {}

    def work() -> None:
        seen["available"] = torch.cuda.is_available()
        query = torch.ones(1, 2, 4, 8)
        seen["attention"] = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        seen["sum"] = torch.ones(3).sum().item()

    thread = threading.Thread(target=work)
    real = machine_free_answer()
    thread.start()
    thread.join()
    assert seen["available"] == real
    assert seen["attention"].device.type == "cpu"
    assert not isinstance(seen["attention"], VirtualTensor)
    assert seen["sum"] == 3


def machine_free_answer() -> bool:
    """Whether torch was built for CUDA and finds a device, asked past the replacements."""
    return (
        torch._C._cuda_getDeviceCount() > 0 if hasattr(torch._C, "_cuda_getDeviceCount") else False
    )


def test_a_view_shares_its_buffer(machine: VirtualMachine) -> None:
    x = torch.empty(4, 4, device="cuda")
    assert buffer_of(x.t()) is buffer_of(x)


def test_a_device_without_an_index_is_the_current_one() -> None:
    real = torch.ones(3)
    with VirtualMachine(Observer()), torch.no_grad():
        assert real.to(torch.device("cuda")).device == torch.device("cuda", 0)
        assert real.to(device="cuda", dtype=torch.float16).device == torch.device("cuda", 0)
        assert real.cuda().device == torch.device("cuda", 0)
    assert real.to(torch.float16).device.type == "cpu"
