"""Probing: at the C boundary for NVIDIA, on fabricated trees for the host, on stand-in torches.

The real pynvml loads a library compiled here from nvml_stand_in.c, in a process of its own because
a library once loaded stays loaded.
"""

from __future__ import annotations

import ctypes.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipefit.cost_models.machine import Host, Machine
from pipefit.cost_models.serial import from_json
from pipefit.cost_models.units import GIB, MIB
from pipefit.planner.host import (
    HALF_PINNABLE_SHARE,
    cgroup_cores,
    cgroup_memory_bytes,
    read_host,
)
from pipefit.planner.nvidia import torch_devices, visible_uuids
from pipefit.planner.probe import (
    allocator_settings,
    cpu_machine,
    may_have_other_gpu,
    torch_gpus,
)

ANSWER_REQUESTS = """
import json, os, sys
from pipefit.cost_models.serial import to_json
from pipefit.planner.probe import probe
for line in sys.stdin:
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "PYTORCH_ALLOC_CONF"):
        os.environ.pop(name, None)
    os.environ.update(json.loads(line))
    print(json.dumps([to_json(probe()), "torch" in sys.modules]), flush=True)
"""

RTX_4060 = f"""
gpu GPU-4060aaaa-0000-0000-0000-000000000000 NVIDIA GeForce RTX 4060
memory {8188 * MIB} {381 * MIB} {5000 * MIB}
capability 8 9
link 4 8 1 8
power 115000
cores 3072
clocks 3105 8501
bus 128
"""

RTX_3090 = f"""
gpu GPU-3090bbbb-0000-0000-0000-000000000000 NVIDIA GeForce RTX 3090
memory {24576 * MIB} {450 * MIB} {24100 * MIB}
capability 8 6
link 4 16 4 16
"""

A100 = f"""
gpu GPU-a100cccc-0000-0000-0000-000000000000 NVIDIA A100-SXM4-40GB
memory {40960 * MIB} {600 * MIB} {40300 * MIB}
capability 8 0
link 4 16 4 16
mig 1
slice MIG-11111111-0000-0000-0000-000000000000 NVIDIA A100-SXM4-40GB MIG 3g.20gb
memory {20096 * MIB} {20 * MIB} {20000 * MIB}
sms 42
slice MIG-22222222-0000-0000-0000-000000000000 NVIDIA A100-SXM4-40GB MIG 1g.5gb
memory {4864 * MIB} {10 * MIB} {2800 * MIB}
sms 14
process compute 4242 {2000 * MIB}
"""

Probe = Callable[..., Machine]


@pytest.fixture(scope="session")
def nvml_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0])
    compiler = compiler or shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and Linux to stand in for libnvidia-ml.so.1")
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).parent / "nvml_stand_in.c"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", folder / "libnvidia-ml.so.1", source], check=True
    )
    return folder


