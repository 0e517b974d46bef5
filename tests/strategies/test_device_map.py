"""Components on other GPUs and split over several: the same picture, the right places, undone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.end_to_end.small_runs import untouched
from tests.small_pipelines import picture, small_call

from pipefit.cost_models.allocator import allocated_bytes
from pipefit.cost_models.devices import (
    blocks_of_split,
    place_of,
    places_of,
    split_bytes,
    split_host_bytes,
    streamed_parts,
)
from pipefit.cost_models.host_memory import host_bytes
from pipefit.cost_models.placement import Split
from pipefit.cost_models.workload import Component
from pipefit.errors import ApplyFailed, InvalidRequest
from pipefit.planner.apply import apply_options
from pipefit.planner.catalog import find_gpu
from pipefit.planner.rehearse import on_stage
from pipefit.planner.snapshot import differences, snapshot
from pipefit.planner.trace import run_call
from pipefit.strategies import strategy, traits_of
from pipefit.strategies.describe import describe_component
from pipefit.strategies.device_map import MODES, rooms_of, stock_map
from pipefit.strategies.live import module_components
from pipefit.strategies.strategy import Option

CARD = find_gpu("rtx-4060")
CARDS = [CARD, replace(CARD, index=1)]

STREAMED = {"resident_blocks": 0, "when_idle": "leave", "max_block_bytes": 1 << 15}
"""Small enough for the blocks of a small pipeline to be cut."""


ON_HOST = {"resident_blocks": "0:1+1:2", "max_block_bytes": 1 << 15}
IN_TURNS = {**ON_HOST, "split": "0:1+1:1+0:1+1:1"}
HALF = {"resident_blocks": "1:0", "max_block_bytes": 1 << 15}


def described(pipe: Any, name: str) -> Component:
    module = getattr(pipe, name)
    return describe_component(name, module, traits_of(module))


def own_attributes(pipe: Any) -> list[set[str]]:
    """What is set on each module of the pipeline itself, methods in place of the class's too."""
    return [set(vars(m)) for one in module_components(pipe).values() for m in one.modules()]


def away(*names: str, how: str = "resident", **parameters: Any) -> Any:
    """Every component resident on GPU 0, but *names*, which are on GPU 1."""

    def options(pipe: Any) -> list[Option]:
        found = [
            Option(strategy="device_map", component=n, parameters={"device": 1}) for n in names
        ]
        for name in module_components(pipe):
            is_away = name in names
            found.append(
                Option(
                    strategy=how if is_away else "resident",
                    component=name,
                    parameters=parameters if is_away else {},
                )
            )
        return found

    return options


def split(name: str, **streamed: Any) -> Any:
    """*name* in halves, the rest of the pipeline resident on GPU 0."""

    def options(pipe: Any) -> list[Option]:
        count = len(blocks_of_split(described(pipe, name)))
        parameters = {"split": f"0:{count // 2}+1:{count - count // 2}", **streamed}
        found = [Option(strategy="device_map", component=name, parameters=parameters)]
        return found + [
            Option(strategy="resident", component=other)
            for other in module_components(pipe)
            if other != name
        ]

    return options


def mapped(name: str) -> Any:
    """*name* as accelerate balances it over two GPUs, the rest of the pipeline on GPU 0."""

    def options(pipe: Any) -> list[Option]:
        places = stock_map(described(pipe, name), "balanced", {0: 1 << 30, 1: 1 << 30})
        rest = [o for o in away()(pipe) if o.component != name]
        return [Option(strategy="device_map", component=name, parameters={"map": places}), *rest]

    return options


CASES = {
    "the first component": ("stable_diffusion_xl", away("vae")),
    "an autoencoder that encodes, too": ("stable_diffusion_xl_img2img", away("vae")),
    "text encoders": ("stable_diffusion_3", away("text_encoder", "text_encoder_3")),
    "the denoiser": ("stable_diffusion_xl", away("unet")),
    "one that takes turns": ("stable_diffusion_xl_controlnet", away("controlnet")),
    "streamed on another": ("flux", away("text_encoder_2", how="streaming", **STREAMED)),
    "a split transformer": ("flux", split("transformer")),
    "a split text encoder": ("flux", split("text_encoder_2")),
    "a transformer that the host helps to hold": ("flux", split("transformer", **ON_HOST)),
    "GPUs that take turns and stream": ("flux", split("transformer", **IN_TURNS)),
    "a text encoder of which one part streams": ("flux", split("text_encoder_2", **HALF)),
    "a transformer as accelerate maps it": ("pixart_sigma", mapped("transformer")),
    "a language model": ("sana", away("text_encoder")),
}


