"""What is here: the GPUs as torch numbers them, the host, and what could not be found out.

The driver's figures come first; what a driver does not tell (rates, SMs, caches) is the GPU
catalogue's, and ``Gpu.provenance`` says which is which. Nothing that goes wrong here raises: a
machine without a driver is still a machine to plan for, and the reason stands in its notes.

Transfer rates stay 0 unless they are known better than from the PCIe link:
``pipefit.cost_models.transfers.link_rates`` derives them from generation and lanes.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipefit.cost_models.machine import Gpu, Host, Machine, Provenance
from pipefit.planner.host import HALF_PINNABLE_SHARE, WHOLE_PINNABLE_SHARE, read_host
from pipefit.planner.nvidia import NvidiaDevice, is_wddm, read_nvidia

CORES_PER_SM = {(6, 0): 64, (6, 1): 128, (7, 0): 64, (7, 5): 64, (8, 0): 64}
"""CUDA cores in an SM by compute capability; 128 in every later one.
https://docs.nvidia.com/cuda/cuda-c-programming-guide/#arithmetic-instructions, 32-bit additions."""

LATER_CORES_PER_SM = 128
"""See :data:`CORES_PER_SM`."""

ARCHITECTURES = {
    (6, 0): "pascal",
    (7, 0): "volta",
    (7, 5): "turing",
    (8, 0): "ampere",
    (8, 9): "ada",
    (9, 0): "hopper",
    (10, 0): "blackwell",
}
"""Architecture by the compute capability it starts with. https://developer.nvidia.com/cuda-gpus"""

