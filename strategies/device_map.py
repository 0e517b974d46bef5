"""Say on which GPU a component computes, or over which GPUs its blocks are split.

Pipelines make their tensors on one GPU, the *main* one, and expect results there. So whatever a
component elsewhere is given travels to it, and what it returns travels back, around ``forward`` and
every other method by which pipelines enter a component; accelerate's hooks see ``forward`` alone,
and diffusers' own ``device_map`` leaves what ``vae.encode`` returns on the other GPU. A split
component has the hooks of accelerate's ``dispatch_model`` on its blocks.

``device`` says where, and leaves how the weights lie there to another strategy (resident, unless
one is named); ``split`` says both, and so does ``map``, module by module as accelerate writes it.
What no GPU has room for waits on the host: of the blocks that ``resident_blocks`` names a GPU for,
so many stay there and the others are streamed to it by the engine of ``streaming``, each GPU with
slots of its own. So all links copy while one GPU after the other computes; accelerate's own ``cpu``
in a map would copy tensor by tensor while nothing does.

``mode`` stands, in a prediction, for what the libraries choose: diffusers for the components of a
pipeline (``balanced``), accelerate for the blocks of a component; ``max_memory`` is the room that
they are told to fill, by default what is free. Group offload is not had
elsewhere than on the main GPU, because a pipeline computes where its first group-offloaded
component does.
"""

from __future__ import annotations

import copy
import functools
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pipefit.cost_models import placement
from pipefit.cost_models.devices import (
    NO_SPLIT_MODULES,
    blocks_of_split,
    places_of,
    streamed_parts,
)
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.units import parse_bytes
from pipefit.cost_models.workload import Component, Workload
from pipefit.errors import InvalidRequest
from pipefit.strategies.live import (
    DISPATCH_ATTRIBUTES,
    ENTRY_METHODS,
    attribute_restorer,
    device_restorer,
    hook_restorer,
    module_components,
)
from pipefit.strategies.parameters import unknown_parameter
from pipefit.strategies.strategy import Kind, Option, Quality, Undo
from pipefit.strategies.streaming import Streaming, check_parameters, entry_hook, immovable

if TYPE_CHECKING:
    from pipefit.strategies.streamer import Streamer