@pytest.mark.parametrize("case", CASES)
def test_the_picture_stays_and_undoing_leaves_no_trace(case: str) -> None:
    name, options = CASES[case]
    pipe, expected = untouched(name)
    before, attributes = snapshot(pipe, with_values=True), own_attributes(pipe)
    with apply_options(pipe, options(pipe), "cpu"):
        assert torch.equal(picture(pipe, name), expected)
        assert own_attributes(pipe) != attributes
    assert differences(before, snapshot(pipe, with_values=True)) == ()
    assert own_attributes(pipe) == attributes


@pytest.mark.parametrize("case", CASES)
def test_two_gpus_hold_what_was_put_there(case: str) -> None:
    name, options = CASES[case]
    pipe, _ = untouched(name)
    with on_stage(pipe, CARDS) as stage:
        before = snapshot(stage.pipe)
        chosen = options(pipe)
        with apply_options(stage.pipe, chosen, "cuda:0"):
            assert stage.pipe._execution_device == torch.device("cuda:0")
            for option in chosen:
                if "device" in option.parameters:
                    there = {t.device for t in getattr(stage.pipe, option.component).parameters()}
                    assert there <= {torch.device("cuda:1"), torch.device("cpu")}
            with stage.counting():
                run_call(stage.pipe, small_call(name))
            rows = stage.rehearsal({}).phases
        assert differences(before, snapshot(stage.pipe)) == ()
    used = {row.device for row in rows if row.allocated_bytes}
    assert used == {0, 1}
    assert sum(row.copies.to_other_gpus_bytes for row in rows) > 0


def test_the_main_gpu_need_not_be_the_first() -> None:
    pipe, _ = untouched("flux")
    options = [
        *(Option(strategy="resident", component=name) for name in module_components(pipe)),
        Option(strategy="device_map", component="text_encoder_2", parameters={"device": 0}),
    ]
    with on_stage(pipe, CARDS) as stage, apply_options(stage.pipe, options, "cuda:1"):
        assert stage.pipe._execution_device == torch.device("cuda:1")
        assert stage.pipe.vae.device == torch.device("cuda:1")
        assert stage.pipe.text_encoder_2.device == torch.device("cuda:0")
        with stage.counting():
            run_call(stage.pipe, small_call("flux"))


def test_every_tensor_of_a_split_lies_on_one_gpu() -> None:
    component = described(untouched("flux")[0], "transformer")
    blocks = blocks_of_split(component)
    halves = Split(blocks=((1, 1), (0, len(blocks) - 1)))
    places = places_of(component, halves)
    above = [[p for p in places if f"{t.path}.".startswith(f"{p}.")] for t in component.tensors]
    assert all(len(found) == 1 for found in above)
    assert [place_of(places, path) for path in blocks] == [1, *[0] * (len(blocks) - 1)]
    assert place_of(places, "x_embedder") == 1
    sizes = [sum(split_bytes(component, halves, device)) for device in (0, 1)]
    assert sum(sizes) == component.weight_bytes
    assert min(sizes) > 0


