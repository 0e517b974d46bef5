"""Streaming: what it refuses, what may be inside blocks, and that every wait in it is needed."""

from __future__ import annotations

import copy
import functools
import gc
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.end_to_end.small_runs import untouched
from tests.small_pipelines import SMALL_PIPELINES, picture, small_call
from tests.strategies.described import described
from tests.strategies.late_copies import WrongOrder, late_copies, poisoned_slots

from pipefit.cost_models.blocks import aligned, blocks_of
from pipefit.errors import ApplyFailed, InvalidRequest, UnsupportedPipeline
from pipefit.planner import virtual_cuda
from pipefit.planner.apply import apply_options
from pipefit.planner.catalog import find_gpu
from pipefit.planner.rehearse import rehearse
from pipefit.planner.snapshot import differences, snapshot
from pipefit.strategies import page_locked, strategy, streamer
from pipefit.strategies.live import module_components
from pipefit.strategies.strategy import Option, Undo

STREAMING = strategy("streaming")
LAYERS = {"max_block_bytes": 1 << 10}
"""Each layer of a small component is a block, if it is no larger than that."""
CPU = torch.device("cpu")


def on(component: str, **parameters: Any) -> Option:
    return Option(strategy="streaming", component=component, parameters=parameters)


def apply_to(module: Any, **parameters: Any) -> Undo:
    """Stream *module* alone."""
    one = described(module)
    assert STREAMING.refusal(one, parameters) is None
    pipe = SimpleNamespace(components={"part": module})
    return STREAMING.apply(pipe, "part", parameters, "cpu")


def fresh(name: str) -> Any:
    torch.set_num_threads(1)
    pipe = SMALL_PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -- order

BESIDE = [
    on("text_encoder", **LAYERS, when_idle="leave", num_slots=1),
    on("text_encoder_2", max_block_bytes=8 << 10, when_idle="leave", load_with="text_encoder"),
    on(
        "transformer",
        max_block_bytes=16 << 10,
        when_idle="leave",
        load_with="text_encoder_2",
        resident_blocks=2,
        num_slots=2,
        uncalled_modules=["single_transformer_blocks.0"],
    ),
    on("vae", max_block_bytes=64 << 10, num_slots=3, look_ahead=1),
]
"""Every kind of memory: slots, blocks that stay, the rest, and a slot for what was not foreseen."""


def test_every_copy_and_every_kernel_waits_for_what_it_needs() -> None:
    pipe = fresh("flux")
    expected = picture(pipe, "flux")
    with late_copies() as timeline, apply_options(pipe, BESIDE, "cpu"):
        for _ in range(2):
            assert torch.equal(picture(pipe, "flux"), expected)
    assert timeline.num_copies > 0


@pytest.mark.parametrize(
    ("method", "caller"),
    [
        ("wait", "_fill"),
        ("wait", "load"),
        ("let_compute_wait", "_begin"),
        ("let_compute_wait", "begin_call"),
        ("let_compute_wait", "_let_go"),
        ("record_compute", "_end"),
        ("record_compute", "_fill_now"),
        ("record_compute", "load"),
        ("record", "_fill"),
        ("record", "load"),
        ("record", "_let_go"),
    ],
)
def test_without_any_one_of_its_waits_the_order_is_wrong(method: str, caller: str) -> None:
    pipe = fresh("flux")

    def call_twice() -> None:
        with late_copies((method, caller)), apply_options(pipe, BESIDE, "cpu"):
            for _ in range(2):
                picture(pipe, "flux")

    with pytest.raises((WrongOrder, ApplyFailed)) as failure:
        call_twice()
    assert isinstance(failure.value.__cause__ or failure.value, WrongOrder)


# -- what may be inside


