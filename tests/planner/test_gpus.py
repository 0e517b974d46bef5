"""The GPU half of the catalogue: names, figures and the machines made of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipefit.cost_models.machine import Machine
from pipefit.cost_models.serial import from_json, to_json
from pipefit.cost_models.transfers import link_rates, pcie_bytes_per_s
from pipefit.cost_models.units import GIB, MIB
from pipefit.errors import InvalidRequest, UnknownName
from pipefit.planner.catalog import (
    DEFAULT_RAM_BYTES,
    find_gpu,
    gpu_entry,
    gpu_names,
    match_device,
    reference_machine,
)

VARIANTS = [
    (name, device_name) for name in gpu_names() for device_name in gpu_entry(name)["device_names"]
]


def test_the_catalogue_has_179_gpus() -> None:
    assert len(gpu_names()) == len(set(gpu_names())) == 179


def test_every_name_and_alias_finds_its_own_entry() -> None:
    owner = {
        spelling: name for name in gpu_names() for spelling in (name, *gpu_entry(name)["aliases"])
    }
    assert {spelling: find_gpu(spelling).name for spelling in owner} == owner
    shouted = {spelling.upper().replace("-", " "): name for spelling, name in owner.items()}
    assert {spelling: find_gpu(spelling).name for spelling in shouted} == shouted


def test_no_alias_is_listed_twice() -> None:
    spellings = [*gpu_names(), *(a for name in gpu_names() for a in gpu_entry(name)["aliases"])]
    assert len(spellings) == len(set(spellings))


def test_every_device_name_with_its_memory_finds_its_own_entry() -> None:
    found = [
        (matched.name, device_name)
        for name, device_name in VARIANTS
        if (matched := match_device(device_name, find_gpu(name).total_bytes))
    ]
    assert found == VARIANTS


def test_windows_reports_the_whole_memory_and_still_finds_the_entry() -> None:
    found = []
    for name, device_name in VARIANTS:
        memory = gpu_entry(name)["memory"]
        matched = match_device(device_name, memory.get("nvml_bytes", memory["marketed_bytes"]))
        found.append((matched and matched.name, device_name))
    assert found == VARIANTS


def test_a_device_name_alone_finds_a_card_of_that_name() -> None:
    for _, device_name in VARIANTS:
        assert device_name in gpu_entry(find_gpu(device_name).name)["device_names"]
        assert match_device(device_name, None) == find_gpu(device_name)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("4060ti16", "rtx-4060-ti-16gb"),
        ("RTX 4060 Ti 16GB", "rtx-4060-ti-16gb"),
        ("NVIDIA GeForce RTX 4060 Ti", "rtx-4060-ti-8gb"),
        ("geforce rtx 4060", "rtx-4060"),
        ("RTX_4060", "rtx-4060"),
        ("4090", "rtx-4090"),
        ("rtx 4090 24 GB", "rtx-4090"),
        ("RTX 4090 D", "rtx-4090-d"),
        ("rtx 4090 laptop", "rtx-4090-laptop"),
        ("rtx 4090 mobile", "rtx-4090-laptop"),
        ("3060", "rtx-3060-12gb"),
        ("3060 8 GiB", "rtx-3060-8gb"),
        ("a100", "a100-80gb"),
        ("A100-SXM4-80GB", "a100-80gb"),
        ("A100-PCIE-40GB", "a100-40gb-pcie"),
        ("h100", "h100-sxm"),
        ("Tesla T4", "t4"),
        ("a10g", "a10g"),
        ("a10", "a10"),
        ("gb200", "gb200"),
        ("Radeon RX 7900 XTX", "rx-7900-xtx"),
        ("7900xtx", "rx-7900-xtx"),
        ("Intel Arc B580", "arc-b580"),
        ("m2 max 96gb", "apple-m2-max"),
    ],
)
def test_names_are_forgiving(written: str, name: str) -> None:
    assert find_gpu(written).name == name


@pytest.mark.parametrize(
    "written",
    ["rtx 6000", "RTX 4090 Ti", "RTX 4060 16GB", "rtx", "", "nvidia", "40", "RTX 4090 D2"],
)
def test_a_name_is_never_matched_in_part(written: str) -> None:
    with pytest.raises(UnknownName):
        find_gpu(written)


@pytest.mark.parametrize(
    "device_name",
    ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "GRID T4-8Q", "NVIDIA GeForce RTX 4090 D v2", "llvmpipe"],
)
def test_slices_and_strangers_match_no_device(device_name: str) -> None:
    assert match_device(device_name, 8 * GIB) is None


def test_an_unknown_name_offers_the_closest() -> None:
    with pytest.raises(UnknownName, match=r"no GPU called 'RTX 4099': did you mean rtx-40"):
        find_gpu("RTX 4099")


@given(st.text(max_size=40))
def test_any_text_finds_a_gpu_or_is_an_unknown_name(text: str) -> None:
    matched = match_device(text, 8 * GIB)
    assert matched is None or matched.name in gpu_names()
    try:
        found = find_gpu(text)
    except UnknownName:
        return
    assert found.name in gpu_names()


def test_figures_of_every_entry_are_plausible_together() -> None:
    for name in gpu_names():
        gpu, entry = find_gpu(name), gpu_entry(name)
        marketed_bytes = entry["memory"]["marketed_bytes"]
        assert 0.6 * marketed_bytes < gpu.total_bytes <= marketed_bytes, name
        assert gpu.free_bytes == gpu.total_bytes
        assert 5e10 < gpu.memory_bytes_per_s < 1e13, name
        assert gpu.flops_per_s["float16"] >= gpu.flops_per_s["float32"] > 1e12, name
        assert (gpu.compute_capability is None) == (entry["vendor"] != "NVIDIA"), name
        assert gpu.unified_memory == ("host_link" not in entry), name
        assert set(gpu.provenance.values()) == {"catalogue"}
        assert entry["confidence"] in ("high", "medium", "low")
        assert entry["source"] in gpu.sources


def test_the_stated_host_link_is_what_generation_and_lanes_imply() -> None:
    links = [gpu_entry(name).get("host_link", {}) for name in gpu_names()]
    pcie = [link for link in links if link.get("kind") == "pcie"]
    assert len(pcie) == 160
    for link in pcie:
        implied = pcie_bytes_per_s(link["generation"], link["lanes"])
        assert link["bytes_per_s"] == pytest.approx(implied, rel=0.01)


def test_only_a_link_other_than_pcie_fixes_the_rate_of_a_card() -> None:
    fixed = {name for name in gpu_names() if find_gpu(name).h2d_pinned_bytes_per_s}
    assert fixed == {"gh200", "gb200"}
    assert find_gpu("gh200").h2d_pinned_bytes_per_s == pytest.approx(360e9)


def test_geforce_like_parts_accumulate_at_half_rate() -> None:
    for name in ("rtx-4090", "rtx-2080-ti", "a10g", "l40", "l20"):
        assert find_gpu(name).half_rate_accumulate, name
    for name in ("a100", "rtx-a6000", "l40s", "t4", "gtx-1080"):
        assert not find_gpu(name).half_rate_accumulate, name


def test_a_known_card_has_its_data_sheet_figures() -> None:
    gpu = find_gpu("rtx-4060")
    assert gpu.total_bytes == 7807 * MIB
    assert gpu.compute_capability == (8, 9)
    assert gpu.memory_bytes_per_s == 272e9
    assert gpu.flops_per_s["bfloat16"] == 30.23e12
    assert (gpu.pcie_generation, gpu.pcie_lanes, gpu.num_sms, gpu.tdp_w) == (4, 8, 24, 115)
    assert (gpu.architecture, gpu.server) == ("ada", False)


def test_a_machine_says_what_ram_it_assumes() -> None:
    machine = reference_machine(["rtx-4060"])
    assert machine.host.total_bytes == DEFAULT_RAM_BYTES
    assert machine.host.pinnable_bytes < machine.host.available_bytes < machine.host.total_bytes
    assert "64.00 GiB is assumed" in machine.notes[0]
    assert reference_machine(["rtx-4060"], ram_bytes=16 * GIB).notes == ()


def test_a_slot_narrows_a_card_but_never_widens_it() -> None:
    narrow = reference_machine(["rtx-4090"], pcie=(3, 8)).gpus[0]
    assert (narrow.pcie_generation, narrow.pcie_lanes) == (3, 8)
    wide = reference_machine(["rtx-4060"], pcie=(5, 16)).gpus[0]
    assert (wide.pcie_generation, wide.pcie_lanes) == (4, 8)
    assert (
        narrow.h2d_pinned_bytes_per_s < reference_machine(["4090"]).gpus[0].h2d_pinned_bytes_per_s
    )


@given(st.lists(st.sampled_from(gpu_names()), min_size=1, max_size=4))
def test_rates_of_a_machine_are_those_of_its_links(names: list[str]) -> None:
    for index, gpu in enumerate(reference_machine(names).gpus):
        assert gpu.index == index
        assert 0 < gpu.h2d_pageable_bytes_per_s <= gpu.h2d_pinned_bytes_per_s
        assert link_rates(gpu).h2d_pinned_bytes_per_s == gpu.h2d_pinned_bytes_per_s


@given(st.lists(st.sampled_from(gpu_names()), min_size=1, max_size=3))
def test_a_machine_survives_json(names: list[str]) -> None:
    machine = reference_machine(names)
    assert from_json(Machine, to_json(machine)) == machine


def test_only_parts_sold_with_nvlink_to_their_neighbours_are_linked() -> None:
    assert len(reference_machine(["h100-sxm"] * 4).links) == 6
    assert reference_machine(["rtx-3090"] * 2).links == ()
    assert reference_machine(["h100-sxm", "a100"]).links == ()


def test_an_integrated_gpu_shares_the_memory_of_its_host() -> None:
    machine = reference_machine(["m2 max 96gb"])
    assert machine.host.total_bytes == 96 * GIB
    assert machine.gpus[0].total_bytes == 72 * GIB
    smaller = reference_machine(["m2 max"], ram_bytes=30 * GIB)
    assert smaller.gpus[0].total_bytes == 20 * GIB


@pytest.mark.parametrize("name", ["apple-m3", "gh200"])
def test_a_pcie_slot_for_a_gpu_without_one_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="leave --pcie out"):
        reference_machine([name], pcie=(4, 16))


@pytest.mark.parametrize("pcie", [(9, 16), (4, 0)])
def test_a_slot_that_does_not_exist_is_refused(pcie: tuple[int, int]) -> None:
    with pytest.raises(InvalidRequest, match="PCIe"):
        reference_machine(["rtx-4060"], pcie=pcie)


def test_a_machine_without_a_gpu_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="at least one"):
        reference_machine([])


def test_a_server_may_page_lock_all_that_is_available() -> None:
    host = reference_machine(["a100-80gb"]).host
    assert host.pinnable_bytes == host.available_bytes