@pytest.fixture(scope="session")
def prober(nvml_folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process with the stand-in library that probes once for each line of environment."""
    with subprocess.Popen(
        [sys.executable, "-c", ANSWER_REQUESTS],
        env={**os.environ, "LD_LIBRARY_PATH": str(nvml_folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def probe_with(prober: subprocess.Popen[str], tmp_path: Path) -> Probe:
    """Probe where the NVIDIA driver says what the text says."""

    def probe(driver: str, **environ: str) -> Machine:
        answers = tmp_path / "driver.txt"
        answers.write_text(driver)
        assert prober.stdin is not None
        assert prober.stdout is not None
        print(json.dumps({"NVML_STAND_IN": str(answers), **environ}), file=prober.stdin, flush=True)
        machine, imported_torch = json.loads(prober.stdout.readline())
        assert not imported_torch
        return from_json(Machine, machine)

    return probe


def test_two_gpus_have_the_driver_s_figures_and_the_catalogue_s_rates(probe_with: Probe) -> None:
    machine = probe_with(RTX_4060 + RTX_3090, CUDA_DEVICE_ORDER="PCI_BUS_ID")
    first, second = machine.gpus
    assert (first.name, first.index, first.compute_capability) == ("rtx-4060", 0, (8, 9))
    assert (second.name, second.index, second.compute_capability) == ("rtx-3090", 1, (8, 6))
    assert (first.pcie_generation, first.pcie_lanes, first.tdp_w) == (4, 8, 115.0)
    assert first.flops_per_s["float16"] == pytest.approx(30.23e12, rel=0.01)
    assert first.architecture == "ada"
    assert first.num_sms == 24
    assert first.provenance["total_bytes"] == first.provenance["pcie_lanes"] == "driver"
    assert first.provenance["flops_per_s"] == first.provenance["num_sms"] == "catalogue"
    assert any("550.54.14" in source and "GPU-4060aaaa" in source for source in first.sources)


def test_total_is_cuda_s_without_what_the_driver_keeps(probe_with: Probe) -> None:
    gpu = probe_with(RTX_4060).gpus[0]
    # 7807 MiB is what public torch logs show for this card, 8188 what nvidia-smi shows
    assert gpu.total_bytes == 7807 * MIB


def test_old_driver_s_total_is_completed_from_the_catalogue(probe_with: Probe) -> None:
    gpu = probe_with(RTX_4060 + "fail memory_v2 13").gpus[0]
    assert 7700 * MIB < gpu.total_bytes < 7900 * MIB
    assert gpu.provenance["total_bytes"] == "catalogue"


def test_idle_link_is_planned_at_its_most_and_noted(probe_with: Probe) -> None:
    machine = probe_with(RTX_4060)
    assert machine.gpus[0].pcie_generation == 4
    assert any(
        "GPU 0 (NVIDIA GeForce RTX 4060): the PCIe link rests at generation 1 x8" in note
        for note in machine.notes
    )


def test_other_processes_are_summed_and_this_one_is_not(probe_with: Probe) -> None:
    processes = f"""
    process compute 4242 {1000 * MIB}
    process compute self {1200 * MIB}
    process graphics 4242 {1000 * MIB}
    process graphics 77 {500 * MIB}
    """
    machine = probe_with(RTX_4060 + processes.replace("    ", ""))
    gpu = machine.gpus[0]
    assert gpu.other_bytes == 1500 * MIB
    assert gpu.free_bytes == (5000 + 1200) * MIB
    assert not any("list" in note for note in machine.notes)


def test_memory_of_unlisted_processes_belongs_to_others(probe_with: Probe) -> None:
    machine = probe_with(RTX_4060 + f"process compute 4242 {1000 * MIB}")
    assert machine.gpus[0].other_bytes == (8188 - 381 - 5000) * MIB
    assert any(
        "1.76 GiB are held by processes that the driver does not list" in note
        for note in machine.notes
    )


@pytest.mark.parametrize("obstacle", ["fail processes 4", "process compute 4242 -1"])
def test_without_per_process_figures_all_in_use_counts_as_others(
    probe_with: Probe, obstacle: str
) -> None:
    machine = probe_with(RTX_4060 + obstacle)
    assert machine.gpus[0].other_bytes == (8188 - 381 - 5000) * MIB
    assert any("does not tell how much each process holds" in note for note in machine.notes)


def test_unsupported_figures_come_from_the_catalogue(probe_with: Probe) -> None:
    bare = f"gpu GPU-1 NVIDIA GeForce RTX 4060\nmemory {8188 * MIB} 0 {8000 * MIB}\n"
    machine = probe_with(bare + "fail capability 3\nfail mig 3\nfail uuid 3")
    gpu = machine.gpus[0]
    assert (gpu.pcie_generation, gpu.pcie_lanes, gpu.compute_capability) == (4, 8, (8, 9))
    assert gpu.provenance["compute_capability"] == "catalogue"
    assert any("does not tell its PCIe link" in note for note in machine.notes)


def test_gpu_without_memory_of_its_own_uses_the_host_s(probe_with: Probe) -> None:
    machine = probe_with("gpu GPU-1 NVIDIA GB10\ncapability 12 1\nfail memory 3")
    gpu = machine.gpus[0]
    assert gpu.unified_memory
    assert gpu.total_bytes == machine.host.total_bytes
    assert any("host's RAM" in note for note in machine.notes)


@pytest.mark.parametrize("failing", ["handle", "memory"])
def test_lost_gpu_is_noted_and_the_other_stays(probe_with: Probe, failing: str) -> None:
    machine = probe_with(RTX_4060 + f"fail {failing} 15\n" + RTX_3090)
    assert [(gpu.name, gpu.index) for gpu in machine.gpus] == [("rtx-3090", 0)]
    assert any("GPU 0" in note and "left out" in note for note in machine.notes)


def test_unknown_gpu_is_described_by_its_counts_and_clocks(probe_with: Probe) -> None:
    machine = probe_with(RTX_4060.replace("GeForce RTX 4060", "GeForce RTX 9999"))
    gpu = machine.gpus[0]
    assert (gpu.name, gpu.architecture, gpu.num_sms) == ("NVIDIA GeForce RTX 9999", "ada", 24)
    assert gpu.memory_bytes_per_s == pytest.approx(272e9, rel=0.001)
    assert gpu.flops_per_s == {"float32": pytest.approx(2 * 3072 * 3.105e9)}
    assert any("RTX 9999" in note and "calibrat" in note for note in machine.notes)


def test_cuda_uses_the_first_slice_alone(probe_with: Probe) -> None:
    machine = probe_with(A100)
    gpu = machine.gpus[0]
    assert len(machine.gpus) == 1
    assert gpu.name == "NVIDIA A100-SXM4-40GB MIG 3g.20gb"
    assert any("MIG-22222222" in note and "one MIG slice alone" in note for note in machine.notes)


def test_slice_owns_its_memory_and_its_share_of_the_rates(probe_with: Probe) -> None:
    gpu = probe_with(A100, CUDA_VISIBLE_DEVICES="MIG-2222").gpus[0]
    assert (gpu.total_bytes, gpu.other_bytes) == (4854 * MIB, 2000 * MIB)
    assert (gpu.num_sms, gpu.compute_capability) == (14, (8, 0))
    assert gpu.flops_per_s["float16"] == pytest.approx(312e12 * 14 / 108, rel=0.01)
    assert gpu.memory_bytes_per_s == pytest.approx(1555e9 / 8, rel=0.06)


def test_gpu_cut_into_no_slice_is_noted(probe_with: Probe) -> None:
    machine = probe_with(RTX_3090 + "mig 1")
    assert machine.gpus == ()
    assert any("without a slice" in note for note in machine.notes)


def test_visible_order_is_torch_s(probe_with: Probe) -> None:
    machine = probe_with(RTX_4060 + RTX_3090, CUDA_VISIBLE_DEVICES="GPU-3090,GPU-4060")
    assert [(gpu.name, gpu.index) for gpu in machine.gpus] == [("rtx-3090", 0), ("rtx-4060", 1)]


def test_hidden_gpus_are_named(probe_with: Probe) -> None:
    machine = probe_with(RTX_4060 + RTX_3090, CUDA_VISIBLE_DEVICES="")
    assert machine.gpus == ()
    assert any("hides NVIDIA GeForce RTX 4060 (GPU-4060" in note for note in machine.notes)


def test_order_of_unlike_gpus_is_doubted_only_where_cuda_may_sort(probe_with: Probe) -> None:
    def doubted(**environ: str) -> bool:
        notes = probe_with(RTX_4060 + RTX_3090, **environ).notes
        return any("CUDA_DEVICE_ORDER" in note for note in notes)

    assert doubted()
    assert not doubted(CUDA_DEVICE_ORDER="PCI_BUS_ID")
    assert not doubted(CUDA_VISIBLE_DEVICES="GPU-3090")


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (18, "different versions"),
        (9, "kernel module is not loaded"),
        (4, "permissions of /dev/nvidiactl"),
        (999, "does not answer"),
    ],
)
def test_driver_trouble_is_one_clear_line(probe_with: Probe, code: int, line: str) -> None:
    machine = probe_with(RTX_4060 + f"init {code}")
    assert machine.gpus == ()
    assert len(machine.notes) == 1
    assert line in machine.notes[0]


def test_driver_without_a_gpu_is_noted(probe_with: Probe) -> None:
    assert probe_with("driver 550.54.14").notes == ("The NVIDIA driver is loaded but has no GPU.",)


def test_missing_library_is_noted(tmp_path: Path) -> None:
    if ctypes.util.find_library("nvidia-ml") or may_have_other_gpu():
        pytest.skip("this machine has a GPU")
    run = subprocess.run(
        [sys.executable, "-c", ANSWER_REQUESTS],
        input="{}\n",
        capture_output=True,
        text=True,
        check=True,
    )
    machine = from_json(Machine, json.loads(run.stdout)[0])
    assert machine.gpus == ()
    assert "libnvidia-ml.so.1 is not installed" in machine.notes[0]
    assert run.stderr == ""


WHOLE_GPUS = [("GPU-aa11", ()), ("GPU-ab22", ()), ("GPU-cc33", ())]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ["GPU-aa11", "GPU-ab22", "GPU-cc33"]),
        ("", []),
        ("2,0", ["GPU-cc33", "GPU-aa11"]),
        ("0,-1,1", ["GPU-aa11"]),
        ("-1", []),
        ("1,9,0", ["GPU-ab22"]),
        ("1,one,0", ["GPU-ab22"]),
        ("1,1", []),
        ("GPU-cc,GPU-aa11", ["GPU-cc33", "GPU-aa11"]),
        ("GPU-a", []),
        ("GPU-cc,1", ["GPU-cc33"]),
        ("0,GPU-cc", ["GPU-aa11"]),
        ("GPU-cc,GPU-zz,GPU-aa", ["GPU-cc33"]),
        ("MIG-1", []),
        ("none", []),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(value: str | None, expected: list) -> None:
    assert list(visible_uuids(value, WHOLE_GPUS)) == expected


def test_one_slice_hides_whole_gpus_and_other_slices() -> None:
    gpus = [("GPU-a", ()), ("GPU-b", ("MIG-1", "MIG-2"))]
    assert visible_uuids("0", gpus) == ("GPU-a",)
    assert visible_uuids("0,1", gpus) == ("MIG-1",)
    assert visible_uuids("GPU-b", gpus) == ("MIG-1",)
    assert visible_uuids("MIG-2,MIG-1", gpus) == ("MIG-2",)


ENTRIES = st.one_of(
    st.integers(-1, 4).map(str),
    st.sampled_from(["GPU-a", "GPU-aa", "GPU-ab22", "GPU-cc33", "GPU-", "1gpu2", " 2", "x", ""]),
)


@given(entries=st.lists(ENTRIES, max_size=5))
def test_visible_devices_are_distinct_and_stop_at_minus_one(entries: list[str]) -> None:
    value = ",".join(entries)
    visible = visible_uuids(value, WHOLE_GPUS)
    assert len(set(visible)) == len(visible)
    assert visible_uuids(value + ",-1,0,1,2", WHOLE_GPUS) == visible


@given(value=st.text(max_size=30))
def test_no_text_in_the_variable_is_an_error(value: str) -> None:
    assert set(visible_uuids(value, WHOLE_GPUS)) <= {uuid for uuid, _ in WHOLE_GPUS}


@given(order=st.permutations(range(3)))
def test_indices_and_uuids_name_the_same_gpus(order: list[int]) -> None:
    by_index = visible_uuids(",".join(map(str, order)), WHOLE_GPUS)
    by_uuid = visible_uuids(",".join(WHOLE_GPUS[number][0] for number in order), WHOLE_GPUS)
    assert by_index == by_uuid == tuple(WHOLE_GPUS[number][0] for number in order)


def stand_in_torch(**parts: Any) -> SimpleNamespace:
    """What torch's modules answer on a machine that has only the devices in *parts*."""
    absent = SimpleNamespace(is_available=lambda: False, is_initialized=lambda: False)
    found = {"cuda": absent, "xpu": absent, "mps": absent, "hip": None, **parts}
    return SimpleNamespace(
        cuda=found["cuda"],
        xpu=found["xpu"],
        mps=found["mps"],
        backends=SimpleNamespace(mps=found["mps"]),
        version=SimpleNamespace(hip=found["hip"], cuda=None if found["hip"] else "12.8"),
    )


def torch_gpu(name: str, total_bytes: int, free_bytes: int, **more: Any) -> SimpleNamespace:
    properties = SimpleNamespace(name=name, total_memory=total_bytes, **more)
    return SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        get_device_properties=lambda index: properties,
        mem_get_info=lambda index: (free_bytes, total_bytes),
        memory_reserved=lambda index: GIB,
    )


