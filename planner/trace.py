"""Symbolic execution of the user's own call: what happens, without weights, in seconds.

The pipeline's real ``__call__`` runs on a :class:`~pipefit.planner.virtual.VirtualMachine`, with
its own schedulers, guidance and tokenisers; a :class:`~pipefit.planner.recorder.Recorder` writes
down what it does. Only the weights are missing. Values that only weights give read as zero, and
the workload's assumptions say where.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline

from pipefit.cost_models.workload import Component, Phase, Workload, variant_key
from pipefit.errors import InvalidRequest, PipefitError, TraceError, UnsupportedPipeline
from pipefit.planner.recorder import Recorder, intercepting, new_frame
from pipefit.planner.shims import shimmed
from pipefit.planner.signatures import GPU
from pipefit.planner.virtual import VirtualDevice, VirtualMachine
from pipefit.planner.virtual_tensors import CPU, VirtualTensor
from pipefit.strategies.describe import describe_component
from pipefit.strategies.live import without_progress_bar

VariantParts = Mapping[str, Mapping[str, Any]]
"""Compute strategies on one component: strategy -> parameters."""
Variants = Mapping[str, Sequence[VariantParts]]
"""Component -> the variants of it to trace."""


# -- the weightless pipeline


def weightless(
    pipe: Any, machine: VirtualMachine, *, device: torch.device = GPU, in_place: bool = False
) -> Any:
    """Return a twin of *pipe* whose weights are virtual and on *device*; *pipe* stays as it is.

    With *in_place* the pipeline's own modules are converted (for one that pipefit built itself).
    """
    memo: dict[int, Any] = {}
    stand_ins: dict[int, Any] = {}
    for part in pipe.components.values():
        original = part
        if isinstance(part, torch.nn.Module):
            for tensor in (*part.parameters(), *part.buffers()):
                if id(tensor) not in memo:
                    memo[id(tensor)] = machine.parameter(tensor, device)
            for module in part.modules():
                for tensor in module.__dict__.values():
                    # weight_norm leaves the weight that it computed: no leaf, not to be copied
                    if isinstance(tensor, torch.Tensor) and not tensor.is_leaf:
                        memo[id(tensor)] = tensor.detach()
            if not in_place:
                part = copy.deepcopy(part, memo)
            else:
                _convert(part, memo)
            _convert_plain_meta(part, machine)
        elif hasattr(part, "step") or hasattr(part, "set_timesteps"):
            part = copy.deepcopy(part)
        stand_ins[id(original)] = part
    return _twin(pipe, stand_ins)


def _twin(pipe: Any, stand_ins: Mapping[int, Any]) -> Any:
    """Return a *pipe*, and the pipelines that it is combined of, with other components."""
    twin = object.__new__(type(pipe))
    for name, value in pipe.__dict__.items():
        if isinstance(value, DiffusionPipeline):
            value = _twin(value, stand_ins)
        twin.__dict__[name] = stand_ins.get(id(value), value)
    without_progress_bar(twin)
    return twin


def _convert(module: torch.nn.Module, memo: Mapping[int, Any]) -> None:
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = memo.get(id(tensor), tensor)


def _convert_plain_meta(module: torch.nn.Module, machine: VirtualMachine) -> None:
    """Tensors that a module keeps as plain attributes are on the CPU after a real load."""
    for part in module.modules():
        for name, value in part.__dict__.items():
            if (
                isinstance(value, torch.Tensor)
                and value.device.type == "meta"
                and not isinstance(value, VirtualTensor)
            ):
                part.__dict__[name] = machine.parameter(value, CPU)


# -- the trace itself


def trace(
    pipe: Any,
    call: Mapping[str, Any],
    *,
    name: str | None = None,
    traits: Callable[[torch.nn.Module], Mapping[str, Any]] = lambda module: {},
    variants: Callable[[Workload], Variants] = lambda workload: {},
    apply_variant: Callable[[Any, str, VariantParts], Callable[[], None]] | None = None,
    is_required: Callable[[VariantParts], bool] = lambda parts: True,
    compute_capability: tuple[int, int] = (8, 9),
    prepare: Callable[[Any], Any] = lambda twin: None,
    in_place: bool = False,
    remember: bool = True,
) -> Workload:
    """Execute ``pipe(**call)`` symbolically and return what happened.

    *pipe* may have its weights on the CPU, on a GPU or on the meta device and is left as it is
    unless *in_place*. *variants* is asked, once the plain call is traced, which components to
    trace again under which compute strategies; *apply_variant* puts those in force on the twin
    and returns how to take them back. Those that fail are left out, which the workload's
    assumptions tell, unless *is_required* claims them. *prepare* may change the twin before
    anything is recorded (a cast, as a load with another dtype would have made it). With *remember*
    off every call is executed (slow; for tests).

    Raises:
        TraceError: if the pipeline's own call fails. UnsupportedPipeline: if it needs a package
        that is not installed. InvalidRequest: if a required variant fails.
    """
    recorder = Recorder([VirtualDevice(compute_capability)], remember=remember)
    with recorder.machine, shimmed(), torch.no_grad():
        twin = weightless(pipe, recorder.machine, in_place=in_place)
        prepare(twin)
        modules = {n: m for n, m in twin.components.items() if isinstance(m, torch.nn.Module)}
        components = tuple(describe_component(n, m, traits(m)) for n, m in modules.items())
        for component, module in modules.items():
            recorder.adopt(component, module)
        with (
            intercepting(recorder.components.values(), recorder.call),
            recorder.recording(recorder.root),
        ):
            run_call(twin, call)
            workload = _workload(recorder, pipe, name, call, components)
        replaced = {}
        left_out = []
        for component, choices in variants(workload).items():
            for parts in choices:
                try:
                    found = _trace_variant(recorder, twin, component, parts, apply_variant)
                except Exception as error:  # whatever the component raises, in its own words
                    how = f"{' and '.join(parts)} on {component} fails in this call ({error})"
                    if is_required(parts):
                        raise InvalidRequest(f"{how}: choose other parameters.") from error
                    left_out.append(f"Not considered: {how}.")
                else:
                    replaced[variant_key(component, parts)] = found
    return replace(
        workload,
        kernels=tuple(recorder.kernels),
        routines=tuple(recorder.routines),
        variants=replaced,
        assumptions=(*workload.assumptions, *left_out),
        input_bytes=dict(recorder.input_bytes),
    )


def run_call(twin: Any, call: Mapping[str, Any]) -> None:
    """Execute ``twin(**call)`` on the open virtual machine.

    Raises:
        TraceError: if it fails; but for memory: ``torch.OutOfMemoryError`` as torch raises it.
    """
    given = {name: _given(value) for name, value in call.items()}
    try:
        twin(**given)
    except (PipefitError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the pipeline raises, in its own words
        missing = getattr(error, "name", None) if type(error) is NameError else None
        if missing and importlib.util.find_spec(missing) is None:
            # diffusers imports some packages only where they are there, and uses them regardless.
            raise UnsupportedPipeline(
                f"{type(twin).__name__} needs {missing}, which is not installed here: "
                f"`pip install {missing}`."
            ) from error
        raise TraceError(
            f"{type(twin).__name__} failed while its call was executed without data "
            f"({type(error).__name__}: {error}); check the call's arguments."
        ) from error


def _given(value: Any) -> Any:
    """Return a call argument for use on the virtual machine; the caller's own stays as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(GPU)  # embeddings of another pipeline are on the GPU
    if isinstance(value, list):
        return [_given(v) if hasattr(v, "clone_state") else v for v in value]
    # Drawing from a generator of the CPU is done for real, and would move it on.
    is_ours_to_move = not hasattr(value, "clone_state") or value.device.type != "cpu"
    return value if is_ours_to_move else value.clone_state()


