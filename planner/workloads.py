"""From what the user has (a pipeline, a name, a folder) and a call to traced workloads.

Nothing here imports torch until something has to be traced: a plan for a catalogue pipeline whose
trace is in the cache is made without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.serial import to_json
from pipefit.cost_models.workload import Component, Workload
from pipefit.errors import InvalidRequest, UnknownName
from pipefit.planner.catalog import pipeline_entry
from pipefit.planner.options import Parts, compute_variants
from pipefit.planner.policy import Policy
from pipefit.planner.trace_cache import cached_trace, library_versions
from pipefit.strategies import BUILT_IN, conflict_of, strategy, traits_of
from pipefit.strategies.strategy import Imitated, Option

Progress = Callable[[str], None]

MAX_ATTRIBUTE_DEPTH = 3
"""How deep attributes of a live module are followed when it is recognised again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """A workload, and the options that turned the user's pipeline into it (a cast, a storage)."""

    workload: Workload
    load_options: tuple[Option, ...] = ()


def observe(
    subject: Any,
    call: Mapping[str, Any] | None,
    *,
    gpu: Gpu,
    policy: Policy,
    dtype: Mapping[str, str] | str | None = None,
    progress: Progress | None = None,
) -> list[Observed]:
    """Return the workloads to plan with: as the pipeline is, and in 16 bits where that is open.

    What a load strategy is asked for is in all of them. *subject* is a live pipeline, a catalogue
    name or a folder with ``model_index.json``.

    Raises:
        UnknownName: for a name that is none of these, or an argument that the call does not take.
        InvalidRequest: for a load strategy that a component refuses where it was asked for.
        TraceError: if the pipeline's own call fails.
    """
    say = progress or (lambda text: None)
    source = source_of(subject, dtype)
    plain = _trace(source, call or {}, gpu, policy, (), say)
    asked = _asked(plain, policy)
    offered = _offered(plain, gpu, policy)
    found = []
    for options in [asked, (*offered, *asked)] if offered else [asked]:
        workload = _trace(source, call or {}, gpu, policy, options, say) if options else plain
        _check_offload(workload, options, policy)
        workload = replace(
            workload,
            # A plan belongs to the pipeline as the user has it, before the cast.
            fingerprint=plain.fingerprint,
            assumptions=(*workload.assumptions, *_notes(options, plain, workload)),
        )
        found.append(Observed(workload=workload, load_options=options))
    return found


def _asked(workload: Workload, policy: Policy) -> tuple[Option, ...]:
    """Return what the policy requires of load strategies, component by component, to be applied."""
    named = {c.name: c for c in workload.components}
    found = []
    for one in (one for one in BUILT_IN if one.kind == "load"):
        for option in (option for option in policy.required if option.strategy == one.name):
            if option.component is not None and option.component not in named:
                raise UnknownName("component", option.component, list(named))
            for name in [option.component] if option.component else list(named):
                refusal = one.refusal(named[name], option.parameters)
                if refusal and option.component:
                    raise InvalidRequest(f"Strategy {one.name} cannot go on {name}: {refusal}")
                if not refusal and not _is_so_already(named[name], option):
                    found.append(replace(option, component=name))
    for name in named:
        reason = conflict_of([option for option in found if option.component == name])
        if reason:
            raise InvalidRequest(f"On {name}, {reason}")
    return tuple(found)


def _check_offload(workload: Workload, options: Sequence[Option], policy: Policy) -> None:
    """Refuse an offload of the whole pipeline that weights stored by *options* do not survive."""
    for asked in policy.required:
        one = strategy(asked.strategy)
        for option in options if one.kind == "pipeline_placement" else ():
            refusal = one.refusal(workload.component(str(option.component)), asked.parameters)
            if refusal:
                raise InvalidRequest(f"Strategy {one.name} cannot be had: {refusal}")


def _notes(options: Sequence[Option], plain: Workload, workload: Workload) -> tuple[str, ...]:
    """Return what predictions of the *workload* that *options* made of *plain* leave out."""
    notes = (
        one.note(option.parameters, plain.component(name), workload.component(name))
        for option in options
        if isinstance(one := strategy(option.strategy), Imitated)
        and (name := str(option.component))
    )
    return tuple(note for note in notes if note)