HOST = Host(total_bytes=64 * GIB, available_bytes=20 * GIB, pinnable_bytes=20 * GIB)


def test_amd_gpus_are_read_through_torch() -> None:
    rocm = torch_gpu("AMD Instinct MI300X", 192 * GIB, 100 * GIB, is_integrated=0)
    (gpu,), notes = torch_gpus(stand_in_torch(cuda=rocm, hip="6.4"), HOST)
    assert (gpu.name, gpu.total_bytes, gpu.free_bytes) == ("mi300x", 192 * GIB, 101 * GIB)
    assert gpu.compute_capability is None
    assert gpu.flops_per_s["bfloat16"] == pytest.approx(1307e12, rel=0.01)
    assert notes == ()


def test_integrated_gpu_has_no_more_free_than_its_total() -> None:
    # a Radeon 8060S answered free 120 of total 62.47 GiB, unslothai/unsloth#7960
    rocm = torch_gpu("Unheard-of Radeon", 62 * GIB, 120 * GIB, is_integrated=1)
    (gpu,), notes = torch_gpus(stand_in_torch(cuda=rocm, hip="7.1"), HOST)
    assert gpu.unified_memory
    assert gpu.free_bytes == gpu.total_bytes == 62 * GIB
    assert "calibrat" in notes[0]


