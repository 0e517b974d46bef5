"""GPUs and kernels written by hand, for tests of how long things take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.workload import Kernel

MIB = 1 << 20

A100 = Gpu(
    name="a100-80gb",
    architecture="ampere",
    compute_capability=(8, 0),
    total_bytes=80 << 30,
    free_bytes=80 << 30,
    flops_per_s={"float16": 312e12, "bfloat16": 312e12, "float32": 19.5e12, "tf32": 156e12},
    memory_bytes_per_s=2039e9,
    l2_bytes=40 * MIB,
    num_sms=108,
    clock_hz=1.41e9,
    pcie_generation=4,
    pcie_lanes=16,
    tdp_w=400,
    server=True,
)
H100 = replace(
    A100,
    name="h100-sxm",
    architecture="hopper",
    compute_capability=(9, 0),
    flops_per_s={"bfloat16": 989.4e12, "float16": 989.4e12, "float32": 66.9e12, "tf32": 494.7e12},
    memory_bytes_per_s=3352e9,
    l2_bytes=50 * MIB,
    num_sms=132,
    clock_hz=1.98e9,
)
BIG = 256 * MIB
"""More than the L2 cache of each GPU here."""


def gemm(m: int, n: int, k: int, *, dtype: str = "bfloat16", batch: int = 1) -> Kernel:
    return Kernel(
        kind="gemm",
        name="aten.mm",
        dtype=dtype,
        read_bytes=2 * batch * (m * k + n * k),
        write_bytes=2 * batch * m * n,
        shape=(batch, m, n, k),
    )


def elementwise(num_bytes: int, **fields: Any) -> Kernel:
    kernel = Kernel(
        kind="elementwise",
        name="aten.add",
        dtype="bfloat16",
        read_bytes=num_bytes // 2,
        write_bytes=num_bytes - num_bytes // 2,
    )
    return replace(kernel, **fields)
