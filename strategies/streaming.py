"""Keep as much of a component on the GPU as fits, and stream the rest block by block.

Between "all resident" and "all over the link in every step" lies everything that a budget can buy:
some blocks stay, spread evenly, so that the copies of the others hide behind them. With
``when_idle=leave`` the component gives its memory up while others are called and comes back at the
rate of page-locked memory, which is model offload without the copies back; with all blocks resident
nothing is streamed and only that remains. The engine is ``streamer.py``, the cut into blocks
``cost_models/blocks.py``.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pipefit.cost_models import placement
from pipefit.cost_models.blocks import UNSPLITTABLE, Blocks, is_large, modules_above
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.streaming import cut_of
from pipefit.cost_models.workload import (
    Component,
    Workload,
    call_order,
    calling_order,
    uncalled_modules,
    without_numbers,
)
from pipefit.errors import UnknownName, UnsupportedPipeline
from pipefit.strategies.live import (
    ACCELERATE_HOOK,
    device_restorer,
    hook_restorer,
    module_components,
)
from pipefit.strategies.parameters import unknown_parameter
from pipefit.strategies.strategy import Kind, Quality, Undo

PARAMETERS = (
    "resident_blocks",
    "num_slots",
    "look_ahead",
    "when_idle",
    "load_with",
    "host_memory",
    "disk_path",
    "max_block_bytes",
    "uncalled_modules",
    "call_order",
)

NUM_LEVELS = 16
"""Into how many steps the share of resident blocks is divided for the search; our choice: a step of
a 24 GB model is then 1.5 GB."""

OFFERED_SLOTS = (1, 2, 3)
"""Numbers of slots that are worth considering: with one a copy hides behind resident neighbours
alone, with two behind the streamed block before as well, a third evens out blocks of uneven size.
More memory does more as resident blocks."""

UNMOVABLE_BACKENDS = ("bitsandbytes", "torchao", "quanto")
"""Libraries whose quantised weights are more than the bytes of their parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming:
    """``resident_blocks`` of a component's blocks stay on the GPU, the others take turns.

    Weights must not be changed while it is in force (load or fuse adapters before): what is written
    to a copy on the GPU goes with that copy.

    ``disk_path`` is an existing folder; each component gets a folder of its own in it, which is
    gone after undoing.
    """

    name: str = "streaming"
    kind: Kind = "placement"
    quality: Quality = Quality.EXACT

    def traits(self, module: Any) -> dict[str, Any]:
        """Which modules must not be divided."""
        from torch import nn

        containers = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
        return {
            # Layers of torch itself may use their children's weights without calling them, as
            # nn.MultiheadAttention does.
            UNSPLITTABLE: [
                path
                for path, part in module.named_modules()
                if type(part).__module__.startswith("torch.nn.")
                and not isinstance(part, containers)
                and any(True for _ in part.children())
            ],
        }

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """Levels of residency with some slots, staying or leaving when idle.

        Those that leave may come back while the component before them computes. A few are offered
        out of ordinary host memory, for machines where not all can be page-locked. Left out though
        allowed: the disk.
        """
        if gpu.unified_memory or gpu.architecture == "apple":
            return ()
        order = calling_order(workload)
        told = _told(component, workload)
        count = len(_cut(component, told).called)
        levels = sorted({round(count * level / NUM_LEVELS) for level in range(NUM_LEVELS + 1)})
        offered: list[dict[str, Any]] = []
        for resident in levels:
            for num_slots in OFFERED_SLOTS if resident < count else (1,):
                if num_slots > max(1, count - resident):
                    continue
                one = {
                    "resident_blocks": resident,
                    "num_slots": num_slots,
                    "look_ahead": num_slots,
                    **told,
                }
                if resident < count:
                    offered.append(one)
                if len(set(order)) > 1:
                    offered.append({**one, "when_idle": "leave"})
                    before = _called_before(order, component.name)
                    if before is not None:
                        offered.append({**one, "when_idle": "leave", "load_with": before})
        offered += [{**one, "host_memory": "pageable"} for one in offered if _is_coarse(one, count)]
        return [one for one in offered if self.refusal(component, one) is None]

    def refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """What cannot be meant, and components whose weights are more than their parameters."""
        wrong = unknown_parameter(self.name, parameters, PARAMETERS) or _wrong_value(parameters)
        if wrong:
            return wrong
        name, reason = component.class_name, immovable(component)
        if reason:
            return reason
        if parameters.get("load_with") == component.name:
            return "load_with names another component, with whose call this one is loaded."
        uncalled = parameters.get("uncalled_modules", ())
        containers = {m.path: m.is_container for m in component.modules} if uncalled else {}
        for path in uncalled:
            if path not in containers or not path:
                return f"{name} has no module {path!r}."
            if containers[path]:
                return f"{path} of {name} is a list, which is never called: name what lies in it."
        count = len(_cut(component, parameters).called)
        resident = parameters.get("resident_blocks", 0)
        if resident > count:
            return f"{name} has {count} blocks, but resident_blocks was {resident}."
        if resident == count and parameters.get("when_idle", "stay") == "stay":
            return f"All {count} blocks of {name} would stay: use resident."
        return None

    def placement(self, parameters: Mapping[str, Any]) -> placement.Streaming:
        """The same parameters as data."""
        given = {"resident_blocks": 0, **parameters}
        given["uncalled_modules"] = tuple(given.get("uncalled_modules", ()))
        given["call_order"] = tuple(
            (parent, tuple(names)) for parent, names in given.get("call_order", {}).items()
        )
        if given.pop("disk_path", None) is not None:
            given["host_memory"] = "disk"
        if "num_slots" in given:
            given.setdefault("look_ahead", given["num_slots"])
        return placement.Streaming(**given)

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Attach the engine; undo detaches it and brings the weights back as they were."""
        import torch

        from pipefit.strategies.describe import describe_component
        from pipefit.strategies.streamer import Streamer

        modules = module_components(pipe)
        name, device = str(component), torch.device(device)
        module = modules[name]
        load_with = parameters.get("load_with")
        others = [other for other, part in modules.items() if part is not module]
        if load_with is not None and load_with not in others:
            raise UnknownName("component", load_with, others)
        described = describe_component(name, module, self.traits(module))
        check_parameters(described, module)
        how, folder = self.placement(parameters), parameters.get("disk_path")
        with ExitStack() as undo:
            if folder is not None:
                folder = tempfile.mkdtemp(prefix=f"{name}-", dir=folder)
                undo.callback(shutil.rmtree, folder)
            undo.callback(device_restorer(module))
            streamer = Streamer(module, _cut(described, parameters), how, device, disk_path=folder)
            undo.callback(streamer.close)
            for other, part in modules.items():
                hook = entry_hook(part, device, undo)
                if other == name:
                    told, by = hook.entered, streamer.enter
                    streamer.before_load = hook.leaving
                elif part is module:  # the same under another name
                    continue
                elif other == how.load_with:
                    told, by = hook.loading, streamer.load_ahead
                elif how.when_idle == "leave":
                    told, by = hook.leaving, streamer.leave
                else:
                    continue
                told.append(by)
                undo.callback(told.remove, by)
            return undo.pop_all().close


def immovable(component: Component) -> str | None:
    """Why *component* cannot be streamed, whatever the parameters; None where it can."""
    name, traits = component.class_name, component.traits
    if traits.get("quantized_by") in UNMOVABLE_BACKENDS:
        return (
            f"{name} is quantised by {traits['quantized_by']}, whose weights cannot be moved "
            "block by block: use resident or model_offload."
        )
    if traits.get("is_upcast_by_pipelines"):
        return f"{name} is cast to float32 by some pipelines, which its copies would undo."
    return None


def _wrong_value(parameters: Mapping[str, Any]) -> str | None:
    for key, least in (
        ("resident_blocks", 0),
        ("num_slots", 1),
        ("look_ahead", 0),
        ("max_block_bytes", 1),
    ):
        value = parameters.get(key, least)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            return f"streaming:{key} is a number of at least {least}, but was {value!r}."
    for key, known in (("when_idle", ("stay", "leave")), ("host_memory", ("pinned", "pageable"))):
        if parameters.get(key, known[0]) not in known:
            return f"streaming:{key} is {' or '.join(known)}, but was {parameters[key]!r}."
    for key in ("load_with", "disk_path"):
        if not isinstance(parameters.get(key, ""), str | None):
            return f"streaming:{key} is a name, but was {parameters[key]!r}."
    if parameters.get("disk_path") is not None and "host_memory" in parameters:
        return "streaming:disk_path says where blocks wait: leave host_memory out."
    uncalled = parameters.get("uncalled_modules", ())
    if not isinstance(uncalled, list | tuple) or not all(isinstance(one, str) for one in uncalled):
        return f"streaming:uncalled_modules is a list of paths, but was {uncalled!r}."
    order = parameters.get("call_order", {})
    if not isinstance(order, Mapping) or not all(
        isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
        for names in order.values()
    ):
        return f"streaming:call_order maps paths to lists of paths, but was {order!r}."
    if parameters.get("load_with") is not None and parameters.get("when_idle") != "leave":
        return "streaming:load_with needs when_idle=leave."
    return None


def _is_coarse(parameters: Mapping[str, Any], count: int) -> bool:
    """Whether an option is worth having out of ordinary memory as well: a quarter of the levels,
    two slots, and not ahead of the own call, where staging would hold another component up."""
    resident = parameters["resident_blocks"]
    levels = {round(count * level / 4) for level in range(5)}
    slots = 2 if count - resident > 1 else 1
    is_ahead = "load_with" in parameters
    return resident in levels and parameters["num_slots"] == slots and not is_ahead


def _told(component: Component, workload: Workload) -> dict[str, Any]:
    """Return what the trace knows about *component* and its structure does not tell."""
    uncalled = [
        path
        for path in uncalled_modules(workload, component.name)
        if is_large(component, path, placement.MAX_BLOCK_BYTES)
    ]
    blocks = _cut(component, {"uncalled_modules": uncalled}).blocks
    divided = {
        without_numbers(path)
        for block in blocks
        for path in (block.path, *modules_above(block.path))
    }
    order: dict[str, list[str]] = {}
    for caller, names in call_order(workload, component.name):
        kept = [
            name for name in names if without_numbers(f"{caller}.{name}".lstrip(".")) in divided
        ]
        if caller in divided and len(kept) > 1:
            order[caller] = kept
    paths = _paths(component, uncalled, order)
    for caller in list(order):
        rest = {name: names for name, names in order.items() if name != caller}
        if _paths(component, uncalled, rest) == paths:  # the tree says the same
            order = rest
    told: dict[str, Any] = {"uncalled_modules": uncalled, "call_order": order}
    return {key: value for key, value in told.items() if value}


def _paths(
    component: Component, uncalled: Sequence[str], order: Mapping[str, Sequence[str]]
) -> list[str]:
    cut = _cut(component, {"uncalled_modules": uncalled, "call_order": order})
    return [block.path for block in cut.blocks]


def _cut(component: Component, parameters: Mapping[str, Any]) -> Blocks:
    return cut_of(component, Streaming().placement(parameters))


def _called_before(order: Sequence[str], name: str) -> str | None:
    """Return the component whose call *name*'s always follows, and that is never called otherwise.

    None if there is none, or if *name* is the first of the pipeline's call.
    """
    before = {earlier for earlier, later in pairwise(order) if later == name}
    after = {later for earlier, later in pairwise(order) if earlier in before}
    return before.pop() if len(before) == 1 and after == {name} and order[0] != name else None


def check_parameters(component: Component, module: Any) -> None:
    """Refuse what no library makes: parameters with gaps, which cannot be packed as they are, and
    two that share memory without being the same object, of which one would be left behind."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for tensor in component.tensors:
        one, other = parameters.get(tensor.path), parameters.get(str(tensor.tied_to))
        if tensor.tied_to is not None and not tensor.is_buffer and one is not other:
            raise UnsupportedPipeline(
                f"{tensor.path} of {component.name} shares its memory with {tensor.tied_to}, but "
                "is another parameter: tie the modules to one parameter, or use group_offload."
            )
    for path, parameter in parameters.items():
        if not _is_dense(parameter.shape, parameter.stride()):
            raise UnsupportedPipeline(
                f"{path} of {component.name} is a view with gaps of a larger tensor: make it "
                "contiguous, or use group_offload."
            )