def test_nvidia_without_nvml_is_read_through_torch_and_noted() -> None:
    cuda = torch_gpu("NVIDIA L4", 22 * GIB, 20 * GIB, is_integrated=0, major=8, minor=9)
    (gpu,), notes = torch_gpus(stand_in_torch(cuda=cuda), HOST)
    assert (gpu.name, gpu.compute_capability) == ("l4", (8, 9))
    assert "what other processes hold" in notes[0]


def test_intel_gpus_are_read_through_torch() -> None:
    xpu = torch_gpu("Intel(R) Arc(TM) B580 Graphics", 12 * GIB, 10 * GIB, driver_version="1.6")
    (gpu,), _ = torch_gpus(stand_in_torch(xpu=xpu), HOST)
    assert (gpu.name, gpu.free_bytes) == ("arc-b580", 11 * GIB)


def test_apple_gpu_takes_what_metal_recommends_of_the_host_s_ram() -> None:
    mps = SimpleNamespace(
        is_available=lambda: True,
        get_name=lambda: "Apple M3 Max",
        recommended_max_memory=lambda: 48 * GIB,
        driver_allocated_memory=lambda: GIB,
    )
    (gpu,), _ = torch_gpus(stand_in_torch(mps=mps), HOST)
    assert (gpu.name, gpu.total_bytes, gpu.free_bytes) == ("apple-m3-max", 48 * GIB, 21 * GIB)
    assert gpu.unified_memory


