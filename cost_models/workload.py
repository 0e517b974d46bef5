"""What a pipeline call does, as data: the trace writes it, every cost model reads it.

A trace is a program with subroutines. A :class:`Routine` is one distinct call of a module (same
structure, same input signature); its events allocate, free, launch kernels and call other routines.
Fifty denoising steps, sixty equal blocks and two hundred tiles are one routine each, called often.

Events are tuples, so that traces of video decoders stay small and fast:

* ``("a", buffer, num_bytes)``: allocate; *buffer* numbers a storage in this routine.
* ``("f", buffer)``: free a buffer of this routine.
* ``("x", k)``: free the k-th outside buffer, one of the caller's (see ``Routine.num_outside``).
* ``("k", kernel)``: launch ``Workload.kernels[kernel]``; :data:`SYNCHRONISE` launches nothing, the
  host waits there until the GPU has done all it was given.
* ``("c", routine, path, returned, outside)``: call ``Workload.routines[routine]`` on submodule
  *path*.
* ``("w", component, delta_bytes)``: the component's own weights change size from here on.

The last is what ``component.to(dtype)`` inside the pipeline does (SDXL upcasts its VAE before
decode); those tensors are weights, not carried tensors.

In a call, ``returned`` gives this routine's numbers for the buffers that outlive the callee, in the
order of the callee's ``returns``; ``outside`` gives, for each outside buffer that the callee frees,
this routine's own number n >= 0, or ``-1 - k`` when that is outside buffer k of this routine too.
*path* is relative to the calling module (``"transformer_blocks.3"``), ``""`` for a method of the
same module, and starts with ``/component.`` when the callee lies elsewhere.

Allocations are the bytes asked for. Rounding, workspaces and libraries are the business of the cost
models. An allocation made by a kernel comes before that kernel's ``"k"``; a kernel's scratch is not
an event.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Event = tuple[Any, ...]

CallOrder = tuple[tuple[str, tuple[str, ...]], ...]
"""(path of a module without its numbers, what it calls, below it, in that order)."""

KernelKind = Literal["conv", "gemm", "attention", "norm", "elementwise", "copy", "index", "reduce"]

LIBRARY_KINDS: tuple[KernelKind, ...] = ("conv", "gemm", "attention")
"""Kinds of kernels that no compiler writes: they stay those of libraries."""

Launcher = Literal["eager", "traced", "compiled", "captured", "tried"]
"""What the host does to launch a kernel: run a module's Python (``eager``), TorchScript's
interpreter, inductor's wrapper, or once for a whole CUDA graph (``captured``).

``tried``: inductor times the kernel while it compiles, on tensors of its own. No later call does,
so it takes no time, but memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """The facts of one operator launch that a cost model needs, without its tensors."""

    kind: KernelKind
    name: str
    """The operator: ``aten.convolution``, ``aten.native_group_norm`` …"""
    dtype: str
    """Compute dtype without ``torch.``: ``bfloat16``."""
    read_bytes: int
    """Real tensors read, weights included, broadcast inputs once."""
    write_bytes: int
    """Real tensors written."""
    shape: tuple[int, ...] = ()
    """By kind. gemm: (batch, M, N, K). attention: (batch, heads, S_q, S_kv, d_qk, d_v).
    conv: (N, C_in, C_out, groups, transposed, *input, *output, *kernel) 1 to 3 spatial dims each.
    others: the output's shape."""
    input_bytes: int = 0
    """conv: bytes of the tensor that the convolution sees (padded, cached frames included)."""
    weight_bytes: int = 0
    """conv, gemm: bytes of the weight operand."""
    output_bytes: int = 0
    channels_last: bool = False
    """conv: input or weight lies in channels_last(_3d) as ``suggest_memory_format`` sees it."""
    weight_channels_last: bool = False
    """conv: the weight itself lies in channels_last."""
    contiguous_input: bool = True
    """conv: the input needs no copy before the library sees it (findings 4.1, last sentence)."""
    masked: bool = False
    """attention: a mask or bias tensor is given."""
    launcher: Launcher = "eager"