def _is_so_already(component: Component, option: Option) -> bool:
    """Whether *option* asks for the dtype that the component has, or for one where it has none."""
    return option.strategy == "precision" and component.traits.get("dtype") in (
        None,
        option.parameters.get("dtype"),
    )


def _offered(workload: Workload, gpu: Gpu, policy: Policy) -> tuple[Option, ...]:
    """Return the casts that the quality allows, of which none was asked for."""
    taken = {option.strategy for option in policy.required}
    return tuple(
        Option(strategy=one.name, component=component.name, parameters=parameters)
        for one in BUILT_IN
        if one.kind == "load"
        and one.name not in taken
        and one.name not in policy.forbidden
        and one.quality.rank <= policy.quality.rank
        for component in workload.components
        for parameters in list(one.options(component, workload, gpu))[:1]
    )


@dataclass(frozen=True)
class Source:
    """Where a pipeline comes from: how to recognise it again, and how to get it."""

    name: str
    key: Mapping[str, Any]
    get: Callable[[], tuple[Any, Mapping[str, Any] | None]]
    """Returns the pipeline and its catalogue entry."""
    is_ours: bool
    """pipefit built it, so that tracing may convert it in place."""


def source_of(subject: Any, dtype: Mapping[str, str] | str | None) -> Source:
    """Return where *subject*, a live pipeline, a catalogue name or a folder, comes from.

    Raises:
        UnknownName: for a name that is neither. UnsupportedPipeline, InvalidRequest: see
            :func:`pipefit.planner.apply.check_pipeline`.
    """
    if isinstance(subject, (str, Path)):
        return _named(subject, dtype)
    return _live(subject)


def _named(subject: str | Path, dtype: Mapping[str, str] | str | None) -> Source:
    def get() -> tuple[Any, Mapping[str, Any] | None]:
        from pipefit.planner.build import build_pipeline

        pipe, info = build_pipeline(subject, dtype=dtype)
        return pipe, info.entry

    folder = Path(subject)
    if folder.is_dir():
        content = {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*.json"))
        }
        return Source(folder.name, {"folder": content, "dtype": dtype}, get, True)
    try:
        entry = pipeline_entry(str(subject))
    except UnknownName:
        get()  # says what it is instead: a missing folder, a hub id, a misspelt name
        raise
    return Source(entry["name"], {"entry": entry, "dtype": dtype}, get, True)


def _live(pipe: Any) -> Source:
    from pipefit.planner.apply import check_pipeline

    check_pipeline(pipe)
    key = {"live": type(pipe).__name__, "state": state_digest(pipe)}
    return Source(type(pipe).__name__, key, lambda: (pipe, None), False)


def state_digest(pipe: Any) -> str:
    """Return a hash of everything about a live pipeline that its trace depends on.

    Classes, tensor geometry, and plain attributes of every module: flags such as ``use_tiling``,
    processors, configurations. Not the weights' values.
    """
    import torch

    digest = hashlib.sha256()

    def add(*values: Any) -> None:
        digest.update(repr(values).encode())

    def plain(value: Any, depth: int = 0) -> Any:
        if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
            return value
        if depth < MAX_ATTRIBUTE_DEPTH:
            if isinstance(value, (list, tuple, set, frozenset)):
                return [plain(v, depth + 1) for v in value]
            if isinstance(value, Mapping):
                return [(str(k), plain(v, depth + 1)) for k, v in value.items()]
            if hasattr(value, "__dict__") and not isinstance(value, (type, torch.nn.Module)):
                # Attention processors, configurations: small objects that decide what is computed.
                return [type(value).__qualname__, plain(vars(value), depth + 1)]
        return f"{type(value).__module__}.{type(value).__qualname__}"

    add(plain(dict(pipe.config)))
    # Sizes that the pipeline worked out for itself; what starts with _ changes with every call.
    add(plain({k: v for k, v in vars(pipe).items() if k[0] != "_" and k not in pipe.components}))
    for name, part in sorted(pipe.components.items()):
        config = getattr(part, "config", None)
        add(name, type(part).__name__, plain(dict(config)) if isinstance(config, Mapping) else None)
        if isinstance(part, torch.nn.Module):
            for path, module in part.named_modules():
                own = {k: v for k, v in vars(module).items() if not k.startswith("_")}
                add(path, type(module).__name__, plain(own))
            for path, tensor in (*part.named_parameters(), *part.named_buffers()):
                add(path, tuple(tensor.shape), tensor.stride(), tensor.dtype)
        elif hasattr(part, "model_max_length"):
            add(part.model_max_length)
    return digest.hexdigest()