def _trace_variant(
    recorder: Recorder,
    twin: Any,
    component: str,
    parts: VariantParts,
    apply_variant: Callable[[Any, str, VariantParts], Callable[[], None]] | None,
) -> dict[int, int]:
    """Call *component* again as the pipeline did, under *parts*; {routine: replacement}."""
    assert apply_variant is not None, "variants need a way to apply them"
    module = recorder.components[component]
    undo = apply_variant(twin, component, parts)
    recorder.forget_structures()
    # Equal components share routines (the experts of Wan 2.2), whichever of them was called first.
    own = {e[1] for e in recorder.root.events if e[0] == "c" and _called(e) == component}
    replaced = {}
    try:
        for plain, entry in list(recorder.entries.items()):
            if plain not in own:
                continue
            args, kwargs = entry.arguments(recorder.machine)
            with (
                # After *parts*, which may have put a wrapper in the place of an entry.
                intercepting(recorder.components.values(), recorder.call),
                entry.weights_as_they_were(module),
                recorder.recording(new_frame("variant")) as scratch,
            ):
                recorder.forget_structures()
                method = module if entry.entry == "forward" else getattr(module, entry.entry)
                method(*args, **kwargs)
                calls = [e for e in scratch.events if e[0] == "c"]
            replaced[plain] = calls[-1][1]
    finally:
        undo()
        recorder.forget_structures()
    return replaced


