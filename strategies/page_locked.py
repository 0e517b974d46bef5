"""Page-locked host memory of exactly the size that is asked for.

torch's pinned allocator gives out powers of two and takes none back (``CachingHostAllocatorImpl``
in aten/src/ATen/core/CachingHostAllocator.h, torch 2.13), so a 150 MiB block would take 256. Here
ordinary memory is registered with the driver instead (``cudaHostRegister``, CUDA runtime API,
"Memory Management"), which torch then finds pinned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any


def page_lock(buffer: Any, device: Any) -> Callable[[], None] | None:
    """Page-lock the memory of *buffer*, a tensor on the CPU, for copies to *device*; return how to
    unlock it.

    None where the driver refuses, most often because the user may not lock that much memory
    (``ulimit -l``). Undo it before the tensor goes.
    """
    import torch

    runtime = torch.cuda.cudart()
    address, num_bytes = buffer.data_ptr(), buffer.numel() * buffer.element_size()
    with torch.cuda.device(device):  # no context on another GPU
        if int(runtime.cudaHostRegister(address, num_bytes, 0)) != 0:
            _forget_error()
            return None
    return lambda: runtime.cudaHostUnregister(address)


def _forget_error() -> None:
    """Take the driver's last error away, which the next kernel would otherwise be blamed for.

    torch has no name for ``cudaGetLastError``, but looks at it after each launch
    (``C10_CUDA_KERNEL_LAUNCH_CHECK`` in c10/cuda/CUDAException.h, torch 2.13).
    """
    import torch

    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")