def _trace(
    source: Source,
    call: Mapping[str, Any],
    gpu: Gpu,
    policy: Policy,
    load_options: Sequence[Option],
    say: Progress,
) -> Workload:
    """Return the workload, from the cache where it is there."""

    def make() -> Workload:
        after = " and ".join(dict.fromkeys(option.strategy for option in load_options))
        say(f"tracing {source.name}{f' after {after}' if after else ''} …")
        return _execute(source, call, gpu, policy, load_options)

    key = {
        **source.key,
        "call": described_call(call),
        "load_options": to_json(tuple(load_options)),
        "compute_capability": gpu.compute_capability,
        "architecture": gpu.architecture,
        "quality": policy.quality.value,
        "required": to_json([o for o in policy.required if strategy(o.strategy).kind == "compute"]),
        "forbidden": sorted(policy.forbidden),
    }
    return cached_trace(json.loads(json.dumps(key, default=str)), make)


def _execute(
    source: Source,
    call: Mapping[str, Any],
    gpu: Gpu,
    policy: Policy,
    load_options: Sequence[Option],
) -> Workload:
    """Get the pipeline, complete the call and trace it with all variants worth considering."""
    from pipefit.planner.build import quietly
    from pipefit.planner.call import default_inputs, resolve_call_defaults
    from pipefit.planner.trace import GPU, trace

    def load(twin: Any) -> None:
        for option in load_options:
            one = strategy(option.strategy)
            if isinstance(one, Imitated):
                one.imitate(twin, option.component, option.parameters)
            else:
                one.apply(twin, option.component, option.parameters, GPU)

    with quietly():
        pipe, entry = source.get()
        arguments = default_inputs(pipe, entry, call)
        shown = resolve_call_defaults(pipe, arguments)
        workload = trace(
            pipe,
            arguments,
            name=source.name,
            traits=traits_of,
            variants=lambda traced: _possible_with(
                load_options,
                compute_variants(replace(traced, call={**traced.call, **shown}), gpu, policy),
            ),
            apply_variant=_apply_parts,
            prepare=load,
            compute_capability=gpu.compute_capability or (8, 9),
            in_place=source.is_ours,
        )
    given = {name: workload.call[name] for name in call if name in workload.call}
    versions = {name: found for name, found in library_versions().items() if found}
    return replace(workload, call={**shown, **given}, versions=versions)


def _possible_with(
    load_options: Sequence[Option], variants: Mapping[str, Sequence[Parts]]
) -> dict[str, list[Parts]]:
    """Return *variants* without those that what was done to a component rules out."""
    return {
        name: [
            parts
            for parts in choices
            if not conflict_of(
                [
                    *(option for option in load_options if option.component == name),
                    *(Option(strategy=key, parameters=parts[key]) for key in parts),
                ]
            )
        ]
        for name, choices in variants.items()
    }


def described_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return *call* as a cache key tells it from others."""
    return {name: _described(value) for name, value in call.items()}


def _described(value: Any) -> Any:
    """Return a call argument as the cache tells it from others: sizes for pictures and tensors."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_described(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _described(v) for k, v in value.items()}
    for attribute in ("shape", "size"):
        size = getattr(value, attribute, None)
        if isinstance(size, tuple):
            kind = getattr(value, "dtype", getattr(value, "mode", ""))
            return [type(value).__name__, list(size), str(kind)]
    return type(value).__name__


def _apply_parts(pipe: Any, component: str, parts: Parts) -> Callable[[], None]:
    """Put compute strategies in force on the weightless twin; return how to take them back."""
    from pipefit.planner.trace import GPU

    with ExitStack() as undo:
        for name, parameters in parts.items():
            undo.callback(strategy(name).apply(pipe, component, parameters, GPU))
        return undo.pop_all().close