class Tied(torch.nn.Module):
    """Two blocks that share a weight with each other, and one that has one twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)) for _ in range(4)
        )
        self.blocks[3][0].weight = self.blocks[0][0].weight
        self.blocks[1][1].weight = self.blocks[1][0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            for layer in block:
                x = layer(x)
        return x


class Block(torch.nn.Module):
    """A block whose Sequential is called, other than a list is."""

    def __init__(self, **changed: Any) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(16, 16)
        self.norm = torch.nn.BatchNorm1d(16, **changed)
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(16), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        self.mean = 0.5 * self.mean + x.mean(0)  # a new tensor each time
        return self.norm(self.layer(x)) + self.mean


class Stack(torch.nn.Module):
    """Blocks one after the other."""

    def __init__(self, build: Any = Block, count: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(build() for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


INPUT = torch.randn(3, 16, generator=torch.Generator().manual_seed(3))

WAYS = [
    {"num_slots": 1, "look_ahead": 0},
    {"resident_blocks": 1},
    {"when_idle": "leave", "resident_blocks": 2},
    {"when_idle": "leave", "num_slots": 3, "look_ahead": 1},
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("max_block_bytes", [2 << 10, 4 << 10])
def test_weights_tied_within_a_block_and_across_blocks_stay_tied(
    way: Mapping[str, Any], max_block_bytes: int
) -> None:
    module = Tied().requires_grad_(False)
    expected, before = module(INPUT), copy.deepcopy(module)
    with late_copies():
        undo = apply_to(module, max_block_bytes=max_block_bytes, **way)
        for _ in range(3):
            assert torch.equal(module(INPUT), expected)
        undo()
    assert module.blocks[3][0].weight is module.blocks[0][0].weight
    assert module.blocks[1][1].weight is module.blocks[1][0].weight
    assert described(module) == described(before)
    assert torch.equal(module(INPUT), expected)


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (transformers.T5EncoderModel, transformers.T5Config),
        (transformers.UMT5EncoderModel, transformers.UMT5Config),
    ],
)
def test_an_encoder_keeps_its_embedding_tied(cls: Any, config: Any) -> None:
    torch.manual_seed(0)
    module = cls(config(vocab_size=99, d_model=16, d_ff=32, d_kv=4, num_layers=2, num_heads=4))
    module.eval().requires_grad_(False)
    ids = torch.arange(9)[None]
    expected = module(ids)[0]
    with late_copies():
        undo = apply_to(module, max_block_bytes=4 << 10, when_idle="leave", num_slots=1)
        assert torch.equal(module(ids)[0], expected)
        assert module.shared.weight is module.encoder.embed_tokens.weight
        undo()
    assert module.shared.weight is module.encoder.embed_tokens.weight


@pytest.mark.parametrize("way", WAYS)
def test_what_a_forward_writes_into_buffers_stays_there(way: Mapping[str, Any]) -> None:
    module = Stack().requires_grad_(False)
    untouched = copy.deepcopy(module)
    expected = [untouched(INPUT) for _ in range(3)]
    with poisoned_slots():
        undo = apply_to(module, max_block_bytes=2 << 10, **way)
        assert [torch.equal(module(INPUT), one) for one in expected] == [True] * 3
        undo()
    buffers = dict(module.named_buffers())
    assert all(torch.equal(buffers[path], one) for path, one in untouched.named_buffers())
    assert int(module.blocks[0].num_calls) == int(module.blocks[0].norm.num_batches_tracked) == 3


def test_adapters_inside_of_blocks_travel_with_them() -> None:
    peft = pytest.importorskip("peft", reason="LoRA adapters are peft's")
    pipe = fresh("flux")
    plain = picture(pipe, "flux")
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    pipe.transformer.add_adapter(lora)
    expected = picture(pipe, "flux")
    assert not torch.equal(expected, plain)
    before = snapshot(pipe, with_values=True)
    cut = blocks_of(described(pipe.transformer), 1 << 20)
    assert any("lora" in tensor.path for block in cut.blocks for tensor in block.tensors)
    for max_block_bytes in (1 << 10, 16 << 10, 1 << 20):
        options = [on("transformer", max_block_bytes=max_block_bytes, num_slots=1)]
        with late_copies(), apply_options(pipe, options, "cpu"):
            assert torch.equal(picture(pipe, "flux"), expected)
            pipe.transformer.disable_adapters()
            assert torch.equal(picture(pipe, "flux"), plain)
            pipe.transformer.enable_adapters()
            assert torch.equal(picture(pipe, "flux"), expected)
        assert differences(before, snapshot(pipe, with_values=True)) == ()


CAST = {
    "stable_diffusion": ("unet",),
    "flux": ("transformer", "text_encoder_2"),
    "wan": ("transformer",),
}


@pytest.mark.parametrize("name", CAST)
@pytest.mark.parametrize("max_block_bytes", [1 << 10, 16 << 10, 256 << 10])
@pytest.mark.parametrize("when_idle", ["stay", "leave"])
def test_cast_weights_travel_in_8_bits_and_make_the_same_picture(
    name: str, max_block_bytes: int, when_idle: str
) -> None:
    pipe = fresh(name)
    cast = [Option(strategy="layerwise_casting", component=one) for one in CAST[name]]
    with apply_options(pipe, cast, "cpu"):
        expected = picture(pipe, name)
        stored = {one: described(getattr(pipe, one)) for one in CAST[name]}
    how = {"max_block_bytes": max_block_bytes, "when_idle": when_idle}
    before = snapshot(pipe, with_values=True)
    options = [*cast, *(on(one, **how) for one in CAST[name])]
    with late_copies(), apply_options(pipe, options, "cpu"):
        for _ in range(2):
            assert torch.equal(picture(pipe, name), expected)
        for one, component in stored.items():
            tensors = {tensor.path: tensor for tensor in component.tensors}
            for path, parameter in getattr(pipe, one).named_parameters():
                assert str(parameter.dtype) == f"torch.{tensors[path].dtype}"
    assert differences(before, snapshot(pipe, with_values=True)) == ()


def test_a_cast_weight_is_copied_in_a_quarter_of_its_bytes() -> None:
    module = Stack(lambda: torch.nn.Linear(64, 64, bias=False)).requires_grad_(False)
    pipe = SimpleNamespace(part=module, components={"part": module})
    rows = torch.ones(1, 64)
    for options, each_bytes in (((), 64 * 64 * 4), (("layerwise_casting",), 64 * 64)):
        undo = [strategy(one).apply(pipe, "part", {}, "cpu") for one in options]
        with late_copies() as timeline:
            undo.append(apply_to(module, num_slots=1, look_ahead=0, max_block_bytes=16 << 10))
            module(rows)
            assert timeline.copied_bytes == 5 * each_bytes
            for one in reversed(undo):
                one()


def test_a_component_of_two_pipelines_serves_both() -> None:
    import diffusers

    first = fresh("stable_diffusion_xl")
    second = diffusers.StableDiffusionXLImg2ImgPipeline(**first.components)
    second.set_progress_bar_config(disable=True)
    names = {"stable_diffusion_xl": first, "stable_diffusion_xl_img2img": second}
    expected = {name: picture(pipe, name) for name, pipe in names.items()}
    before = snapshot(first, with_values=True)
    options = [
        on("unet", max_block_bytes=64 << 10, when_idle="leave", load_with="text_encoder_2"),
        on("text_encoder", **LAYERS),
        on("vae", max_block_bytes=64 << 10, when_idle="leave", uncalled_modules=["encoder"]),
    ]
    with late_copies(), apply_options(first, options, "cpu"):
        for name in (*names, *names):
            assert torch.equal(picture(names[name], name), expected[name])
    assert differences(before, snapshot(first, with_values=True)) == ()


def test_a_component_of_two_names_does_not_leave_for_itself() -> None:
    module = Stack(lambda: torch.nn.Linear(16, 16)).requires_grad_(False)
    pipe = SimpleNamespace(components={"part": module, "again": module})
    expected = module(INPUT)
    with late_copies() as timeline:
        undo = STREAMING.apply(
            pipe,
            "part",
            {"max_block_bytes": 2 << 10, "when_idle": "leave", "resident_blocks": 5},
            "cpu",
        )
        for _ in range(3):
            assert torch.equal(module(INPUT), expected)
        assert timeline.num_copies == 5
        undo()
    assert torch.equal(module(INPUT), expected)


@pytest.mark.parametrize("name", ["old", "new"])
@pytest.mark.parametrize("way", WAYS)
def test_a_weight_that_is_made_of_two_others_is_made_of_what_arrived(
    name: str, way: Mapping[str, Any]
) -> None:
    """As ``weight_norm`` has it in audio autoencoders: the old one by a hook before the forward."""
    norms = {"old": torch.nn.utils.weight_norm, "new": torch.nn.utils.parametrizations.weight_norm}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        module = Stack(lambda: norms[name](torch.nn.Linear(16, 16))).requires_grad_(False)
    expected = module(INPUT)
    with late_copies():
        undo = apply_to(module, max_block_bytes=2 << 10, **way)
        for _ in range(2):
            assert torch.equal(module(INPUT), expected)
        undo()
    assert torch.equal(module(INPUT), expected)


@pytest.mark.parametrize("way", WAYS)
def test_calls_inside_and_outside_of_inference_mode_may_alternate(way: Mapping[str, Any]) -> None:
    module = Stack(lambda: torch.nn.Linear(16, 16)).requires_grad_(False)
    pipe = SimpleNamespace(components={"part": module, "other": torch.nn.Identity()})
    expected = module(INPUT)
    with poisoned_slots():
        undo = STREAMING.apply(pipe, "part", {"max_block_bytes": 2 << 10, **way}, "cpu")
        for is_inference in (True, False, True, False):
            with torch.inference_mode(is_inference):
                assert torch.equal(module(INPUT), expected)
            pipe.components["other"](INPUT)
            with torch.inference_mode(is_inference):
                assert torch.equal(module(INPUT), expected)
        undo()
    assert not any(one.is_inference() for one in module.parameters())
    assert torch.equal(module(INPUT), expected)


@pytest.mark.parametrize("num_slots", [1, 2])
def test_a_block_that_calls_its_neighbour_needs_two_slots_and_says_so(num_slots: int) -> None:
    module = Stack(lambda: torch.nn.Linear(16, 16), count=3).requires_grad_(False)
    expected = module.blocks[1](module.blocks[0](INPUT))
    inner = module.blocks[1]
    module.blocks[0].register_forward_hook(lambda _, __, output: inner(output))
    with poisoned_slots():
        undo = apply_to(module, max_block_bytes=2 << 10, num_slots=num_slots)
        if num_slots == 1:
            with pytest.raises(RuntimeError, match="plan with num_slots above 1"):
                module.blocks[0](INPUT)
        else:
            assert torch.equal(module.blocks[0](INPUT), expected)
        undo()


# -- disk and host memory


def _mapped_file(address: int) -> str:
    """Return the file that is mapped at *address* of this process; "" for ordinary memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(one, 16) for one in line.split()[0].split("-"))
        if begin <= address < end:
            return line.split(maxsplit=5)[5] if len(line.split()) > 5 else ""
    return ""


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads /proc/self/maps")
@pytest.mark.parametrize("when_idle", ["stay", "leave"])
def test_on_disk_weights_are_mapped_and_gone_after_undoing(when_idle: str, tmp_path: Path) -> None:
    pipe = fresh("flux")
    expected = picture(pipe, "flux")
    before = snapshot(pipe, with_values=True)
    how = {"disk_path": str(tmp_path), "when_idle": when_idle}
    options = [
        on("transformer", max_block_bytes=16 << 10, **how),
        on("text_encoder_2", **LAYERS, **how),
    ]
    away = {
        option.component: [
            tensor.path
            for block in blocks_of(
                described(getattr(pipe, option.component)), option.parameters["max_block_bytes"]
            ).blocks
            for tensor in block.tensors
        ]
        for option in options
    }
    assert all(away.values())
    with late_copies(), apply_options(pipe, options, "cpu"):
        for _ in range(2):
            assert torch.equal(picture(pipe, "flux"), expected)
        pipe.vae(torch.zeros(1, 3, 16, 16))  # has components leave that do
        for option in options:
            module = getattr(pipe, option.component)
            parameters = dict(module.named_parameters(remove_duplicate=False))
            for path in away[option.component]:
                assert _mapped_file(parameters[path].data_ptr()).startswith(str(tmp_path))
        assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == []
    assert differences(before, snapshot(pipe, with_values=True)) == ()
    assert torch.equal(picture(pipe, "flux"), expected)


