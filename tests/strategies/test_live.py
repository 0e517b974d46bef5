"""The private names of diffusers and accelerate that undoing relies on are where we look."""

from __future__ import annotations

from typing import Any

import accelerate
import diffusers
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers.hooks import group_offloading, layerwise_casting
from diffusers.models import attention, attention_dispatch
from tests.small_pipelines import SMALL_PIPELINES

from pipefit.errors import UnsupportedPipeline
from pipefit.strategies.live import (
    ACCELERATE_HOOK,
    CHUNKING_ATTRIBUTES,
    DIFFUSERS_HOOKS,
    GROUP_OFFLOADING_HOOKS,
    LAYERWISE_CASTING_HOOK,
    OFFLOAD_ATTRIBUTES,
    PROGRESS_BAR,
    attention_registry,
    diffusers_hook,
    execution_device,
    hook_restorer,
    hooks_of,
    reads_flag,
    remove_group_offloading,
    without_progress_bar,
)

VERSIONS = f"diffusers {diffusers.__version__}, accelerate {accelerate.__version__}"


def test_blocks_keep_the_size_of_their_parts_where_we_look() -> None:
    block = attention.BasicTransformerBlock(4, 1, 4)
    before = {key: value for key, value in vars(block).items() if "chunk" in key}
    block.set_chunk_feed_forward(2, dim=1)
    assert tuple(before) == CHUNKING_ATTRIBUTES, VERSIONS
    assert [getattr(block, name) for name in CHUNKING_ATTRIBUTES] == [2, 1], VERSIONS


def test_pipelines_keep_what_their_progress_bar_is_given_where_we_look() -> None:
    pipe = SMALL_PIPELINES["flux"]()
    before = dict(vars(pipe))
    pipe.set_progress_bar_config(disable=True, leave=False)
    new = {key for key, value in vars(pipe).items() if before.get(key) != value}
    assert new == {PROGRESS_BAR}, VERSIONS
    restore = without_progress_bar(pipe)
    assert pipe.progress_bar(total=1).disable, VERSIONS
    restore()
    assert getattr(pipe, PROGRESS_BAR) == {"disable": True, "leave": False}, VERSIONS


def test_group_offloading_registers_under_the_names_that_we_remove() -> None:
    names = {
        value
        for key, value in vars(group_offloading).items()
        if key in ("_GROUP_OFFLOADING", "_LAYER_EXECUTION_TRACKER")
        or key == "_LAZY_PREFETCH_GROUP_OFFLOADING"
    }
    assert names == set(GROUP_OFFLOADING_HOOKS), VERSIONS
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    group_offloading.apply_group_offloading(module, "cpu", offload_type="leaf_level")
    assert hasattr(module[0], DIFFUSERS_HOOKS), VERSIONS
    assert hooks_of(module) == {"0": ("group_offloading",)}, VERSIONS


def test_layerwise_casting_registers_under_the_name_that_we_look_for() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    layerwise_casting.apply_layerwise_casting(module, torch.float8_e4m3fn, torch.bfloat16)
    hook = diffusers_hook(module[0], LAYERWISE_CASTING_HOOK)
    assert hook.compute_dtype == torch.bfloat16, VERSIONS
    assert diffusers_hook(module, LAYERWISE_CASTING_HOOK) is None


def test_accelerate_keeps_its_hook_where_we_look() -> None:
    module = add_hook_to_module(torch.nn.Linear(2, 2), AlignDevicesHook())
    add_hook_to_module(module, AlignDevicesHook(), append=True)
    assert hasattr(module, ACCELERATE_HOOK), VERSIONS
    assert hooks_of(module) == {"": ("AlignDevicesHook", "AlignDevicesHook")}, VERSIONS


def test_a_pipeline_computes_where_we_look() -> None:
    pipe = SMALL_PIPELINES["pixart_sigma"]()
    assert execution_device(pipe) == torch.device("cpu"), VERSIONS
    assert execution_device(pipe.to("meta")) == torch.device("meta"), VERSIONS


def test_offloading_writes_the_attributes_that_we_restore() -> None:
    pipe = SMALL_PIPELINES["pixart_sigma"]()
    before = set(vars(pipe))
    pipe.enable_model_cpu_offload(device="cpu")
    assert set(vars(pipe)) - before == set(OFFLOAD_ATTRIBUTES), VERSIONS


def test_an_attention_registry_that_has_moved_is_named_with_the_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert attention_registry() is attention_dispatch._AttentionBackendRegistry, VERSIONS
    monkeypatch.delattr(attention_dispatch, "_AttentionBackendRegistry")
    with pytest.raises(UnsupportedPipeline, match=f"diffusers {diffusers.__version__} keeps"):
        attention_registry()


def test_removing_hooks_leaves_no_forward_on_the_instance() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    restore = hook_restorer(module)
    group_offloading.apply_group_offloading(module, "cpu", offload_type="leaf_level")
    remove_group_offloading(module)
    assert "forward" in vars(module[0]), f"{VERSIONS}: the library restores forward itself now"
    restore()
    assert all("forward" not in vars(part) for part in module.modules())
    assert not any(hasattr(part, DIFFUSERS_HOOKS) for part in module.modules())


def test_a_forward_that_somebody_had_replaced_is_put_back() -> None:
    module = torch.nn.Linear(2, 2)

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    module.forward = doubled  # type: ignore[method-assign]
    restore = hook_restorer(module)
    add_hook_to_module(module, AlignDevicesHook())
    accelerate.hooks.remove_hook_from_module(module)
    restore()
    assert vars(module)["forward"] is doubled


class Base:
    def switch_on(self) -> None:
        self.flag = True


class Reader(Base):
    def decode(self) -> Any:
        return [1 for _ in range(2) if self.flag]


def test_a_flag_is_read_where_a_method_looks_at_it() -> None:
    assert not reads_flag(Base, "flag")
    assert reads_flag(Reader, "flag")