def test_a_gpu_that_streams_holds_its_slots_and_what_stays_to_the_byte() -> None:
    pipe, _ = untouched("flux")
    component = described(pipe, "transformer")
    [asked, *_] = split("transformer", **ON_HOST)(pipe)
    streamed = strategy("device_map").placement(asked.parameters)
    whole = replace(streamed, resident_blocks=())
    with on_stage(pipe, CARDS) as stage:
        before = [gpu.allocator.allocated_bytes for gpu in stage.gpus]
        with apply_options(stage.pipe, [asked], "cuda:0"):
            held = [gpu.allocator.allocated_bytes for gpu in stage.gpus]
        assert [gpu.allocator.allocated_bytes for gpu in stage.gpus] == before == [0, 0]
    assert held == [allocated_bytes(split_bytes(component, streamed, i)) for i in (0, 1)]
    assert all(n < allocated_bytes(split_bytes(component, whole, i)) for i, n in enumerate(held))
    parts = streamed_parts(component, streamed)
    slots_bytes = sum(
        how.num_slots * cut.slot_bytes(how.resident_blocks) for cut, how in parts.values()
    )
    away = [cut.blocks[n] for cut, how in parts.values() for n in cut.streamed(how.resident_blocks)]
    kept_bytes = sum(sum(split_bytes(component, streamed, i)) for i in (0, 1)) - slots_bytes
    assert kept_bytes + sum(block.weight_bytes for block in away) == component.weight_bytes
    assert split_host_bytes(component, streamed) == sum(block.num_bytes for block in away)
    assert host_bytes(component, streamed).pinned_bytes == split_host_bytes(component, streamed)


def test_a_split_that_streams_survives_an_interrupted_call() -> None:
    pipe, expected = untouched("flux")
    before = snapshot(pipe, with_values=True)
    with apply_options(pipe, split("transformer", **ON_HOST)(pipe), "cpu"):
        part = pipe.transformer.transformer_blocks[0].ff
        whole = part.forward

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            raise KeyboardInterrupt

        part.forward = interrupted
        with pytest.raises(KeyboardInterrupt):
            picture(pipe, "flux")
        part.forward = whole
        assert torch.equal(picture(pipe, "flux"), expected)
    assert differences(before, snapshot(pipe, with_values=True)) == ()


def test_what_a_split_cannot_stream_is_left_as_it_was() -> None:
    pipe, _ = untouched("flux")
    before = snapshot(pipe, with_values=True)
    attention = pipe.transformer.transformer_blocks[0].attn
    weight = attention.to_q.weight
    wide = torch.zeros(weight.shape[0], 2 * weight.shape[1])
    attention.to_q.weight = torch.nn.Parameter(wide[:, ::2], requires_grad=False)
    try:
        with pytest.raises(ApplyFailed, match="device_map@transformer failed"):
            apply_options(pipe, split("transformer", **ON_HOST)(pipe), "cpu")
    finally:
        attention.to_q.weight = weight
    assert differences(before, snapshot(pipe, with_values=True)) == ()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "component"), [("flux", "transformer"), ("sana", "text_encoder")])
def test_accelerate_maps_names_and_sizes_as_it_maps_the_model(
    name: str, component: str, mode: str
) -> None:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    pipe, _ = untouched(name)
    module, found = getattr(pipe, component), described(pipe, component)
    third = found.weight_bytes // 3
    room: dict[int | str, int] = {0: third, 1: third, 2: third, "cpu": 1 << 40}
    whole = module._no_split_modules
    if mode != "sequential":
        room = get_balanced_memory(
            module, room, no_split_module_classes=whole, low_zero=mode == "balanced_low_0"
        )
    expected = infer_auto_device_map(module, room, no_split_module_classes=whole)
    assert stock_map(found, mode, dict.fromkeys(range(3), third)) == dict(expected)


@pytest.mark.parametrize("mode", MODES)
def test_max_memory_is_understood_as_accelerate_understands_it(mode: str) -> None:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    pipe, _ = untouched("flux")
    module, found = pipe.transformer, described(pipe, "transformer")
    kilobytes = found.weight_bytes // 1000
    asked = {
        1: f"{kilobytes // 2}KB",
        0: f"{kilobytes // 3}KB",
        2: found.weight_bytes // 2,
        "cpu": "1GiB",
    }
    whole = module._no_split_modules
    room = get_max_memory(dict(asked))
    if mode != "sequential":
        room = get_balanced_memory(
            module, room, no_split_module_classes=whole, low_zero=mode == "balanced_low_0"
        )
    expected = dict(infer_auto_device_map(module, room, no_split_module_classes=whole))
    assert stock_map(found, mode, rooms_of(asked)) == expected
    assert len(set(expected.values())) > 1
    written = "+".join(f"{place}:{size}" for place, size in asked.items())
    assert rooms_of(written) == rooms_of(asked)