SYNCHRONISE = Kernel(kind="copy", name="synchronise", dtype="", read_bytes=0, write_bytes=0)
"""Stands where the host reads a value of the GPU or copies to or from ordinary host memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routine:
    """One distinct call of one module structure."""

    module_class: str
    entry: str
    """``forward``, ``encode``, ``decode`` or another method of the component."""
    events: tuple[Event, ...]
    returns: tuple[int, ...]
    """Buffers allocated here (or returned by a callee) that are alive when the call ends."""
    num_outside: int = 0
    """How many buffers of the caller this routine frees while it runs; events ``("x", k)``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One parameter or buffer."""

    path: str
    """Dotted path below the component."""
    num_bytes: int
    dtype: str
    shape: tuple[int, ...]
    is_buffer: bool = False
    persistent: bool = True
    tied_to: str | None = None
    """Path of the tensor whose storage this one shares; such a tensor costs nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleInfo:
    """One module of the component's tree, in ``named_modules`` order; "" is the component."""

    path: str
    class_name: str
    is_leaf_layer: bool = False
    """Conv, ConvTranspose, Linear or Embedding: what leaf-level offload groups on."""
    is_block_list: bool = False
    """ModuleList or Sequential."""
    is_container: bool = False
    """One of these or a ModuleDict: it holds modules, and whether it is called itself depends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """A module of the pipeline: what it weighs and what its class allows."""

    name: str
    class_name: str
    library: str
    """First part of the defining module: ``diffusers``, ``transformers`` …"""
    tensors: tuple[TensorInfo, ...]
    modules: tuple[ModuleInfo, ...]
    traits: Mapping[str, Any] = field(default_factory=dict)
    """What strategies asked the live object about: ``Strategy.traits`` merged, keys are theirs."""

    @property
    def weight_bytes(self) -> int:
        """Parameters and buffers as stored, tied tensors once."""
        return sum(t.num_bytes for t in self.tensors if t.tied_to is None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """All calls into one component entry point, ordered by the first; a denoising loop is one phase
    (two where a ControlNet takes turns with the denoiser)."""

    name: str
    """``encode_prompt``, ``encode_image``, ``denoise``, ``decode``, or the component's name."""
    component: str
    entry: str
    calls: tuple[int, ...]
    """Which component calls: ordinals among the "c" events of ``Workload.root``."""

    @property
    def num_calls(self) -> int:
        """How often the entry point is called in one pipeline call."""
        return len(self.calls)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A pipeline and one call of it."""

    pipeline: str
    """Catalogue name, folder or class name."""
    pipeline_class: str
    call: Mapping[str, Any]
    """The call's arguments, tensors and pictures described in words."""
    components: tuple[Component, ...]
    kernels: tuple[Kernel, ...]
    routines: tuple[Routine, ...]
    root: tuple[Event, ...]
    """The pipeline's own frame: its tensors ("a"/"f"), its kernels, and one "c" per component call,
    whose path is ``/component`` and whose routine's ``entry`` says the entry point."""
    phases: tuple[Phase, ...]
    """Ordered by first call."""
    variants: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    """Key of :func:`variant_key` -> {routine index in ``root``: routine that replaces it}."""
    input_bytes: Mapping[int, int] = field(default_factory=dict)
    """Routine -> bytes of the tensors that a call of it is given: what travels to another GPU."""
    offload_sequence: tuple[str, ...] = ()
    """``model_cpu_offload_seq`` split at the arrows."""
    offload_excluded: tuple[str, ...] = ()
    """``_exclude_from_cpu_offload``."""
    assumptions: tuple[str, ...] = ()
    fingerprint: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    def component(self, name: str) -> Component:
        """Return the component called *name*."""
        return next(c for c in self.components if c.name == name)


def calls_in_order(workload: Workload) -> tuple[str, ...]:
    """Return the component of every call that the pipeline makes."""
    calls = sorted((call, p.component) for p in workload.phases for call in p.calls)
    return tuple(name for _, name in calls)


def calling_order(workload: Workload) -> tuple[str, ...]:
    """Return the components in the order in which the pipeline calls them, again at every turn."""
    names = calls_in_order(workload)
    return tuple(
        name for name, before in zip(names, (None, *names), strict=False) if name != before
    )


def uncalled_modules(workload: Workload, component: str) -> tuple[str, ...]:
    """Return the largest modules of *component* of which the call enters no part, as paths.

    The vision tower of a language model that reads text alone, the encoder of an autoencoder that
    only decodes. Containers, which nobody calls anyway, are not named, but what lies in them.
    """
    called = _called_modules(workload, component)
    found: list[str] = []
    for module in workload.component(component).modules:
        path = module.path
        if not path or path in called or any(_lies_in(path, above) for above in found):
            continue
        if not module.is_container:
            found.append(path)
    return tuple(found)