def _is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Return whether a tensor takes its elements' memory and no more, in whatever order.

    >>> _is_dense((2, 3), (1, 2)), _is_dense((2, 3), (4, 1)), _is_dense((2, 3), (0, 1))
    (True, False, False)
    """
    steps = sorted((step, size) for step, size in zip(stride, shape, strict=True) if size > 1)
    expected = 1
    for step, size in steps:
        if step != expected:
            return False
        expected *= size
    return True


@functools.cache
def _entry_hook_class() -> type:
    from accelerate.hooks import ModelHook

    class EntryHook(ModelHook):  # type: ignore[misc]
        """Tells engines that a component is entered, and pipelines where it computes.

        diffusers asks every component for its hook's ``execution_device``, and lets an
        autoencoder's ``encode`` and ``decode`` call ``pre_forward`` (``apply_forward_hook`` in
        utils/accelerate_utils.py, 0.42.1).
        """

        def __init__(self, device: Any) -> None:
            self.execution_device = device
            self.leaving: list[Callable[[], None]] = []
            self.loading: list[Callable[[], None]] = []
            self.entered: list[Callable[[], None]] = []

        @property
        def brings_weights(self) -> bool:
            """Whether an engine streams this component; otherwise other engines are told."""
            return bool(self.entered)

        def tell_others(self) -> None:
            for told in (*self.leaving, *self.loading):
                told()

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            for told in (*self.leaving, *self.entered, *self.loading):
                told()
            return args, kwargs

    return EntryHook


def entry_hook(module: Any, device: Any, undo: ExitStack) -> Any:
    """Return the hook of *module* on entering it, attached now if none is there yet.

    A new one tells the pipeline that it computes on *device*; its removal is added to *undo*.
    """
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module
    from diffusers import ModelMixin

    hook = getattr(module, ACCELERATE_HOOK, None)
    if isinstance(hook, _entry_hook_class()):
        return hook
    hook = _entry_hook_class()(device)
    undo.callback(hook_restorer(module))
    undo.callback(remove_hook_from_module, module)
    add_hook_to_module(module, hook)
    if not isinstance(module, ModelMixin):
        # Models of transformers are entered by any method: CLAP by get_text_features.
        for child in module.children():
            handle = child.register_forward_pre_hook(lambda *_: hook.tell_others(), prepend=True)
            undo.callback(handle.remove)
    return hook