def test_gpu_that_torch_cannot_read_is_a_note() -> None:
    def broken(index: int) -> None:
        raise RuntimeError("hipErrorNoDevice")

    rocm = torch_gpu("AMD Instinct MI300X", GIB, GIB)
    rocm.get_device_properties = broken
    gpus, notes = torch_gpus(stand_in_torch(cuda=rocm, hip="6.4"), HOST)
    assert gpus == ()
    assert "hipErrorNoDevice" in notes[0]


def test_torch_s_devices_are_asked_only_after_it_initialised_cuda() -> None:
    cuda = torch_gpu("NVIDIA L4", 22 * GIB, 20 * GIB, uuid="AA11-22")
    assert torch_devices(stand_in_torch(cuda=cuda))["aa11-22"].total_bytes == 22 * GIB
    cuda.is_initialized = lambda: False
    assert torch_devices(stand_in_torch(cuda=cuda)) == {}
    assert torch_devices(None) == {}


TORCH_SCRIPT = """
import json, sys
from types import SimpleNamespace
names = {order!r}
def properties(index):
    return SimpleNamespace(uuid=names[index], total_memory=7_000_000_000 + index)
sys.modules["torch"] = SimpleNamespace(
    version=SimpleNamespace(cuda="12.8", hip=None),
    cuda=SimpleNamespace(is_initialized=lambda: True, device_count=lambda: len(names),
                         get_device_properties=properties, memory_reserved=lambda index: 500 << 20),
)
from pipefit.cost_models.serial import to_json
from pipefit.planner.probe import probe
json.dump(to_json(probe()), sys.stdout)
"""