PARAMETERS = ("device", "split", "map", "mode", "max_memory", "resident_blocks", "max_block_bytes")
SUPPLEMENTS = {"max_memory": "mode", "resident_blocks": "split", "max_block_bytes": "split"}
"""What says more about another parameter."""
MODES = ("auto", "balanced", "balanced_low_0", "sequential")
"""What accelerate can be asked to work out for a model; ``auto`` is its ``balanced``."""
_SPLIT = re.compile(r"\d+:\d+(\+\d+:\d+)+")
_RESIDENT = re.compile(r"\d+:\d+(\+\d+:\d+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMap:
    """``device=1``: the component computes on GPU 1; ``split=0:30+1:27``: 30 blocks on GPU 0, the
    next 27 on GPU 1, and what is no block on the first; with ``resident_blocks=0:20`` 20 of those
    that streaming cuts GPU 0's part into stay there and the rest of that part waits on the host."""

    name: str = "device_map"
    kind: Kind = "device"
    quality: Quality = Quality.EXACT

    def traits(self, module: Any) -> dict[str, Any]:
        """Which of its modules the class wants to be left whole; none: it was never split."""
        return {NO_SPLIT_MODULES: list(getattr(module, "_no_split_modules", None) or ())}

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """None: with one GPU there is nothing to choose; :mod:`pipefit.planner.devices` chooses."""
        return ()

    def refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """What cannot be meant, and components that cannot be away or cannot be split."""
        wrong = unknown_parameter(self.name, parameters, PARAMETERS)
        if wrong:
            return wrong
        if "max_memory" in parameters and "mode" not in parameters:
            return "device_map:max_memory is the room that a mode fills: name the mode as well."
        for key in ("resident_blocks", "max_block_bytes"):
            if key in parameters and "split" not in parameters:
                return f"device_map:{key} is about the blocks of a split: name the split as well."
        if len({*parameters} - {*SUPPLEMENTS}) != 1:
            return "device_map takes one of device=1, split=0:30+1:27, map and mode=balanced."
        if "mode" in parameters:
            return "device_map:mode is what the libraries would choose: it can only be predicted."
        if "map" in parameters:
            return _map_refusal(component, parameters["map"])
        if "device" in parameters:
            return _device_refusal(component, parameters["device"])
        wrong = _split_refusal(component, parameters["split"])
        return wrong or self._streaming_refusal(component, parameters)

    def conflict(self, parameters: Mapping[str, Any], other: Option) -> str | None:
        """What decides for the whole pipeline where it computes."""
        if other.strategy == "group_offload":
            return "a pipeline computes where its first group-offloaded component does."
        if other.strategy in ("model_offload", "sequential_offload"):
            return "that brings all components to one GPU."
        if other.strategy == "text_encoder_on_cpu":
            return "the component computes on the CPU then."
        return None

    def placement(self, parameters: Mapping[str, Any]) -> placement.Split | None:
        """The split as data; ``device`` alone does not say how the weights lie there."""
        if "map" in parameters:
            return placement.Split(places=tuple(parameters["map"].items()))
        if "split" not in parameters:
            return None
        most_bytes = parameters.get("max_block_bytes", placement.MAX_BLOCK_BYTES)
        return placement.Split(
            blocks=_counts(parameters["split"]),
            resident_blocks=_counts(parameters.get("resident_blocks", "")),
            max_block_bytes=most_bytes,
        )

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Lead what the component is given to its GPU, and its results back to *device*, the main
        one; the weights of a split are moved, others are left to the strategy that places them."""
        import torch

        from pipefit.strategies.describe import describe_component

        name, main = str(component), torch.device(device)
        modules = module_components(pipe)
        module = modules[name]
        with ExitStack() as undo:
            undo.callback(device_restorer(module))
            is_split = "device" not in parameters
            streamers: list[Streamer] = []
            if is_split:
                split = self.placement(parameters)
                assert split is not None
                described = describe_component(name, module, traits_of_split(module))
                streamers = _stream(module, described, split, main, undo)
                _dispatch(module, places_of(described, split), streamers, main, undo)
            # diffusers takes the first component's hook as the place where the pipeline computes.
            for part in modules.values():
                hook = entry_hook(part, main, undo)
                for streamer in streamers if part is module else ():
                    hook.entered.append(streamer.enter)
                    undo.callback(hook.entered.remove, streamer.enter)
            undo.callback(attribute_restorer(module, ("forward", *ENTRY_METHODS)))
            home = main if is_split else numbered(main, parameters["device"])
            entered: list[Any] = []
            for method in ("forward", *ENTRY_METHODS):
                if callable(getattr(module, method, None)):
                    vars(module)[method] = _led(getattr(module, method), home, main, entered)
            return undo.pop_all().close

    def _streaming_refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """What is wrong with the blocks that are said to stay, where any are."""
        if "resident_blocks" not in parameters:
            return None
        said, most = parameters["resident_blocks"], parameters.get("max_block_bytes", 1)
        if not isinstance(said, str) or not _RESIDENT.fullmatch(said):
            return (
                "device_map:resident_blocks gives the number of blocks that stay by GPU, as in "
                f"0:20+1:18, but was {said!r}."
            )
        if not isinstance(most, int) or isinstance(most, bool) or most < 1:
            return f"device_map:max_block_bytes is a number of at least 1, but was {most!r}."
        reason = immovable(component)
        if reason:
            return reason
        counts = _counts(said)
        if len(dict(counts)) < len(counts):
            return f"device_map:resident_blocks names a GPU twice in {said!r}."
        split = self.placement(parameters)
        assert split is not None
        for index, (cut, how) in streamed_parts(component, split).items():
            if how.resident_blocks >= len(cut.called):
                return (
                    f"GPU {index} has {len(cut.called)} blocks of {component.class_name} that can "
                    f"be streamed, but resident_blocks was {said!r}: leave it out where all stay."
                )
        return None


def traits_of_split(module: Any) -> dict[str, Any]:
    """Return the traits of *module* that a split goes by."""
    return {**Streaming().traits(module), **DeviceMap().traits(module)}


def _counts(said: str) -> tuple[tuple[int, int], ...]:
    parts = (part.split(":") for part in said.split("+") if part)
    return tuple((int(index), int(count)) for index, count in parts)


def numbered(main: Any, index: int) -> Any:
    """Return GPU *index* of *main*'s kind; the CPU, which may stand for all, has no others."""
    import torch

    return main if main.type == "cpu" else torch.device(main.type, index)


def rooms_of(max_memory: Any) -> dict[int | str, int]:
    """Return the bytes by GPU, and of the ``"cpu"``, that accelerate's *max_memory* stands for.

    >>> rooms_of("0:10GB+cpu:30GB") == rooms_of({0: "10GB", "cpu": 30 * 10**9})
    True

    Raises:
        InvalidRequest: if it is no such thing, or names no GPU.
    """
    pairs: list[tuple[Any, Any]] = []
    if isinstance(max_memory, Mapping):
        pairs = list(max_memory.items())
    elif isinstance(max_memory, str):
        parts = [part.partition(":") for part in max_memory.split("+")]
        pairs = [(int(key) if key.isdecimal() else key, size) for key, _, size in parts]
    rooms = {
        key: parse_bytes(size)
        for key, size in pairs
        if key == "cpu" or (isinstance(key, int) and not isinstance(key, bool) and key >= 0)
    }
    if len(rooms) < len(pairs) or not {*rooms} - {"cpu"}:
        raise InvalidRequest(
            "device_map:max_memory gives each GPU once, and the cpu, its room, as in "
            f"0:10GB+1:8GB+cpu:30GB, but was {max_memory!r}."
        )
    return rooms


def stock_map(
    component: Component, mode: str, room_bytes: Mapping[int | str, int]
) -> dict[str, int | str]:
    """Return where accelerate would put the modules of *component*: on GPUs, ``"cpu"``, ``"disk"``.

    The CPU has room for anything, unless *room_bytes* says how much. It is asked itself, about
    modules without weights that have the component's names and classes.
    """
    import torch
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory
    from torch import nn

    modules: dict[str, Any] = {}
    for module in component.modules:
        made = type(module.class_name, (nn.Module,), {})()
        modules[module.path] = made
        if module.path:
            above, _, name = module.path.rpartition(".")
            modules[above].add_module(name, made)
    made_of: dict[str, Any] = {}
    for tensor in component.tensors:
        above, _, name = tensor.path.rpartition(".")
        empty = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device="meta")
        if tensor.is_buffer:
            modules[above].register_buffer(name, empty)
            continue
        own = nn.Parameter(empty, requires_grad=False)
        made_of[tensor.path] = made_of.get(str(tensor.tied_to), own)
        modules[above].register_parameter(name, made_of[tensor.path])
    whole = list(component.traits.get(NO_SPLIT_MODULES, ()))
    room = {"cpu": 1 << 60, **room_bytes}
    log = logging.getLogger("accelerate")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of GPUs that are not in this computer
    try:
        if mode != "sequential":
            low_zero = mode == "balanced_low_0"
            room = get_balanced_memory(
                modules[""], room, no_split_module_classes=whole, low_zero=low_zero
            )
        return dict(infer_auto_device_map(modules[""], room, no_split_module_classes=whole))
    finally:
        log.setLevel(level)


