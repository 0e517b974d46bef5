"""Components as strategies see them, from live modules."""

from __future__ import annotations

from typing import Any

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.workload import Component, Kernel, Phase, Routine, Workload
from pipefit.strategies import traits_of
from pipefit.strategies.describe import describe_component

ADA = Gpu(
    name="rtx-4060",
    architecture="ada",
    compute_capability=(8, 9),
    total_bytes=8 << 30,
    free_bytes=8 << 30,
)


def described(module: Any, name: str = "part") -> Component:
    """Return what a trace would say of *module* before any call."""
    return describe_component(name, module, traits_of(module))


def decoding(component: Component, *, batch: int = 1, side_px: int = 1024) -> Workload:
    """Return a workload whose only call is one convolution of a picture in *component*."""
    conv = Kernel(
        kind="conv",
        name="aten.convolution",
        dtype="bfloat16",
        read_bytes=1,
        write_bytes=1,
        shape=(batch, 3, 3, 1, 0, side_px, side_px, side_px, side_px, 3, 3),
    )
    inner = Routine(module_class="Conv2d", entry="forward", events=(("k", 0),), returns=())
    outer = Routine(
        module_class=component.class_name,
        entry="decode",
        events=(("c", 0, "conv", (), ()), ("c", 0, "conv", (), ())),
        returns=(),
    )
    return Workload(
        pipeline="p",
        pipeline_class="P",
        call={},
        components=(component,),
        kernels=(conv,),
        routines=(inner, outer),
        root=(("c", 1, f"/{component.name}", (), ()),),
        phases=(Phase(name="decode", component=component.name, entry="decode", calls=(0,)),),
    )