def test_initialised_torch_settles_order_totals_and_own_memory(
    nvml_folder: Path, tmp_path: Path
) -> None:
    answers = tmp_path / "driver.txt"
    answers.write_text(RTX_4060 + f"process compute 99999 {2807 * MIB}\n" + RTX_3090)
    order = [f"{name}-0000-0000-0000-000000000000" for name in ("3090bbbb", "4060aaaa")]
    run = subprocess.run(
        [sys.executable, "-c", TORCH_SCRIPT.format(order=order)],
        env={**os.environ, "NVML_STAND_IN": str(answers), "LD_LIBRARY_PATH": str(nvml_folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    machine = from_json(Machine, json.loads(run.stdout))
    assert [gpu.name for gpu in machine.gpus] == ["rtx-3090", "rtx-4060"]
    assert [gpu.total_bytes for gpu in machine.gpus] == [7_000_000_000, 7_000_000_001]
    # in a container the driver lists this process under a number that it does not know as its own
    assert machine.gpus[1].other_bytes == (2807 - 500) * MIB
    assert machine.gpus[1].free_bytes == (5000 + 500) * MIB


@pytest.mark.parametrize(
    ("node", "expected"), [("dev/kfd", True), ("dev/nvidiactl", True), ("dev/null", False)]
)
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's device nodes")
def test_torch_is_worth_importing_where_a_gpu_s_node_is(
    tmp_path: Path, node: str, expected: bool
) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / node).touch()
    assert may_have_other_gpu(tmp_path) is expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's sysfs")
def test_intel_gpu_is_found_by_its_vendor(tmp_path: Path) -> None:
    write_tree(tmp_path, {"sys/class/drm/card0/device/vendor": "0x8086\n"})
    assert may_have_other_gpu(tmp_path)


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_without_a_control_group_nothing_is_limited(tmp_path: Path) -> None:
    memory = psutil.virtual_memory()
    host = read_host(tmp_path)
    assert host.total_bytes == memory.total
    assert cgroup_cores(tmp_path) == float("inf")
    assert host.num_cores >= 1


def test_smallest_limit_of_the_nested_groups_counts(tmp_path: Path) -> None:
    write_tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/slice/job\n",
            "sys/fs/cgroup/slice/memory.max": "1000000\n",
            "sys/fs/cgroup/slice/memory.current": "900000\n",
            "sys/fs/cgroup/slice/memory.stat": "inactive_file 200000\nactive_file 50000\n",
            "sys/fs/cgroup/slice/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/slice/job/memory.max": "max\n",
            "sys/fs/cgroup/slice/job/memory.high": "800000\n",
            "sys/fs/cgroup/slice/job/memory.current": "100000\n",
            "sys/fs/cgroup/slice/job/cpu.max": "max 100000\n",
        },
    )
    # the job itself may still take 700,000, but its slice has only this left
    assert cgroup_memory_bytes(tmp_path) == (800_000, 1_000_000 - (900_000 - 250_000))
    assert cgroup_cores(tmp_path) == 1.5
    host = read_host(tmp_path, pinnable_share=HALF_PINNABLE_SHARE)
    assert (host.total_bytes, host.available_bytes) == (800_000, 350_000)
    assert host.pinnable_bytes == 350_000


