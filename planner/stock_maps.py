"""What diffusers and accelerate would put on which GPU, in place of ``device_map:mode=...``.

They are asked themselves; what they leave out, or to the CPU, cannot be predicted and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipefit.cost_models.context import context_bytes
from pipefit.cost_models.machine import Machine
from pipefit.cost_models.units import format_bytes
from pipefit.cost_models.workload import Component, Workload
from pipefit.errors import InvalidRequest
from pipefit.planner.options import at_device
from pipefit.strategies.device_map import MODES, rooms_of, stock_map
from pipefit.strategies.live import balanced_components
from pipefit.strategies.strategy import Option


def stock(
    options: Sequence[Option], workload: Workload, machine: Machine
) -> tuple[tuple[Option, ...], int]:
    """Return *options* with what the libraries choose in place of a ``mode``, and the main GPU.

    That is the first component's, where diffusers' pipelines compute then; else the first there is.

    Raises:
        InvalidRequest: for a mode that there is not, or one that leaves weights to the CPU; for a
        ``max_memory`` that cannot be understood.
    """
    main = machine.gpus[0].index
    free: dict[int | str, int] = {
        gpu.index: gpu.free_bytes - context_bytes(gpu) for gpu in machine.gpus
    }
    found: list[Option] = []
    for option in options:
        mode, told = option.parameters.get("mode"), option.parameters.get("max_memory")
        if option.strategy != "device_map" or mode is None:
            found.append(option)
            continue
        rooms = free if told is None else rooms_of(told)
        if option.component is None:
            _check_mode(mode, ("balanced",), "a whole pipeline")
            places = _balanced(workload, rooms)
            found += [at_device(name, index) for name, index in places.items()]
            main = places[workload.components[0].name]
        else:
            _check_mode(mode, MODES, "a component")
            found.append(_mapped(workload.component(option.component), mode, rooms))
    return tuple(found), main


def _check_mode(mode: object, known: Sequence[str], subject: str) -> None:
    if mode not in known:
        raise InvalidRequest(
            f"device_map:mode of {subject} is {' or '.join(known)}, but was {mode!r}."
        )


def _balanced(workload: Workload, rooms: Mapping[int | str, int]) -> dict[str, int]:
    sizes = {c.name: c.weight_bytes for c in workload.components}
    # diffusers leaves the CPU's room out, too.
    places = balanced_components(sizes, {i: n for i, n in rooms.items() if isinstance(i, int)})
    left = [c for c in workload.components if not isinstance(places.get(c.name), int)]
    if left:
        said = ", ".join(f"{c.name} ({format_bytes(c.weight_bytes)})" for c in left)
        raise InvalidRequest(
            f"diffusers' balanced gives no GPU to {said}: make a plan, which leaves none out."
        )
    return {c.name: int(places[c.name]) for c in workload.components}


def _mapped(component: Component, mode: str, rooms: Mapping[int | str, int]) -> Option:
    places = stock_map(component, mode, rooms)
    left = [path for path, place in places.items() if not isinstance(place, int)]
    if left:
        raise InvalidRequest(
            f"accelerate's {mode} leaves {len(left)} modules of {component.name} on no GPU, the "
            f"first {left[0]}: make a plan, which streams what has no room."
        )
    indices = set(places.values())
    if len(indices) == 1:
        return at_device(component.name, int(indices.pop()))
    return Option(strategy="device_map", component=component.name, parameters={"map": places})