@pytest.mark.parametrize(
    "max_memory",
    ["10GB", "0:10GB+0:8GB", "cpu:30GB", "gpu:8GB", "", 8, {}, {True: "8GB"}, {"0": "8GB"}],
)
def test_a_max_memory_that_cannot_be_meant_is_refused_in_a_sentence(max_memory: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"gives each GPU once.*as in 0:10GB\+1:8GB\+cpu:30GB"):
        rooms_of(max_memory)


@pytest.mark.parametrize("size", ["much", "80%", "-1GB", ""])
def test_a_room_that_is_no_size_is_refused_in_a_sentence(size: str) -> None:
    with pytest.raises(InvalidRequest, match=f"The size '{size}' was not understood"):
        rooms_of({0: size, 1: "8GB"})


@pytest.mark.parametrize(
    ("name", "component", "parameters", "words"),
    [
        ("flux", "vae", {}, "one of device=1"),
        ("flux", "vae", {"mode": "balanced"}, "can only be predicted"),
        ("flux", "vae", {"mode": "auto", "max_memory": "0:1GB"}, "can only be predicted"),
        ("flux", "vae", {"device": 1, "max_memory": "0:1GB"}, "name the mode"),
        ("flux", "vae", {"map": {"encoder": 0, "decoder": 0}}, "names a single GPU"),
        ("flux", "vae", {"map": {"encoder": 0, "quant_conv": 1}}, "names decoder"),
        ("flux", "vae", {"map": {"encoder": "cpu"}}, "index of a GPU"),
        ("flux", "vae", {"device": -1}, "index of a GPU"),
        ("flux", "transformer", {"split": "0:1"}, "numbers of blocks by GPU"),
        ("flux", "transformer", {"split": "0:1+0:1"}, "names a GPU twice in a row"),
        ("flux", "transformer", {"split": "0:1+1:99"}, "places 100"),
        ("flux", "vae", {"split": "0:1+1:1"}, "no row of blocks"),
        ("flux", "vae", {"device": 1, "resident_blocks": "1:0"}, "name the split"),
        ("flux", "transformer", {"split": "0:2+1:2", "resident_blocks": 3}, "by GPU, as in 0:20"),
        ("flux", "transformer", {"split": "0:2+1:2", "resident_blocks": "1:0+1:1"}, "GPU twice"),
        ("flux", "transformer", {"split": "0:2+1:2", "resident_blocks": "1:0"}, "has 0 blocks"),
        ("flux", "transformer", {"split": "0:2+1:2", **ON_HOST, "max_block_bytes": 0}, "at least"),
        ("flux", "transformer", {"split": "0:2+1:2", **ON_HOST, "resident_blocks": "1:8"}, "has 8"),
        ("flux", "transformer", {"split": "0:2+1:2", **ON_HOST, "resident_blocks": "7:0"}, "has 0"),
        ("stable_diffusion_xl", "unet", {"split": "0:1+1:1"}, "no row of blocks"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    name: str, component: str, parameters: dict[str, Any], words: str
) -> None:
    refusal = strategy("device_map").refusal(described(untouched(name)[0], component), parameters)
    assert words in str(refusal)


def test_nothing_else_places_what_is_split_and_no_groups_are_elsewhere() -> None:
    pipe, _ = untouched("flux")
    twice = [*split("transformer")(pipe), Option(strategy="resident", component="transformer")]
    with pytest.raises(InvalidRequest, match="both place the weights of transformer"):
        apply_options(pipe, twice, "cpu")
    turns = [Option(strategy="model_offload"), away("vae")(pipe)[0]]
    with pytest.raises(InvalidRequest, match="that brings all components to one GPU"):
        apply_options(pipe, turns, "cpu")
    groups = away("vae", how="group_offload", offload_type="leaf_level")(pipe)
    with pytest.raises(InvalidRequest, match="device_map cannot be used with group_offload"):
        apply_options(pipe, groups, "cpu")