def test_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    write_tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "1000\n",
            "sys/fs/cgroup/memory.current": "1500\n",
        },
    )
    assert cgroup_memory_bytes(tmp_path) == (1000, 0)


def test_version_one_groups_are_read(tmp_path: Path) -> None:
    write_tree(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/ab\n3:cpu,cpuacct:/docker/ab\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "5000\n",
            "sys/fs/cgroup/memory/docker/ab/memory.limit_in_bytes": "2000\n",
            "sys/fs/cgroup/memory/docker/ab/memory.usage_in_bytes": "1500\n",
            "sys/fs/cgroup/memory/docker/ab/memory.stat": "total_inactive_file 300\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/ab/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/ab/cpu.cfs_period_us": "100000\n",
        },
    )
    assert cgroup_memory_bytes(tmp_path) == (2000, 800)
    assert cgroup_cores(tmp_path) == 2


@pytest.mark.parametrize("path", ["/docker/not-in-this-mount", "/../../elsewhere"])
def test_group_of_another_namespace_is_read_at_the_mount(tmp_path: Path, path: str) -> None:
    write_tree(
        tmp_path,
        {
            "proc/self/cgroup": f"0::{path}\n",
            "sys/fs/cgroup/memory.max": "1000\n",
            "elsewhere/memory.max": "1\n",
        },
    )
    assert cgroup_memory_bytes(tmp_path)[0] == 1000


def test_cpu_stands_for_a_gpu_without_context() -> None:
    machine = cpu_machine()
    (cpu,) = machine.gpus
    assert (cpu.architecture, cpu.context_bytes) == ("cpu", 0)
    assert cpu.total_bytes == machine.host.total_bytes
    assert 0 < cpu.free_bytes <= cpu.total_bytes


# -- how torch will allocate


def test_growing_segments_are_read_from_the_environment(probe_with: Probe) -> None:
    assert not probe_with(RTX_4060).gpus[0].expandable_segments
    machine = probe_with(RTX_4060, PYTORCH_ALLOC_CONF="expandable_segments:True")
    assert machine.gpus[0].expandable_segments


@pytest.mark.parametrize(
    ("environ", "expandable", "named"),
    [
        ({}, False, ()),
        ({"PYTORCH_ALLOC_CONF": " expandable_segments : True "}, True, ()),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, False, ()),
        (
            {"PYTORCH_ALLOC_CONF": "roundup_power2_divisions:[256:1,>:4],expandable_segments:True"},
            True,
            ("roundup_power2_divisions",),
        ),
        # the older name hides the newer, seen with torch 2.13 in _accelerator_getAllocatorSettings
        (
            {
                "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512,garbage_collection_threshold:0.6",
                "PYTORCH_ALLOC_CONF": "expandable_segments:True",
            },
            False,
            ("max_split_size_mb", "garbage_collection_threshold"),
        ),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, False, ("cudaMallocAsync",)),
        ({"PYTORCH_ALLOC_CONF": "backend:native,per_process_memory_fraction:0.5"}, False, ()),
    ],
)
def test_allocator_settings_are_followed_or_named(
    environ: dict[str, str], expandable: bool, named: tuple[str, ...]
) -> None:
    found, notes = allocator_settings(environ, "linux")
    assert found == expandable
    assert len(notes) == len(named)
    assert all(name in note for name, note in zip(named, notes, strict=True))


def test_segments_grow_on_linux_only() -> None:
    settings = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert allocator_settings(settings, "win32") == (False, ())