@pytest.mark.parametrize("when_idle", ["stay", "leave"])
@pytest.mark.parametrize("resident_blocks", [0, 2])
def test_the_host_holds_what_is_streamed_and_no_more(
    when_idle: str, resident_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = fresh("flux")
    packed: list[Any] = []

    class Counted(streamer.Packed):
        def __init__(self, *args: Any, **how: Any) -> None:
            super().__init__(*args, **how)
            packed.append(self)

    monkeypatch.setattr(streamer, "Packed", Counted)
    component = described(pipe.transformer)
    cut = blocks_of(component, 64 << 10)
    streamed = [cut.blocks[number] for number in cut.streamed(resident_blocks)]
    expected_bytes = sum(block.num_bytes for block in streamed)
    if when_idle == "leave":
        expected_bytes = sum(block.num_bytes for block in cut.blocks)
        expected_bytes += sum(aligned(tensor.num_bytes) for tensor in cut.rest)
    how = {"when_idle": when_idle, "resident_blocks": resident_blocks}
    with apply_options(pipe, [on("transformer", max_block_bytes=64 << 10, **how)], "cpu"):
        assert sum(one.host.untyped_storage().nbytes() for one in packed) == expected_bytes


class Layers(torch.nn.Module):
    """Parameters in every layout that a pipeline may have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
        self.transposed = torch.nn.Parameter(torch.randn(3, 5).t())
        self.scalar = torch.nn.Parameter(torch.tensor(2.0))
        self.short = torch.nn.Parameter(torch.randn(7).half())
        self.nothing = torch.nn.Parameter(torch.empty(0, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("way", WAYS)
def test_every_layout_comes_back_as_it_was(way: Mapping[str, Any]) -> None:
    module = Stack(Layers)
    before = {path: (one.stride(), one.clone()) for path, one in module.named_parameters()}
    objects = [id(one) for one in module.parameters()]
    with late_copies():
        undo = apply_to(module, max_block_bytes=2 << 10, **way)
        module(INPUT)
        assert [one.stride() for one in module.parameters()] == [b[0] for b in before.values()]
        undo()
    assert [id(one) for one in module.parameters()] == objects
    for path, one in module.named_parameters():
        assert one.stride() == before[path][0]
        assert torch.equal(one, before[path][1])


def test_weights_are_packed_all_the_same_where_memory_cannot_be_page_locked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(page_locked, "page_lock", lambda buffer, device: None)
    parameters = [torch.nn.Parameter(torch.randn(3, 5)), torch.nn.Parameter(torch.randn(7))]
    values = [one.detach().clone() for one in parameters]
    packed = streamer.Packed(parameters, torch.device("cuda"), is_locked=True)
    assert not packed.is_locked
    assert all(torch.equal(one, value) for one, value in zip(parameters, values, strict=True))
    packed.unpack()
    assert all(torch.equal(one, value) for one, value in zip(parameters, values, strict=True))


def test_the_driver_is_asked_once_and_the_user_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(virtual_cuda, "_page_lock", lambda *about: asked.append(about))
    options = [
        on("transformer", max_block_bytes=16 << 10),
        *(
            Option(strategy="resident", component=name)
            for name in ("text_encoder", "text_encoder_2", "vae")
        ),
    ]
    with pytest.warns(UserWarning, match="could not be page-locked") as told:
        rehearsed = rehearse(fresh("flux"), options, small_call("flux"), find_gpu("rtx-4090"))
    assert len(asked) == len([one for one in told if "page-locked" in str(one.message)]) == 1
    assert rehearsed.pinned_bytes == 0
    assert sum(phase.copies.to_gpu_bytes for phase in rehearsed.phases) > 0


def _keeps(packed: streamer.Packed, *_: Any) -> None:
    """A hook that refers to what the module's parameters are views of."""


def test_memory_that_nobody_undoes_is_unlocked_with_its_pipeline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    locked: list[int] = []

    def page_lock(buffer: torch.Tensor, device: Any) -> Any:
        address = buffer.data_ptr()
        locked.append(address)
        return lambda: locked.remove(address)

    monkeypatch.setattr(page_locked, "page_lock", page_lock)
    layer = torch.nn.Linear(4, 4)
    packed = streamer.Packed(list(layer.parameters()), torch.device("cuda"), is_locked=True)
    layer.register_forward_pre_hook(functools.partial(_keeps, packed))
    assert len(locked) == 1
    del packed, layer
    gc.collect()
    assert locked == []


def test_page_locked_memory_is_unlocked_once_whether_it_served_or_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    locked: list[int] = []

    def page_lock(buffer: torch.Tensor, device: Any) -> Any:
        locked.append(buffer.data_ptr())
        return lambda: locked.remove(buffer.data_ptr())

    monkeypatch.setattr(page_locked, "page_lock", page_lock)
    parameters = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(2)]
    cuda = torch.device("cuda")
    packed = streamer.Packed(parameters, cuda, is_locked=True)
    assert locked == [packed.host.data_ptr()]
    packed.unpack()
    assert locked == []
    file = str(tmp_path / "nowhere" / "file")
    with pytest.raises(Exception, match="No such file"):
        streamer.Packed(parameters, cuda, is_locked=True, file=file)
    assert locked == []
    assert len({one.untyped_storage().data_ptr() for one in parameters}) == 2