def call_order(workload: Workload, component: str) -> CallOrder:
    """Return in which order modules of *component* call others, where that is not the tree's.

    The key is the path of the caller with its numbers left out, because blocks are alike; of
    several, that counts which calls most.
    """
    places = {module.path: i for i, module in enumerate(workload.component(component).modules)}
    found: dict[str, tuple[str, ...]] = {}
    for caller, callees in _calls_of(workload, component).items():
        begin = f"{caller}." if caller else ""
        names = tuple(path.removeprefix(begin) for path in callees if path.startswith(begin))
        alike = without_numbers(caller)
        if len(names) > len(found.get(alike, ())):
            found[alike] = names
            order = sorted(names, key=lambda name: places.get(begin + name, -1))
            if list(names) == order:
                found[alike] = ()
    return tuple(sorted((caller, names) for caller, names in found.items() if names))


def without_numbers(path: str) -> str:
    """Return what is common to the paths of blocks that are alike.

    >>> without_numbers("blocks.3.ff.net.0")
    'blocks.*.ff.net.*'
    """
    return ".".join("*" if part.isdecimal() else part for part in path.split("."))


def returned_bytes(workload: Workload, routine: int) -> tuple[int, ...]:
    """Return what a call of *routine* asked for and leaves behind, by buffer of its ``returns``."""
    found = workload.routines[routine]
    wanted = set(found.returns)
    sizes: dict[int, int] = {}
    for event in found.events:
        if event[0] == "a" and event[1] in wanted:
            sizes[event[1]] = event[2]
        elif event[0] == "c" and not wanted.isdisjoint(event[3]):
            sizes.update(zip(event[3], returned_bytes(workload, event[1]), strict=True))
    return tuple(sizes[buffer] for buffer in found.returns)


def _called_modules(workload: Workload, component: str) -> set[str]:
    """Return the modules of *component* that are called, and all above them."""
    called: set[str] = set()
    for callees in _calls_of(workload, component).values():
        for path in callees:
            ends = (*(i for i, letter in enumerate(path) if letter == "."), len(path))
            called.update(path[:end] for end in ends)
    return called


def _calls_of(workload: Workload, component: str) -> dict[str, dict[str, None]]:
    """Return which modules of *component* each of them calls, in the order of the first time."""
    calls: dict[str, dict[str, None]] = {}
    seen: set[tuple[int, str, str]] = set()

    def walk(routine: int, owner: str, path: str) -> None:
        if (routine, owner, path) in seen:
            return
        seen.add((routine, owner, path))
        for event in workload.routines[routine].events:
            if event[0] == "c":
                callee, below = split_path(event[2], owner, path)
                if callee == owner == component and below != path:
                    calls.setdefault(path, {}).setdefault(below)
                walk(event[1], callee, below)

    for event in workload.root:
        if event[0] == "c":
            callee, below = split_path(event[2], "", "")
            if callee == component and below:
                calls.setdefault("", {}).setdefault(below)
            walk(event[1], callee, below)
    return calls


def _lies_in(path: str, ancestor: str) -> bool:
    return path.startswith(ancestor + ".")


def split_path(path: str, component: str, caller: str) -> tuple[str, str]:
    """Return component and path below it of a call written as *path* in *caller*'s routine.

    >>> split_path("attn.to_q", "unet", "mid_block"), split_path("/vae.decoder", "unet", "x")
    (('unet', 'mid_block.attn.to_q'), ('vae', 'decoder'))
    """
    if path.startswith("/"):
        component, _, below = path[1:].partition(".")
        return component, below
    return component, ".".join(part for part in (caller, path) if part)


def variant_key(component: str, parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Name a set of compute strategies on one component: strategy -> parameters.

    >>> variant_key("vae", {"vae_tiling": {"tile_px": 512}})
    'vae|vae_tiling:tile_px=512'
    """
    return "|".join(
        [component]
        + [
            f"{name}:{','.join(f'{k}={parts[name][k]}' for k in sorted(parts[name]))}"
            for name in sorted(parts)
        ]
    )