def devices_of(parameters: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the indices of the GPUs that *parameters* name, as far as they can be understood."""
    if isinstance(parameters.get("device"), int):
        return (parameters["device"],)
    if isinstance(parameters.get("map"), Mapping):
        return tuple(parameters["map"].values())
    if isinstance(parameters.get("max_memory"), Mapping):
        return tuple(index for index in parameters["max_memory"] if isinstance(index, int))
    said = str(parameters.get("split", parameters.get("max_memory", "")))
    return tuple(int(index) for index in re.findall(r"(\d+):", said))


def home_of(options: Sequence[Option], component: str | None, main: Any) -> Any:
    """Return the device that *options* give *component*; *main* where they do not say."""
    for option in options:
        if option.strategy == "device_map" and option.component == component is not None:
            return numbered(main, option.parameters.get("device", main.index or 0))
    return main


def _device_refusal(component: Component, index: Any) -> str | None:
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        return f"device_map:device is the index of a GPU, but was {index!r}."
    if component.traits.get("is_autoencoder") and component.traits.get("has_own_batch_norm"):
        return f"{component.class_name} keeps batch statistics that pipelines read without it."
    return None


def _map_refusal(component: Component, places: Any) -> str | None:
    if not isinstance(places, Mapping) or not all(
        isinstance(index, int) and not isinstance(index, bool) for index in places.values()
    ):
        return f"device_map:map gives each module's path the index of a GPU, but was {places!r}."
    if len(set(places.values())) < 2:
        return "device_map:map names a single GPU: say device_map:device=1."
    for tensor in component.tensors:
        above = [path for path in places if f"{tensor.path}.".startswith(f"{path}.")]
        if len(above) != 1:
            return (
                f"device_map:map names {tensor.path} of {component.class_name} {len(above)} times."
            )
    return None


def _split_refusal(component: Component, split: Any) -> str | None:
    if not isinstance(split, str) or not _SPLIT.fullmatch(split):
        return (
            f"device_map:split gives numbers of blocks by GPU, as in 0:30+1:27, but was {split!r}."
        )
    parts = [part.split(":") for part in split.split("+")]
    if any(index == after for (index, _), (after, _) in pairwise(parts)):
        return f"device_map:split names a GPU twice in a row in {split!r}."
    blocks = blocks_of_split(component)
    if not blocks:
        return f"{component.class_name} has no row of blocks that its class wants to be left whole."
    count = sum(int(count) for _, count in parts)
    if count != len(blocks):
        return f"{component.class_name} has {len(blocks)} blocks, but {split!r} places {count}."
    return None


def _stream(
    module: Any, described: Component, split: placement.Split, main: Any, undo: ExitStack
) -> list[Streamer]:
    """Pack what no GPU holds, with an engine for each GPU that streams blocks of its part."""
    from pipefit.strategies.streamer import Streamer

    streamers = []
    for index, (cut, how) in streamed_parts(described, split).items():
        check_parameters(described, module)
        streamers.append(Streamer(module, cut, how, numbered(main, index), is_part=True))
        undo.callback(streamers[-1].close)
    return streamers


def _dispatch(
    module: Any,
    places: Mapping[str, int],
    streamers: Sequence[Streamer],
    main: Any,
    undo: ExitStack,
) -> None:
    """Move each part of *module* to its GPU and attach accelerate's hooks below the component.

    The component's own hook would be in the way of others; what it does, :func:`_led` does.
    """
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_module

    devices = {path: numbered(main, index) for path, index in places.items()}
    undo.callback(attribute_restorer(module, DISPATCH_ATTRIBUTES))
    undo.callback(hook_restorer(module))
    undo.callback(remove_hook_from_module, module, recurse=True)
    # What diffusers and transformers leave where it is, such as a cache of keys and values.
    stays = getattr(module, "_skip_keys", None)
    stays = stays or getattr(module, "_skip_keys_device_placement", None)
    with ExitStack() as there:
        for streamer in streamers:
            there.enter_context(streamer.as_if_there())
        for path, device in devices.items():
            # Tensors that are there already keep their identity, and with it their ties.
            own = module.get_submodule(path) if _is_module(module, path) else None
            if own is not None:
                own.to(device)
            else:
                tensor = functools.reduce(getattr, path.split("."), module)
                tensor.data = tensor.data.to(device)
        dispatch_model(module, devices, main_device=main, skip_keys=stays, force_hooks=True)
    remove_hook_from_module(module)


def _is_module(module: Any, path: str) -> bool:
    return path in dict(module.named_modules())


def _led(method: Any, home: Any, main: Any, entered: list[Any]) -> Any:
    """Return *method* with its arguments brought to *home* and its result to *main*.

    Not where it is called by another of the component's methods, which are those that have
    *entered* it: ``generate`` calls ``forward``.
    """

    @functools.wraps(method)
    def led(*args: Any, **kwargs: Any) -> Any:
        if entered:
            return method(*args, **kwargs)
        args, kwargs = _brought(args, home), _brought(kwargs, home)
        entered.append(method)
        try:
            result = method(*args, **kwargs)
        finally:
            entered.clear()
        del args, kwargs
        return _brought(result, main)

    return led


def _brought(value: Any, device: Any) -> Any:
    """Return *value* with every tensor in it on *device*.

    accelerate's ``send_to_device`` does not see tensors that an object holds, such as the
    distribution that ``vae.encode`` returns.
    """
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_brought(one, device) for one in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_brought(one, device) for one in value)
    if isinstance(value, Mapping):
        return type(value)({key: _brought(one, device) for key, one in value.items()})
    held = getattr(value, "__dict__", None)
    if isinstance(held, dict) and any(isinstance(one, torch.Tensor) for one in held.values()):
        moved = copy.copy(value)
        vars(moved).update({key: _brought(one, device) for key, one in held.items()})
        return moved
    return value