# -- failures


@pytest.mark.parametrize("fails", ["packing", "a file", "the first memory", "a later memory"])
@pytest.mark.parametrize("when_idle", ["stay", "leave"])
def test_an_apply_that_fails_half_way_changes_nothing(
    fails: str, when_idle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = fresh("flux")
    expected = picture(pipe, "flux")
    before = snapshot(pipe, with_values=True)
    tensors = {name: described(one) for name, one in module_components(pipe).items()}
    how: dict[str, Any] = {"max_block_bytes": 16 << 10, "when_idle": when_idle}
    count = 0

    def after_some(function: Any, num_calls: int) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > num_calls:
                raise torch.OutOfMemoryError("no room")
            return function(*args, **kwargs)

        return counted

    if fails == "packing":
        monkeypatch.setattr(torch.Tensor, "copy_", after_some(torch.Tensor.copy_, 11))
    elif fails == "a file":
        from safetensors import torch as files

        how["disk_path"] = str(tmp_path)
        monkeypatch.setattr(files, "save_file", after_some(files.save_file, 3))
    else:
        how["when_idle"] = "stay"
        num_calls = 0 if fails == "the first memory" else 1
        monkeypatch.setattr(
            streamer.Streamer, "_empty", after_some(streamer.Streamer._empty, num_calls)
        )
    options = [on("text_encoder_2", **LAYERS, when_idle="leave"), on("transformer", **how)]
    with pytest.raises(ApplyFailed, match="everything was undone") as failure:
        apply_options(pipe, options, "cpu")
    assert isinstance(failure.value.__cause__, torch.OutOfMemoryError)
    monkeypatch.undo()
    assert differences(before, snapshot(pipe, with_values=True)) == ()
    assert {name: described(one) for name, one in module_components(pipe).items()} == tensors
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(picture(pipe, "flux"), expected)


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_the_call_after_an_interrupted_one_is_right(
    error: BaseException, way: Mapping[str, Any], data: st.DataObject
) -> None:
    module = Stack(lambda: torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.SiLU()))
    module.requires_grad_(False)
    expected = module(INPUT)
    with late_copies():
        undo = apply_to(module, max_block_bytes=2 << 10, **way)
        for number in data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)):

            def stop(*_: Any) -> None:
                raise error

            handle = module.blocks[number][1].register_forward_pre_hook(stop)
            with pytest.raises(type(error)):
                module(INPUT)
            handle.remove()
            if data.draw(st.booleans()):
                assert torch.equal(module(INPUT), expected)
        assert torch.equal(module(INPUT), expected)
        assert torch.equal(module(INPUT), expected)
        undo()
    assert torch.equal(module(INPUT), expected)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


