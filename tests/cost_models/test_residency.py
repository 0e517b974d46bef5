"""Groups against diffusers' own hooks on real modules; chains against accelerate's rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.cost_models.workloads import component_of, linear_stack, tensor, workload

from pipefit.cost_models.placement import (
    GroupOffload,
)
from pipefit.cost_models.residency import (
    DECLARED_BLOCKS,
    GroupHooks,
    OffloadChain,
    load_order,
    model_offload_residency,
    offload_groups,
    sequential_groups,
    sequential_resident_bytes,
)
from pipefit.cost_models.workload import Component, Workload


def tiny_flux() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )


def tiny_unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def tiny_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def tiny_wan() -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=3,
    )


def tiny_t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=2))


BLOCKS_1 = GroupOffload(offload_type="block_level", num_blocks_per_group=1)
BLOCKS_2 = GroupOffload(offload_type="block_level", num_blocks_per_group=2)
LEAVES = GroupOffload(offload_type="leaf_level")
VAE_BLOCKS = ("quant_conv", "post_quant_conv", "encoder", "decoder")


@pytest.mark.parametrize(
    ("build", "placement"),
    [
        (tiny_flux, BLOCKS_1),
        (tiny_flux, BLOCKS_2),
        (tiny_flux, LEAVES),
        (tiny_unet, BLOCKS_1),
        (tiny_unet, LEAVES),
        (tiny_wan, BLOCKS_2),
        (tiny_wan, LEAVES),
        (tiny_t5, BLOCKS_1),
        (tiny_t5, LEAVES),
        (tiny_vae, LEAVES),
        (tiny_vae, replace(BLOCKS_1, block_modules=VAE_BLOCKS)),
    ],
)
def test_groups_are_those_of_diffusers(build: Callable[[], Any], placement: GroupOffload) -> None:
    from diffusers.hooks import apply_group_offloading

    module = build()
    groups = offload_groups(component_of("any", module), placement)
    apply_group_offloading(
        module,
        onload_device="cpu",
        offload_type=placement.offload_type,
        num_blocks_per_group=placement.num_blocks_per_group,
        block_modules=list(placement.block_modules) or None,
    )
    path_of = {id(child): path for path, child in module.named_modules()}
    theirs = {}
    for child in module.modules():
        hook = hasattr(child, "_diffusers_hook") and child._diffusers_hook.get_hook(
            "group_offloading"
        )
        if hook:
            group = hook.group
            tensors = {id(t): t for m in group.modules for t in [*m.parameters(), *m.buffers()]}
            tensors |= {id(t): t for t in [*group.parameters, *group.buffers]}
            # A buffer that the group lists beside its module becomes two once it has moved.
            own = {id(t) for m in group.modules for t in m.buffers()}
            doubled = [t for t in group.buffers if id(t) in own]
            num_bytes = sum(t.numel() * t.element_size() for t in [*tensors.values(), *doubled])
            theirs[path_of[id(group.onload_leader)]] = (
                path_of[id(group.offload_leader)],
                num_bytes,
            )
    assert {g.paths[0]: (g.paths[-1], g.num_bytes) for g in groups.all} == theirs
    assert groups.unmatched_bytes == sum(g.num_bytes for g in groups.unmatched)


ZEROS: dict[Any, dict[str, tuple[int, ...]]] = {
    tiny_flux: {
        "hidden_states": (1, 6, 4),
        "encoder_hidden_states": (1, 3, 32),
        "pooled_projections": (1, 32),
        "timestep": (1,),
        "img_ids": (6, 3),
        "txt_ids": (3, 3),
    },
    tiny_unet: {"sample": (1, 4, 8, 8), "timestep": (1,), "encoder_hidden_states": (1, 3, 8)},
    tiny_wan: {
        "hidden_states": (1, 4, 1, 4, 4),
        "timestep": (1,),
        "encoder_hidden_states": (1, 3, 16),
    },
    tiny_t5: {"input_ids": (1, 4)},
    tiny_vae: {"z": (1, 4, 4, 4)},
}


def streamed(placement: GroupOffload, **more: Any) -> GroupOffload:
    return replace(placement, use_stream=True, **more)


def on_disk(placement: GroupOffload) -> GroupOffload:
    return replace(placement, offload_to_disk_path="weights")


@pytest.mark.parametrize(
    ("build", "placement"),
    [
        *((build, p) for build in ZEROS for p in (LEAVES, BLOCKS_1, BLOCKS_2)),
        *((build, streamed(LEAVES)) for build in ZEROS),
        *((build, streamed(BLOCKS_1)) for build in ZEROS),
        (tiny_flux, streamed(LEAVES, low_cpu_mem_usage=True)),
        (tiny_flux, streamed(LEAVES, record_stream=True)),
        (tiny_t5, replace(BLOCKS_1, block_modules=("encoder",))),
        *((build, on_disk(p)) for build in (tiny_wan, tiny_t5) for p in (BLOCKS_1, BLOCKS_2)),
        *((tiny_flux, on_disk(p)) for p in (LEAVES, streamed(LEAVES), streamed(BLOCKS_1))),
    ],
)
def test_weights_on_the_gpu_are_those_of_diffusers_at_every_call(
    build: Callable[[], Any], placement: GroupOffload, tmp_path: Path
) -> None:
    """The real hooks on a virtual GPU, over three forwards: the first records, others prefetch."""
    import torch
    from diffusers.hooks import apply_group_offloading

    from pipefit.planner.virtual import Observer, VirtualMachine

    seen: list[tuple[str, int, int]] = []
    with VirtualMachine(Observer()) as machine, torch.no_grad():
        module = build()
        declared = getattr(module, "_group_offload_block_modules", ())
        component = replace(component_of("any", module), traits={DECLARED_BLOCKS: declared})
        hooks = GroupHooks(offload_groups(component, placement))
        move_weightless(module, machine)

        def watch(path: str, part: Any) -> None:
            inner = part.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                hooks.before(path, "forward")
                predicted = sum(hooks.groups[i].num_bytes for i in hooks.loaded)
                seen.append((path, bytes_on_gpu(module), predicted))
                return inner(*args, **kwargs)

            def leave(*_: Any) -> None:
                hooks.after(path)

            part.forward = forward
            part.register_forward_hook(leave)

        for path, part in module.named_modules():
            watch(path, part)
        apply_group_offloading(
            module,
            onload_device=torch.device("cuda", 0),
            offload_type=placement.offload_type,
            num_blocks_per_group=placement.num_blocks_per_group,
            use_stream=placement.use_stream,
            record_stream=placement.record_stream,
            low_cpu_mem_usage=placement.low_cpu_mem_usage,
            offload_to_disk_path=placement.offload_to_disk_path and str(tmp_path),
            block_modules=list(placement.block_modules) or None,
        )
        assert any(tmp_path.iterdir()) == (placement.offload_to_disk_path is not None)
        call = module.decode if build is tiny_vae else module
        for _ in range(3):
            call(
                **{
                    name: torch.zeros(
                        shape, dtype=torch.long if name == "input_ids" else None, device="cuda"
                    )
                    for name, shape in ZEROS[build].items()
                }
            )
        assert bytes_on_gpu(module) == sum(hooks.groups[i].num_bytes for i in hooks.loaded)
    assert max(on_gpu for _, on_gpu, _ in seen) > 0
    assert [call for call in seen if call[1] != call[2]] == []


def move_weightless(module: Any, machine: Any) -> None:
    """Replace the weights by virtual ones on the GPU, whose values nobody knows."""
    import torch

    from pipefit.planner.virtual import buffer_of
    from pipefit.strategies.live import tensor_slots

    made: dict[int, Any] = {}
    for slots, key in tensor_slots(module):
        tensor = slots[key]
        if id(tensor) not in made:
            # The pair keeps the tensor alive, so that its id stays its own.
            made[id(tensor)] = (machine.parameter(tensor, torch.device("cuda", 0)), tensor)
            buffer_of(made[id(tensor)][0]).value = None
        slots[key] = made[id(tensor)][0]


def bytes_on_gpu(module: Any) -> int:
    found = [*module.parameters(), *module.buffers()]
    for part in module.modules():
        registry = getattr(part, "_diffusers_hook", None)
        hook = registry and registry.get_hook("group_offloading")
        found += hook.group.buffers if hook else ()
    tensors = {id(t): t for t in found if t.is_cuda}
    return sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("build", [tiny_flux, tiny_unet, tiny_vae, tiny_wan])
def test_weights_are_moved_in_the_order_of_module_to(build: Callable[[], Any]) -> None:
    module = build()
    moved: list[int] = []

    def note(moving: Any) -> Any:
        moved.append(moving.numel() * moving.element_size())
        return moving

    module._apply(note)
    assert list(load_order(component_of("any", module))) == moved


def test_tied_weights_are_moved_once_but_belong_to_both_leaves() -> None:
    tied = linear_stack("any", [1000], top_bytes=500)
    tied = Component(
        name="any",
        class_name="Stack",
        library="tests",
        modules=tied.modules,
        tensors=(tied.tensors[0], tensor("head.weight", 1000, tied_to="blocks.0.weight")),
    )
    assert load_order(tied) == (1000,)
    assert [g.num_bytes for g in offload_groups(tied, LEAVES).groups] == [1000, 1000]


def test_sequential_offload_keeps_buffers_unless_the_component_owns_a_parameter() -> None:
    stack = linear_stack("any", [1000, 2000])
    with_buffer = Component(
        name="any",
        class_name="Stack",
        library="tests",
        modules=stack.modules,
        tensors=(*stack.tensors, tensor("blocks.1.scale", 64, is_buffer=True)),
    )
    assert [g.num_bytes for g in sequential_groups(with_buffer).groups] == [1000, 2000]
    assert sequential_resident_bytes(with_buffer) == (64,)
    owning = Component(
        name="any",
        class_name="Stack",
        library="tests",
        modules=stack.modules,
        tensors=(*with_buffer.tensors, tensor("table", 10)),
    )
    assert sequential_resident_bytes(owning) == ()
    assert sorted(g.num_bytes for g in sequential_groups(owning).groups) == [10, 1000, 2064]
    unsaved = replace(tensor("blocks.1.turns", 32, is_buffer=True), persistent=False)
    owning = replace(owning, tensors=(*owning.tensors, unsaved))
    assert sequential_resident_bytes(owning) == (32,)
    assert sorted(g.num_bytes for g in sequential_groups(owning).groups) == [10, 1000, 2064]


def walk(hooks: GroupHooks, paths: list[str], entry: str = "forward") -> list[list[int]]:
    """Call the component and its leaf *paths* in order; return what is loaded during each."""
    seen = []
    hooks.before("", entry)
    for path in paths:
        hooks.before(path, "forward")
        seen.append(sorted(hooks.loaded))
        hooks.after(path)
    hooks.after("")
    return seen


def test_streams_prefetch_one_group_from_the_second_forward_on() -> None:
    stack = linear_stack("any", [10, 20, 30], top_bytes=5)
    streamed = GroupOffload(offload_type="block_level", num_blocks_per_group=1, use_stream=True)
    groups = offload_groups(stack, streamed)
    assert [(g.paths, g.num_bytes) for g in groups.all] == [
        (("",), 5),
        (("blocks.0",), 10),
        (("blocks.1",), 20),
        (("blocks.2",), 30),
    ]
    hooks = GroupHooks(groups)
    order = ["blocks.0", "blocks.1", "blocks.2"]
    assert walk(hooks, order) == [[0, 1], [0, 2], [0, 3]]
    assert walk(hooks, order) == [[0, 1, 2], [0, 2, 3], [0, 3]]
    assert hooks.loaded == set()


def test_an_entry_other_than_forward_never_prefetches() -> None:
    stack = linear_stack("any", [10, 20])
    hooks = GroupHooks(
        offload_groups(stack, GroupOffload(offload_type="leaf_level", use_stream=True))
    )
    first = walk(hooks, ["blocks.0", "blocks.1"], entry="decode")
    assert walk(hooks, ["blocks.0", "blocks.1"], entry="decode") == first
    assert max(len(loaded) for loaded in first) == 2  # the leaf, and the component's empty group


def calls(sequence: str, called: str, **more: Any) -> Workload:
    names = dict.fromkeys(called.split())
    return workload(
        [linear_stack(name, [100]) for name in names],
        [],
        [],
        [(name, "forward", 1) for name in called.split()],
        offload_sequence=tuple(sequence.split("->")),
        **more,
    )


def test_text_to_image_holds_one_component_at_a_time() -> None:
    residency = model_offload_residency(
        calls("text_encoder->transformer->vae", "text_encoder transformer vae")
    )
    assert residency.phases == ({"text_encoder"}, {"transformer"}, {"vae"})
    assert set(residency.onloads.values()) == set(residency.offloads.values()) == {1}


def test_an_early_vae_stays_beside_the_text_encoder_and_through_denoising() -> None:
    residency = model_offload_residency(
        calls("text_encoder->transformer->vae", "text_encoder vae transformer vae")
    )
    assert residency.phases == (
        {"text_encoder"},
        {"text_encoder", "vae"},
        {"vae", "transformer"},
        {"vae"},
    )
    assert residency.onloads["vae"] == 1


def test_a_component_outside_the_chain_stays_until_the_end() -> None:
    residency = model_offload_residency(
        calls("text_encoder->unet->vae", "text_encoder controlnet unet controlnet unet vae")
    )
    assert residency.phases[-1] == {"controlnet", "vae"}
    assert residency.phases[1] == {"text_encoder", "controlnet"}
    assert residency.onloads == {"text_encoder": 1, "controlnet": 1, "unet": 1, "vae": 1}


def test_neighbours_in_the_chain_called_in_turn_move_every_time() -> None:
    residency = model_offload_residency(
        calls("controlnet->transformer->vae", "controlnet transformer controlnet transformer vae")
    )
    assert Counter(residency.onloads) == Counter(controlnet=2, transformer=1, vae=1)
    assert residency.phases[2] == {"transformer", "controlnet"}


def test_a_name_that_occurs_twice_counts_the_first_time_only() -> None:
    chain = OffloadChain(
        calls("text_encoder->vae->transformer->vae", "text_encoder transformer vae")
    )
    for name in ("text_encoder", "transformer", "vae"):
        chain.call(name)
    assert chain.resident == ["transformer", "vae"]


def test_excluded_components_never_leave() -> None:
    residency = model_offload_residency(
        calls("unet->vae", "unet vae safety_checker", offload_excluded=("safety_checker",))
    )
    assert all("safety_checker" in phase for phase in residency.phases)
    assert "safety_checker" not in residency.onloads


def test_an_excluded_component_that_the_sequence_names_takes_its_turn() -> None:
    chain = OffloadChain(calls("text->prior", "text prior", offload_excluded=("prior",)))
    assert chain.excluded == ()
    chain.call("text")
    assert chain.call("prior") == (("text",), True)


def test_absent_members_are_skipped_in_the_chain() -> None:
    chain = OffloadChain(calls("a->b->c", "a b c"), members=("a", "c"))
    chain.call("a")
    assert chain.call("b") == ((), False)
    assert chain.call("c") == (("a",), True)