INTEL_PCI_VENDOR = "0x8086"
"""Intel's vendor number as sysfs prints it. https://pci-ids.ucw.cz/read/PC/8086"""


ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Where torch reads its allocator's settings; the first that is set counts alone.
``CUDAAllocatorConfig::instance`` in c10/cuda/CUDAAllocatorConfig.h, torch 2.13."""

UNMODELLED_SETTINGS = (
    "max_split_size_mb",
    "garbage_collection_threshold",
    "roundup_power2_divisions",
    "large_segment_size_mb",
    "pinned_max_round_threshold_mb",
    "pinned_max_cached_size_mb",
    "pinned_reserve_segment_size_mb",
)
"""Settings there that change how much is reserved or pinned, in ways that no model here follows."""


def probe() -> Machine:
    """Return the GPUs that torch sees, in its order, the host, and how torch will allocate.

    Asks the NVIDIA driver without initialising CUDA. Imports torch only where no NVIDIA GPU
    answers and something else might: AMD, Intel, Apple, or a container without NVML.
    """
    machine = _hardware()
    expandable, notes = allocator_settings(os.environ)
    if not machine.gpus:
        return machine
    gpus = tuple(replace(gpu, expandable_segments=expandable) for gpu in machine.gpus)
    return replace(machine, gpus=gpus, notes=machine.notes + notes)


def allocator_settings(
    environ: Mapping[str, str], platform: str = sys.platform
) -> tuple[bool, tuple[str, ...]]:
    """Return whether torch's segments grow in a process with *environ*, and what is not modelled.

    >>> allocator_settings({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, "linux")
    (True, ())
    """
    name = next((name for name in ALLOCATOR_VARIABLES if name in environ), "")
    # a value may be a list, as in roundup_power2_divisions:[256:1,>:2]
    pairs = re.findall(r"(\w+)\s*:\s*(\[[^]]*\]|[^,]*)", environ.get(name, ""))
    settings = {key: value.strip() for key, value in pairs}
    notes = [
        f"{name} sets {key}, which predictions of memory leave out."
        for key in settings
        if key in UNMODELLED_SETTINGS
    ]
    if settings.get("backend", "native") != "native":
        notes.append(
            f"{name} chooses the backend {settings['backend']}, whose steps of reserving are not "
            "known: reserved memory is predicted as the native backend's."
        )
    # Growing needs the driver's virtual memory calls, which torch builds in on Linux only.
    expandable = settings.get("expandable_segments") == "True" and platform == "linux"
    return expandable, tuple(notes)


def _hardware() -> Machine:
    reading = read_nvidia(os.environ, sys.modules.get("torch"))
    if reading.num_gpus:
        host = read_host(pinnable_share=HALF_PINNABLE_SHARE if is_wddm() else WHOLE_PINNABLE_SHARE)
        source = f"NVIDIA driver {reading.driver_version}"
        completed = [
            _complete_nvidia(device, index, source, host)
            for index, device in enumerate(reading.devices)
        ]
        notes = (*reading.notes, *(note for _, notes in completed for note in notes))
        return Machine(gpus=tuple(gpu for gpu, _ in completed), host=host, notes=notes)
    host = read_host(pinnable_share=HALF_PINNABLE_SHARE)
    torch = sys.modules.get("torch") or (
        importlib.import_module("torch") if may_have_other_gpu() else None
    )
    gpus, torch_notes = torch_gpus(torch, host) if torch else ((), ())
    return Machine(gpus=gpus, host=host, notes=torch_notes if gpus else reading.notes + torch_notes)


def cpu_machine() -> Machine:
    """Return this machine with its CPU standing for the one GPU.

    For ``device="cpu"``: the same strategies and hooks, with no context charged. It is described as
    having memory of its own, although that is the host's, so that a plan for it moves what a plan
    for a card would move.
    """
    host = read_host()
    cpu = Gpu(
        name="cpu",
        architecture="cpu",
        total_bytes=host.total_bytes,
        free_bytes=host.available_bytes,
        context_bytes=0,
        num_sms=host.num_cores,
        provenance={"total_bytes": "driver", "free_bytes": "driver", "num_sms": "driver"},
        sources=("the host's RAM and cores",),
    )
    return Machine(gpus=(cpu,), host=host)


def _complete_nvidia(
    device: NvidiaDevice, index: int, source: str, host: Host
) -> tuple[Gpu, tuple[str, ...]]:
    """The driver's figures over the catalogue's, and what neither has."""
    # the import reads the catalogue, which a machine without a GPU never needs
    from pipefit.planner.catalog import match_device

    known = match_device(device.board_name, device.board_bytes or None)
    notes: tuple[str, ...] = ()
    if known is None:
        base, notes = _unknown_nvidia(device), (_unknown_note(device.board_name),)
    else:
        base = _slice_of(known, device) if device.is_slice else known
    told = _told_by_driver(device, host)
    provenance: dict[str, Provenance] = {**base.provenance, **dict.fromkeys(told, "driver")}
    if known and not (device.is_total_exact or device.is_slice or base.unified_memory):
        # a driver before R510 counts what it keeps for itself as part of the total
        told["total_bytes"] = min(known.total_bytes, device.total_bytes)
        told["free_bytes"] = min(told["total_bytes"], device.free_bytes)
        provenance["total_bytes"] = "catalogue"
    sources = (*base.sources, f"{source}, {device.uuid}")
    return replace(base, index=index, provenance=provenance, sources=sources, **told), notes


def _told_by_driver(device: NvidiaDevice, host: Host) -> dict[str, Any]:
    if device.total_bytes:
        told: dict[str, Any] = {
            "total_bytes": device.total_bytes,
            "free_bytes": device.free_bytes,
            "other_bytes": device.other_bytes,
        }
    else:
        told = {
            "total_bytes": host.total_bytes,
            "free_bytes": host.available_bytes,
            "unified_memory": True,
        }
    optional = {
        "compute_capability": device.compute_capability,
        "pcie_generation": device.pcie_generation,
        "pcie_lanes": device.pcie_lanes,
        "tdp_w": device.power_limit_w,
    }
    return told | {field: figure for field, figure in optional.items() if figure is not None}


def _slice_of(gpu: Gpu, device: NvidiaDevice) -> Gpu:
    """The part of *gpu* that a MIG slice owns: its SMs, and bandwidth and L2 like its memory.

    https://docs.nvidia.com/datacenter/tesla/mig-user-guide/concepts.html: a memory slice comes with
    its share of the cache and of the bandwidth.
    """
    memory_share = min(1.0, device.total_bytes / (device.board_bytes or gpu.total_bytes))
    num_sms = device.num_sms or round(gpu.num_sms * memory_share)
    sm_share = num_sms / gpu.num_sms
    return replace(
        gpu,
        name=device.name,
        num_sms=num_sms,
        flops_per_s={dtype: rate * sm_share for dtype, rate in gpu.flops_per_s.items()},
        memory_bytes_per_s=gpu.memory_bytes_per_s * memory_share,
        l2_bytes=int(gpu.l2_bytes * memory_share),
    )


def _unknown_nvidia(device: NvidiaDevice) -> Gpu:
    """What the driver's counts and clocks say of a GPU that the catalogue does not have."""
    capability = device.compute_capability
    num_sms = device.num_sms or 0
    if capability and device.num_cores and not device.is_slice:
        num_sms = device.num_cores // CORES_PER_SM.get(capability, LATER_CORES_PER_SM)
    figures: dict[str, Any] = {
        "num_sms": num_sms,
        "clock_hz": device.clock_hz or 0.0,
        "memory_bytes_per_s": 0.0 if device.is_slice else device.memory_bytes_per_s or 0.0,
    }
    if device.num_cores and device.clock_hz and not device.is_slice:
        # a core multiplies and adds once a clock
        figures["flops_per_s"] = {"float32": 2.0 * device.num_cores * device.clock_hz}
    return Gpu(
        name=device.name,
        architecture=_architecture(capability),
        total_bytes=device.total_bytes,
        free_bytes=device.free_bytes,
        provenance={field: "driver" for field, figure in figures.items() if figure},
        **figures,
    )


def _architecture(capability: tuple[int, int] | None) -> str:
    if capability is None:
        return "unknown"
    latest = max((c for c in ARCHITECTURES if c <= capability), default=None)
    return ARCHITECTURES[latest] if latest else "unknown"


def _unknown_note(name: str) -> str:
    return (
        f"The catalogue has no GPU called {name!r}: "
        "time predictions for it need a calibration (`pipefit calibrate`)."
    )


def may_have_other_gpu(root: Path = Path("/")) -> bool:
    """Whether torch, which takes seconds to import, might find a GPU that NVML did not name."""
    if sys.platform in ("darwin", "win32"):
        return True
    nodes = ("dev/kfd", "dev/nvidiactl")  # AMD's compute driver, and NVIDIA's without NVML
    vendors = (_first_line(path) for path in root.glob("sys/class/drm/card*/device/vendor"))
    return any((root / node).exists() for node in nodes) or INTEL_PCI_VENDOR in vendors


def _first_line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def torch_gpus(torch: Any, host: Host) -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
    """Return the GPUs that *torch* reaches, and what it could not tell of them.

    For AMD (ROCm), Intel and Apple, and for NVIDIA in a container that was not given NVML. Asking
    for free memory initialises the GPU; there is no other way through torch.
    """
    notes: list[str] = []
    for read in (_read_cuda, _read_xpu, _read_mps):
        try:
            gpus = read(torch, host, notes)
        except RuntimeError as error:
            notes.append(f"torch finds a GPU but cannot read it: {error}.")
            continue
        if gpus:
            return tuple(gpus), tuple(notes)
    return (), tuple(notes)


def _read_cuda(torch: Any, host: Host, notes: list[str]) -> list[Gpu]:
    """AMD's GPUs, which torch also calls "cuda", or NVIDIA's."""
    if not torch.cuda.is_available():
        return []
    driver = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    if not torch.version.hip:
        notes.append(
            "The NVIDIA driver's library libnvidia-ml.so.1 does not answer, so the GPUs are read "
            "through torch: PCIe link and what other processes hold are not known."
        )
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free_bytes = torch.cuda.mem_get_info(index)[0] + torch.cuda.memory_reserved(index)
        gpu = _complete_from_torch(
            properties.name, index, properties.total_memory, free_bytes, driver, notes
        )
        if not torch.version.hip:
            gpu = replace(gpu, compute_capability=(properties.major, properties.minor))
        gpus.append(replace(gpu, unified_memory=bool(properties.is_integrated)))
    return gpus


def _read_xpu(torch: Any, host: Host, notes: list[str]) -> list[Gpu]:
    if not torch.xpu.is_available():
        return []
    gpus = []
    for index in range(torch.xpu.device_count()):
        properties = torch.xpu.get_device_properties(index)
        free_bytes = torch.xpu.mem_get_info(index)[0] + torch.xpu.memory_reserved(index)
        driver = f"Intel driver {properties.driver_version}"
        gpus.append(
            _complete_from_torch(
                properties.name, index, properties.total_memory, free_bytes, driver, notes
            )
        )
    return gpus


def _read_mps(torch: Any, host: Host, notes: list[str]) -> list[Gpu]:
    """Apple's GPU, which may take a share of the host's RAM that Metal recommends."""
    if not torch.backends.mps.is_available():
        return []
    total_bytes = torch.mps.recommended_max_memory()
    free_bytes = host.available_bytes + torch.mps.driver_allocated_memory()
    gpu = _complete_from_torch(
        torch.backends.mps.get_name(), 0, total_bytes, free_bytes, "Metal", notes
    )
    return [replace(gpu, unified_memory=True)]


def _complete_from_torch(
    name: str, index: int, total_bytes: int, free_bytes: int, driver: str, notes: list[str]
) -> Gpu:
    from pipefit.planner.catalog import match_device

    free_bytes = min(total_bytes, free_bytes)  # on unified memory the free bytes may be the larger
    told: dict[str, Any] = {"total_bytes": total_bytes, "free_bytes": free_bytes}
    gpu = match_device(name, total_bytes)
    if gpu is None:
        notes.append(_unknown_note(name))
        gpu = Gpu(name=name, total_bytes=total_bytes, free_bytes=free_bytes)
    provenance: dict[str, Provenance] = {**gpu.provenance, **dict.fromkeys(told, "driver")}
    sources = (*gpu.sources, f"torch with {driver}")
    return replace(gpu, index=index, provenance=provenance, sources=sources, **told)