# -- refusals


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"colour": "red"}, "colour"),
        ({"resident_blocks": -1}, "resident_blocks is a number of at least 0"),
        ({"resident_blocks": True}, "resident_blocks is a number"),
        ({"resident_blocks": "3"}, "resident_blocks is a number"),
        ({"resident_blocks": 10**6}, "blocks, but resident_blocks was 1000000"),
        ({"num_slots": 0}, "num_slots is a number of at least 1"),
        ({"look_ahead": -1}, "look_ahead is a number of at least 0"),
        ({"look_ahead": 1.5}, "look_ahead is a number of at least 0"),
        ({"max_block_bytes": 0}, "max_block_bytes is a number of at least 1"),
        ({"when_idle": "sleep"}, "when_idle is stay or leave"),
        ({"when_idle": ["stay"]}, "when_idle is stay or leave"),
        ({"host_memory": "disk"}, "host_memory is pinned or pageable"),
        ({"load_with": "vae"}, "load_with needs when_idle=leave"),
        ({"load_with": 3, "when_idle": "leave"}, "load_with is a name"),
        ({"load_with": "transformer", "when_idle": "leave"}, "names another component"),
        ({"disk_path": 3}, "disk_path is a name"),
        ({"uncalled_modules": "transformer_blocks.0"}, "is a list of paths"),
        ({"uncalled_modules": 3}, "is a list of paths"),
        ({"call_order": ["norm", "attn"]}, "maps paths to lists of paths"),
        ({"call_order": {"": "attn"}}, "maps paths to lists of paths"),
        ({"disk_path": "x", "host_memory": "pinned"}, "leave host_memory out"),
        ({"uncalled_modules": [3]}, "is a list of paths"),
        ({"uncalled_modules": ["nowhere"]}, "has no module 'nowhere'"),
        ({"uncalled_modules": [""]}, "has no module ''"),
        ({"uncalled_modules": ["transformer_blocks"]}, "is a list, which is never called"),
        ({"max_block_bytes": 1 << 40}, "would stay: use resident"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_sentence_and_changes_nothing(
    parameters: dict[str, Any], message: str
) -> None:
    pipe, _ = untouched("flux")
    before = snapshot(pipe)
    given = {"max_block_bytes": 16 << 10, **parameters}
    reason = STREAMING.refusal(described(pipe.transformer, "transformer"), given)
    assert message in str(reason)
    assert str(reason).count(". ") == 0
    assert str(reason).endswith(".")
    with pytest.raises(InvalidRequest, match="streaming cannot be used on transformer"):
        apply_options(pipe, [on("transformer", **given)], "cpu")
    assert differences(before, snapshot(pipe)) == ()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"load_with": "text_encoder_9", "when_idle": "leave"}, "text_encoder_9"),
        ({"disk_path": "/no/such/folder"}, "No such file or directory"),
    ],
)
def test_names_that_the_machine_or_pipeline_lacks_fail_with_the_name(
    parameters: dict[str, Any], message: str
) -> None:
    pipe, _ = untouched("flux")
    before = snapshot(pipe)
    with pytest.raises(ApplyFailed, match=message):
        apply_options(pipe, [on("transformer", max_block_bytes=16 << 10, **parameters)], "cpu")
    assert differences(before, snapshot(pipe)) == ()