def _workload(
    recorder: Recorder,
    pipe: Any,
    name: str | None,
    call: Mapping[str, Any],
    components: tuple[Component, ...],
) -> Workload:
    by_name = {c.name: c for c in components}
    calls = [e for e in recorder.root.events if e[0] == "c"]
    grouped: dict[tuple[str, str], list[int]] = {}
    for ordinal, event in enumerate(calls):
        component = _called(event)
        entry = recorder.routines[event[1]].entry
        grouped.setdefault((component, entry), []).append(ordinal)
    phases = tuple(
        Phase(
            name=phase_name(by_name[component], recorder.components[component], entry),
            component=component,
            entry=entry,
            calls=tuple(ordinals),
        )
        for (component, entry), ordinals in grouped.items()
    )
    assumptions = tuple(
        f"{where} reads {count} value{'s' if count > 1 else ''} that only real weights give; "
        "zero was taken."
        for where, count in sorted(recorder.unknown_reads.items())
    )
    return Workload(
        pipeline=name or type(pipe).__name__,
        pipeline_class=type(pipe).__name__,
        call={k: _in_words(v) for k, v in call.items()},
        components=components,
        kernels=tuple(recorder.kernels),
        routines=tuple(recorder.routines),
        root=tuple(recorder.root.events),
        phases=phases,
        offload_sequence=tuple(
            n for n in (getattr(pipe, "model_cpu_offload_seq", None) or "").split("->") if n
        ),
        offload_excluded=tuple(getattr(pipe, "_exclude_from_cpu_offload", ())),
        assumptions=assumptions,
        fingerprint=fingerprint(type(pipe).__name__, components),
    )


def _called(event: Sequence[Any]) -> str:
    """Return the component that a call in the pipeline's own frame enters."""
    return event[2][1:].split(".")[0]


def phase_name(component: Component, module: Any, entry: str) -> str:
    """Name a phase by what the component is given, not by what it is called."""
    if entry == "decode":
        return "decode"
    main_input = getattr(module, "main_input_name", "")
    if entry in ("encode", "get_image_features") or main_input == "pixel_values":
        return "encode_image"
    if component.library == "transformers":
        return "encode_prompt" if main_input == "input_ids" else component.name
    has_text = any(
        p in component.name for p in ("transformer", "unet", "controlnet", "prior", "decoder")
    )
    return "denoise" if has_text else component.name


def _in_words(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)) and len(value) <= 16:
        return [_in_words(v) for v in value]
    size = getattr(value, "size", None)
    if isinstance(value, torch.Tensor):
        return f"tensor {tuple(value.shape)} {value.dtype}"
    return f"{type(value).__name__}{f' {size}' if isinstance(size, tuple) else ''}"


def fingerprint(pipeline_class: str, components: Sequence[Component]) -> str:
    """Return a short hash of what a plan depends on: classes, tensor shapes and dtypes."""
    digest = hashlib.sha256(pipeline_class.encode())
    for component in sorted(components, key=lambda c: c.name):
        digest.update(f"{component.name}:{component.class_name}".encode())
        for t in component.tensors:
            digest.update(f"{t.path}{t.shape}{t.dtype}{t.tied_to}".encode())
    return digest.hexdigest()[:16]
