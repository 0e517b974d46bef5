"""What the NVIDIA driver says about its GPUs, in the order in which torch will number them.

Asks the driver's management library (NVML), which needs no CUDA context: probing takes no device
memory and leaves the process free to fork. NVML numbers every GPU by PCI bus and ignores
``CUDA_VISIBLE_DEVICES``; torch numbers the visible ones, so the order is worked out here.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pynvml

from pipefit.cost_models.units import MIB, format_bytes

UNLISTED_BYTES = 256 * MIB
"""Memory in use beyond the listed processes that is taken for a process which is not listed.

An idle GPU shows a few MiB that belong to nobody, a process with a CUDA context about 300 MB
(pytorch/pytorch#107667); in a container the driver may list no process (NVIDIA/nvidia-docker#179).
"""

_DRIVER_TROUBLE = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: (
        "No NVIDIA driver was found: its library libnvidia-ml.so.1 is not installed or cannot be "
        "loaded."
    ),
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: (
        "The NVIDIA driver is installed, but its kernel module is not loaded: "
        "run `sudo modprobe nvidia` or reboot."
    ),
    pynvml.NVML_ERROR_NO_PERMISSION: (
        "This user may not talk to the NVIDIA driver: "
        "check the permissions of /dev/nvidiactl and /dev/nvidia0."
    ),
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
        "The NVIDIA driver's library and its kernel module have different versions, as after an "
        "update: reboot."
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NvidiaDevice:
    """What the driver says of one GPU, or of one MIG slice; None is what it does not say."""

    uuid: str
    name: str
    board_uuid: str
    """UUID of the whole GPU; a slice has one of its own."""
    board_name: str
    board_bytes: int = 0
    """Memory of the whole GPU as ``nvidia-smi`` prints it; 0 where it is not told."""
    total_bytes: int = 0
    """What CUDA calls total; 0 where the GPU has no memory of its own (GB10, Jetson)."""
    is_total_exact: bool = False
    """Whether *total_bytes* leaves out what the driver keeps for itself, as CUDA's figure does."""
    free_bytes: int = 0
    """What would be free if this process held nothing."""
    other_bytes: int = 0
    compute_capability: tuple[int, int] | None = None
    pcie_generation: int | None = None
    pcie_lanes: int | None = None
    power_limit_w: float | None = None
    num_sms: int | None = None
    num_cores: int | None = None
    clock_hz: float | None = None
    memory_bytes_per_s: float | None = None

    @property
    def is_slice(self) -> bool:
        """Whether this is a MIG slice."""
        return self.uuid != self.board_uuid


@dataclass(frozen=True, slots=True, kw_only=True)
class NvidiaReading:
    """The devices that torch will see, in its order, and what could not be found out."""

    devices: tuple[NvidiaDevice, ...]
    num_gpus: int
    """GPUs that the driver knows, visible or not."""
    driver_version: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchDevice:
    """What torch says of a CUDA device after it has initialised CUDA."""

    index: int
    total_bytes: int
    reserved_bytes: int


def is_wddm() -> bool:
    """Whether Windows manages the GPU's memory: on Windows, and in WSL, whose kernel says so."""
    return sys.platform == "win32" or "microsoft" in platform.release().lower()


def read_nvidia(environ: Mapping[str, str], torch: Any = None) -> NvidiaReading:
    """Return the NVIDIA devices that torch sees under *environ*.

    *torch* is the module, where it is imported: if it has initialised CUDA, its numbering is taken
    instead of worked out. CUDA is never initialised here.
    """
    notes: list[str] = []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        trouble = _DRIVER_TROUBLE.get(error.value, f"The NVIDIA driver does not answer: {error}.")
        return NvidiaReading(devices=(), num_gpus=0, driver_version="", notes=(trouble,))
    try:
        in_torch = torch_devices(torch)
        gpus = [
            devices
            for index in range(pynvml.nvmlDeviceGetCount())
            if (devices := _read_gpu(index, in_torch, notes))
        ]
        if not pynvml.nvmlDeviceGetCount():
            notes.append("The NVIDIA driver is loaded but has no GPU.")
        driver_version = _ask(pynvml.nvmlSystemGetDriverVersion) or "of unknown version"
    except pynvml.NVMLError as error:
        notes.append(f"The NVIDIA driver stopped answering: {error}.")
        return NvidiaReading(devices=(), num_gpus=0, driver_version="", notes=tuple(notes))
    finally:
        _ask(pynvml.nvmlShutdown)
    ordered = _in_torch_order(gpus, in_torch, notes) if in_torch else None
    if ordered is None:
        ordered = _in_environment_order(gpus, environ, notes)
    return NvidiaReading(
        devices=ordered, num_gpus=len(gpus), driver_version=driver_version, notes=tuple(notes)
    )


def torch_devices(torch: Any) -> dict[str, TorchDevice]:
    """Return torch's CUDA devices by UUID; empty unless torch has initialised CUDA already."""
    if torch is None or not torch.version.cuda or not torch.cuda.is_initialized():
        return {}
    devices = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[_bare(str(properties.uuid))] = TorchDevice(
            index=index,
            total_bytes=properties.total_memory,
            reserved_bytes=torch.cuda.memory_reserved(index),
        )
    return devices


def visible_uuids(value: str | None, gpus: Sequence[tuple[str, Sequence[str]]]) -> tuple[str, ...]:
    """Return the UUIDs that CUDA numbers 0, 1, … under ``CUDA_VISIBLE_DEVICES=value``.

    *gpus* are pairs of a GPU's UUID and the UUIDs of its MIG slices, in NVML's order; *value* None
    is the unset variable. The rules are CUDA's
    (https://docs.nvidia.com/cuda/cuda-c-programming-guide/#env-vars)
    as torch reads them (``_parse_visible_devices`` in torch/cuda/__init__.py): the first entry that
    is not valid ends the list, a repeated one empties it. Of MIG slices CUDA enumerates one alone,
    and no whole GPU beside it
    (https://docs.nvidia.com/datacenter/tesla/mig-user-guide/mig-device-names.html).

    >>> visible_uuids("1,0,-1", [("GPU-a", ()), ("GPU-b", ())])
    ('GPU-b', 'GPU-a')
    >>> visible_uuids(None, [("GPU-a", ()), ("GPU-b", ("MIG-1", "MIG-2"))])
    ('MIG-1',)
    """
    every_slice = [uuid for _, slices in gpus for uuid in slices]
    if value is None:
        numbers: list[int] = list(range(len(gpus)))
    elif value.startswith("MIG-"):
        return tuple(every_slice[number] for number in _by_prefix(value, "MIG-", every_slice))[:1]
    elif value.startswith("GPU-"):
        numbers = _by_prefix(value, "GPU-", [uuid for uuid, _ in gpus])
    else:
        numbers = _by_index(value, len(gpus))
    chosen = [uuid for number in numbers for uuid in gpus[number][1] or (gpus[number][0],)]
    return tuple([uuid for uuid in chosen if uuid in every_slice][:1] or chosen)


def _by_index(value: str, num_gpus: int) -> list[int]:
    numbers: list[int] = []
    for entry in value.split(","):
        # like C's strtoul, "1gpu2" is 1
        match = re.match(r"[+-]?\d+", entry.strip(), re.ASCII)
        if match is None or not 0 <= int(match[0]) < num_gpus:
            break
        if int(match[0]) in numbers:
            return []
        numbers.append(int(match[0]))
    return numbers


def _by_prefix(value: str, kind: str, uuids: Sequence[str]) -> list[int]:
    numbers: list[int] = []
    for entry in value.split(","):
        matches = [number for number, uuid in enumerate(uuids) if uuid.startswith(entry)]
        if not entry.startswith(kind) or len(matches) != 1:
            break
        if matches[0] in numbers:
            return []
        numbers += matches
    return numbers


def _in_torch_order(
    gpus: Iterable[Sequence[NvidiaDevice]], in_torch: Mapping[str, TorchDevice], notes: list[str]
) -> tuple[NvidiaDevice, ...] | None:
    """The devices as torch numbers them; None if torch has one that the driver does not name."""
    found = {_bare(device.uuid): device for devices in gpus for device in devices}
    if not in_torch.keys() <= found.keys():
        notes.append(
            "torch and the driver name the GPUs differently: their order is taken from "
            "CUDA_VISIBLE_DEVICES."
        )
        return None
    ordered = sorted(in_torch, key=lambda uuid: in_torch[uuid].index)
    return tuple(
        replace(found[uuid], total_bytes=in_torch[uuid].total_bytes, is_total_exact=True)
        for uuid in ordered
    )


def _in_environment_order(
    gpus: Sequence[Sequence[NvidiaDevice]], environ: Mapping[str, str], notes: list[str]
) -> tuple[NvidiaDevice, ...]:
    value = environ.get("CUDA_VISIBLE_DEVICES")
    layout = [_layout(devices) for devices in gpus]
    found = {device.uuid: device for devices in gpus for device in devices}
    visible = tuple(found[uuid] for uuid in visible_uuids(value, layout))
    hidden = [f"{d.name} ({d.uuid})" for d in found.values() if d not in visible]
    if hidden and value is None:
        notes.append(
            f"CUDA uses one MIG slice alone; hidden are {', '.join(hidden)}: "
            "name another in CUDA_VISIBLE_DEVICES."
        )
    elif hidden:
        notes.append(f"CUDA_VISIBLE_DEVICES={value} hides {', '.join(hidden)}.")
    is_by_uuid = value is not None and value.startswith(("GPU-", "MIG-"))
    is_pci_order = environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    if not is_by_uuid and not is_pci_order and len({d.board_name for d in found.values()}) > 1:
        notes.append(
            "The GPUs differ, and CUDA gives number 0 to the one it thinks fastest: the order here "
            "is that of the PCI bus; set CUDA_DEVICE_ORDER=PCI_BUS_ID to make it CUDA's."
        )
    return visible


def _layout(devices: Sequence[NvidiaDevice]) -> tuple[str, tuple[str, ...]]:
    slices = tuple(device.uuid for device in devices if device.is_slice)
    return devices[0].board_uuid, slices


def _read_gpu(
    index: int, in_torch: Mapping[str, TorchDevice], notes: list[str]
) -> tuple[NvidiaDevice, ...]:
    """The GPU, or its slices if it is cut; nothing if it cannot be used."""
    label = f"GPU {index}"
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        board = _read_board(index, handle)
        label += f" ({board.name})"
        modes = _ask(pynvml.nvmlDeviceGetMigMode, handle)
        if modes and modes[0] == pynvml.NVML_DEVICE_MIG_ENABLE:
            devices = _read_slices(handle, board, label, in_torch, notes)
            if not devices:
                notes.append(f"{label} is in MIG mode without a slice: CUDA cannot use it.")
        else:
            devices = (_with_memory(board, handle, label, in_torch, notes),)
    except pynvml.NVMLError as error:
        notes.append(f"{label} does not answer and is left out: {error}.")
        return ()
    if devices:
        _note_link(board, handle, label, notes)
    return devices


def _read_board(index: int, handle: Any) -> NvidiaDevice:
    """What does not change while the GPU works; slices have these figures from their GPU."""
    uuid = _ask(pynvml.nvmlDeviceGetUUID, handle) or f"NVML-{index}"
    name = _ask(pynvml.nvmlDeviceGetName, handle) or "NVIDIA GPU"
    limit_mw = _ask(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle)
    clock_mhz = _ask(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_SM)
    memory_mhz = _ask(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_MEM)
    bus_bits = _ask(pynvml.nvmlDeviceGetMemoryBusWidth, handle)
    memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
    return NvidiaDevice(
        uuid=uuid,
        name=name,
        board_uuid=uuid,
        board_name=name,
        board_bytes=memory.total if memory else 0,
        compute_capability=_ask(pynvml.nvmlDeviceGetCudaComputeCapability, handle),
        pcie_generation=_ask(pynvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
        pcie_lanes=_ask(pynvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
        power_limit_w=limit_mw / 1e3 if limit_mw else None,
        num_cores=_ask(pynvml.nvmlDeviceGetNumGpuCores, handle),
        clock_hz=clock_mhz * 1e6 if clock_mhz else None,
        # two transfers a clock, as deviceQuery of NVIDIA/cuda-samples computes it
        memory_bytes_per_s=2 * memory_mhz * 1e6 * bus_bits / 8 if memory_mhz and bus_bits else None,
    )


def _read_slices(
    handle: Any,
    board: NvidiaDevice,
    label: str,
    in_torch: Mapping[str, TorchDevice],
    notes: list[str],
) -> tuple[NvidiaDevice, ...]:
    slices = []
    for number in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        part = _ask(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, number)
        if part is None:  # numbers are places, and not every place is taken
            continue
        attributes = _ask(pynvml.nvmlDeviceGetAttributes_v2, part)
        device = replace(
            board,
            uuid=_ask(pynvml.nvmlDeviceGetUUID, part) or f"{board.uuid}/{number}",
            name=_ask(pynvml.nvmlDeviceGetName, part) or f"{board.name} MIG {number}",
            num_sms=attributes.multiprocessorCount if attributes else None,
        )
        slices.append(_with_memory(device, part, f"{label} slice {number}", in_torch, notes))
    return tuple(slices)


def _with_memory(
    device: NvidiaDevice,
    handle: Any,
    label: str,
    in_torch: Mapping[str, TorchDevice],
    notes: list[str],
) -> NvidiaDevice:
    """*device* with its memory and what of it belongs to whom.

    NVML's total counts what the driver keeps for itself, which ``cudaMemGetInfo`` leaves out on
    Linux: an H100 has 81,559 MiB here and 81,008 in torch's messages. The difference is the
    ``reserved`` of NVML's second structure (drivers since R510). WDDM gives CUDA the whole total.

    Raises:
        NVMLError: if the memory cannot be read, except where there is none to read.
    """
    try:
        memory, reserved_bytes = _read_memory(handle)
    except pynvml.NVMLError as error:
        if error.value != pynvml.NVML_ERROR_NOT_SUPPORTED:
            raise
        notes.append(f"{label} reports no memory of its own and is taken to use the host's RAM.")
        return device
    in_use = _bytes_by_process(handle)
    torch_device = in_torch.get(_bare(device.uuid))
    # in a container this process is listed by the host's number, NVIDIA/nvidia-docker#1483
    own_bytes = (in_use or {}).get(os.getpid()) or (
        torch_device.reserved_bytes if torch_device else 0
    )
    unowned_bytes = max(0, memory.used - own_bytes)
    if in_use is None:
        other_bytes = unowned_bytes
        if unowned_bytes:
            notes.append(
                f"{label}: the driver does not tell how much each process holds; all "
                f"{format_bytes(unowned_bytes)} in use are taken as held by others."
            )
    else:
        other_bytes = max(0, sum(in_use.values()) - own_bytes)
        # without the second structure, "used" holds what the driver keeps for itself
        if reserved_bytes is not None and unowned_bytes - other_bytes > UNLISTED_BYTES:
            notes.append(
                f"{label}: {format_bytes(unowned_bytes - other_bytes)} are held by processes that "
                "the driver does not list, as those of other containers."
            )
            other_bytes = unowned_bytes
    total_bytes = memory.total if is_wddm() else memory.total - (reserved_bytes or 0)
    return replace(
        device,
        total_bytes=total_bytes,
        is_total_exact=reserved_bytes is not None or is_wddm(),
        free_bytes=min(total_bytes, memory.free + own_bytes),
        other_bytes=other_bytes,
    )


def _read_memory(handle: Any) -> tuple[Any, int | None]:
    """NVML's memory structure, and what the driver keeps for itself where it says so."""
    memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle, pynvml.nvmlMemory_v2)
    if memory is not None:
        return memory, memory.reserved
    return pynvml.nvmlDeviceGetMemoryInfo(handle), None


def _bytes_by_process(handle: Any) -> dict[int, int] | None:
    """Bytes held by each process; None where the driver does not tell it of each."""
    in_use: dict[int, int] = {}
    for question in (
        pynvml.nvmlDeviceGetComputeRunningProcesses,
        pynvml.nvmlDeviceGetGraphicsRunningProcesses,
    ):
        processes = _ask(question, handle)
        if processes is None or any(process.usedGpuMemory is None for process in processes):
            return None
        for process in processes:  # one that computes and draws is in both lists
            held_bytes = in_use.get(process.pid, 0)
            in_use[process.pid] = max(held_bytes, process.usedGpuMemory)
    return in_use


def _note_link(board: NvidiaDevice, handle: Any, label: str, notes: list[str]) -> None:
    """Say so where the PCIe link is not what the plan counts on."""
    if board.pcie_generation is None or board.pcie_lanes is None:
        notes.append(f"{label}: the driver does not tell its PCIe link.")
        return
    generation = _ask(pynvml.nvmlDeviceGetCurrPcieLinkGeneration, handle) or board.pcie_generation
    lanes = _ask(pynvml.nvmlDeviceGetCurrPcieLinkWidth, handle) or board.pcie_lanes
    if (generation, lanes) != (board.pcie_generation, board.pcie_lanes):
        notes.append(
            f"{label}: the PCIe link rests at generation {generation} x{lanes} and is counted on "
            f"as generation {board.pcie_generation} x{board.pcie_lanes}, its most under load."
        )


def _ask(question: Callable[..., Any], *arguments: Any) -> Any:
    """The driver's answer; None where it has none, because every figure here has another source."""
    try:
        return question(*arguments)
    except pynvml.NVMLError:
        return None


def _bare(uuid: str) -> str:
    """The UUID as torch prints it: without the kind in front."""
    return uuid.lower().removeprefix("gpu-").removeprefix("mig-")