@pytest.mark.parametrize("backend", ["bitsandbytes", "torchao", "quanto"])
def test_weights_that_are_more_than_their_parameters_are_refused(backend: str) -> None:
    component = described(untouched("flux")[0].transformer)
    traits = {**component.traits, "quantized_by": backend}
    reason = STREAMING.refusal(replace(component, traits=traits), {"max_block_bytes": 16 << 10})
    assert f"quantised by {backend}, whose weights cannot be moved block by block" in str(reason)


def test_an_autoencoder_that_pipelines_cast_is_refused() -> None:
    vae = fresh("stable_diffusion_xl").vae
    assert STREAMING.refusal(described(vae), LAYERS) is None
    assert "cast to float32" in str(STREAMING.refusal(described(vae.half()), LAYERS))


def test_what_is_streamed_already_is_not_streamed_again() -> None:
    pipe, _ = untouched("flux")
    with (
        apply_options(pipe, [on("transformer", max_block_bytes=16 << 10)], "cpu"),
        pytest.raises(UnsupportedPipeline, match="undo the earlier plan"),
    ):
        apply_options(pipe, [on("vae", max_block_bytes=16 << 10)], "cpu")


def test_parameters_that_overlap_or_have_gaps_are_refused_and_left_alone() -> None:
    whole = torch.randn(16, 16)
    cases = {
        "shares its memory": (whole, whole[:]),
        "a view with gaps": (whole[:, :8], torch.randn(16, 16)),
        "gaps": (whole[:, :1].expand(16, 16), torch.randn(16, 16)),
    }
    for message, weights in cases.items():
        module = Stack(lambda: torch.nn.Linear(16, 16, bias=False), count=3)
        for block, weight in zip(module.blocks, weights, strict=False):
            block.weight = torch.nn.Parameter(weight, requires_grad=False)
        places = [one.data_ptr() for one in module.parameters()]
        with pytest.raises(UnsupportedPipeline, match=message):
            apply_to(module, max_block_bytes=1 << 10)
        assert [one.data_ptr() for one in module.parameters()] == places


def test_parts_of_one_tensor_are_streamed_like_any_others() -> None:
    """Loaders divide fused weights of a file and keep the pieces in one storage."""
    parts = torch.randn(48, 16).chunk(3)
    module = Stack(lambda: torch.nn.Linear(16, 16, bias=False), count=3).requires_grad_(False)
    for block, part in zip(module.blocks, parts, strict=True):
        block.weight = torch.nn.Parameter(part, requires_grad=False)
    assert described(module).weight_bytes == 3 * 16 * 16 * 4
    expected = module(INPUT)
    with late_copies():
        undo = apply_to(module, max_block_bytes=1 << 10, num_slots=1)
        assert torch.equal(module(INPUT), expected)
        undo()
    assert torch.equal(module(INPUT), expected)
