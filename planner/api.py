"""The public calls, and the road that each of them takes.

pipe, call ──trace──▶ Workload ┐
hardware ──probe──▶ Machine    ├─▶ options ─▶ predictions ─▶ search ─▶ Plan ─▶ apply
budget, quality ──▶ Policy     ┘                                     ▲          │
                                                                     └ rehearse ┘
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipefit.cost_models.machine import Gpu, Machine
from pipefit.cost_models.sharing import Models
from pipefit.cost_models.units import parse_bytes
from pipefit.errors import ApplyFailed, InvalidRequest, PlanMismatch
from pipefit.planner.decide import decide
from pipefit.planner.devices import DevicePricing, price_devices
from pipefit.planner.options import check_required, process_options
from pipefit.planner.plan import Plan, PredictedCall, Rehearsal, Verification
from pipefit.planner.policy import (
    BudgetRequest,
    Policy,
    budget_notes,
    check_strategy_name,
    parse_budget,
    parse_quality,
    parse_strategy_spec,
)
from pipefit.planner.pricing import Pricing, Shared, plan_options
from pipefit.planner.probe import cpu_machine, probe
from pipefit.planner.rehearsals import Rehearser
from pipefit.planner.stock_maps import stock
from pipefit.planner.workloads import Observed, Progress, observe, source_of
from pipefit.strategies import BUILT_IN, quality_of
from pipefit.strategies.device_map import devices_of
from pipefit.strategies.strategy import Option, Quality

if TYPE_CHECKING:
    from pipefit.planner.apply import Applied

Strategies = Sequence[str | Option]
"""Options, or their text as on the command line: ``"vae_tiling:tile_px=512@vae"``."""


def auto_optimize(
    pipe: Any,
    vram_budget: BudgetRequest = None,
    *,
    call: Mapping[str, Any] | None = None,
    quality: str | Quality = Quality.HIGH,
    device: str | int | None = None,
    dry_run: bool = False,
    with_: Strategies = (),
    without: Sequence[str] = (),
    compile: bool = False,
    ram: str | int | float | None = None,
    rehearse: bool | None = None,
    progress: Progress | None = None,
) -> Applied | Plan:
    """Plan *pipe* for *vram_budget* and put the plan in force.

    Args:
        pipe: a loaded diffusers pipeline, its weights on the CPU or on a GPU.
        vram_budget: bound on the process's memory on the GPU: ``"8GB"``, ``"7.5GiB"``, ``"80%"``,
            bytes; or a dict by device index, for a plan over all the GPUs that it names. None: what
            is free now.
        call: the arguments that ``pipe(...)`` will be called with; missing ones take its defaults.
        quality: the lowest level that the plan may go to: exact, high, balanced or low.
        device: the GPU, as torch names it; None: the first. ``"cpu"`` lets the CPU stand for it.
        dry_run: return the :class:`Plan` and touch nothing.
        with_, without: strategies that the plan must or must not use.
        compile: allow strategies that compile, whose first call takes up to minutes.
        ram: bound on host RAM.
        rehearse: check the predicted peaks by executing the plan on a virtual GPU, and take the
            next candidate where the budget would be broken. None: where it takes 5 s at most.
        progress: called with one line of text before anything that takes long.

    Returns:
        What is in force, with ``plan`` and ``undo()``; usable as a context manager.

    Raises:
        InvalidRequest: something asked for cannot be understood; nothing was changed.
        UnsupportedPipeline: the pipeline cannot be planned for.
        NoPlanFits: nothing keeps the budget; carries the smallest budget that works.
        ApplyFailed: applying failed and was undone; or a rehearsal that was asked for fails.
    """
    machine, budget = machine_and_budget(device, vram_budget)
    made = plan(
        pipe,
        budget,
        call=call,
        machine=machine,
        quality=quality,
        ram=ram,
        with_=with_,
        without=without,
        compile=compile,
        rehearse=rehearse,
        progress=progress,
    )
    return made if dry_run else apply(pipe, made)


def plan(
    pipe_or_name: Any,
    vram_budget: BudgetRequest = None,
    *,
    call: Mapping[str, Any] | None = None,
    machine: Machine | None = None,
    quality: str | Quality = Quality.HIGH,
    dtype: Mapping[str, str] | str | None = None,
    ram: str | int | float | None = None,
    with_: Strategies = (),
    without: Sequence[str] = (),
    compile: bool = False,
    rehearse: bool | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Return the best plan for a pipeline, catalogue name or folder; nothing is moved.

    A budget for several GPUs, or one size for a machine that has several, makes a plan over them.
    *machine* is this one unless given (:func:`pipefit.planner.catalog.reference_machine` makes
    others). *dtype* is the load dtype of a name or folder, of all components or by component.

    *compile*, *rehearse* and the errors are as in :func:`auto_optimize`. What a rehearsal held is
    in ``Plan.rehearsal``, and what it refuted among the alternatives.
    """
    machine = probe() if machine is None else machine
    return plan_by(
        policy_of(vram_budget, machine, quality, ram, with_, without, compile),
        pipe_or_name,
        call=call,
        machine=machine,
        dtype=dtype,
        rehearse=rehearse,
        progress=progress,
    )


def plan_by(
    policy: Policy,
    pipe_or_name: Any,
    *,
    call: Mapping[str, Any] | None,
    machine: Machine,
    dtype: Mapping[str, str] | str | None,
    rehearse: bool | None,
    progress: Progress | None,
) -> Plan:
    """Return the best plan under *policy*; all else is as in :func:`plan`."""
    _check_devices(policy.required, policy.budget_bytes)
    device = min(policy.budget_bytes) if len(policy.budget_bytes) == 1 else None
    gpus = {g.index: g for g in machine.gpus if g.index in policy.budget_bytes}
    shared: Shared = {}

    def seen_on(gpu: Gpu, at: Policy) -> list[Observed]:
        found = observe(pipe_or_name, call, gpu=gpu, policy=at, dtype=dtype, progress=progress)
        check_required(found[0].workload, at, gpu)
        return found

    def pricings(at: Policy) -> list[Pricing | DevicePricing]:
        if device is not None:
            seen = seen_on(gpus[device], at)
            switches = [process_options(s.workload, gpus[device], at, machine.host) for s in seen]
            return [
                _priced(s, gpus[device], machine, on, shared)
                for s, on in zip(seen, switches, strict=True)
            ]
        return price_devices(
            lambda gpu: seen_on(gpu, at),
            lambda s, gpu, on, models: _priced(s, gpu, machine, on, models=models),
            machine,
            at.budget_bytes,
            at,
        )

    return decide(
        pricings(policy),
        policy=policy,
        machine=machine,
        device=device,
        lower=[
            (level, functools.partial(pricings, replace(policy, quality=level)))
            for level in _lower_levels(policy.quality)
        ],
        extra_ram_bytes=_weights_in_ram_bytes(pipe_or_name),
        rehearse=None
        if rehearse is False
        else Rehearser(
            source=source_of(pipe_or_name, dtype),
            call=call or {},
            gpus=machine.gpus if device is None else [gpus[device]],
            links=machine.links,
            is_asked_for=bool(rehearse),
            progress=progress,
        ),
    )


def predict(
    pipe_or_name: Any,
    strategies: Strategies = (),
    *,
    call: Mapping[str, Any] | None = None,
    machine: Machine | None = None,
    dtype: Mapping[str, str] | str | None = None,
    progress: Progress | None = None,
) -> PredictedCall:
    """Return what exactly *strategies* need; with none, everything is resident.

    Raises:
        InvalidRequest: if a strategy is refused where it was asked for, or two contradict.
    """
    machine = probe() if machine is None else machine
    if not machine.gpus:
        raise InvalidRequest(
            "A prediction needs a GPU, and none was found: name one of the catalogue (rtx-4060)."
        )
    gpu = machine.gpus[0]
    policy = Policy(
        budget_bytes={gpu.index: gpu.total_bytes},
        quality=Quality.LOW,
        required=_options(strategies),
        # Nothing is chosen here: what is not asked for is not traced either.
        forbidden=tuple(
            s.name for s in BUILT_IN if s.name not in {o.strategy for o in _options(strategies)}
        ),
    )
    totals = {one.index: one.total_bytes for one in machine.gpus}
    _check_devices(policy.required, totals)
    seen = observe(pipe_or_name, call, gpu=gpu, policy=policy, dtype=dtype, progress=progress)[-1]
    required, main = stock(policy.required, seen.workload, machine)
    policy = replace(policy, required=required)
    check_required(seen.workload, policy, gpu)
    switches = process_options(seen.workload, gpu, policy, machine.host)
    pricing: Pricing | DevicePricing = _priced(seen, gpu, machine, switches)
    if any(option.strategy == "device_map" for option in policy.required):
        pricing = DevicePricing(
            seen.workload, machine, totals, main, lambda on: _priced(seen, on, machine, switches)
        )
    picks = pricing.exactly(policy.required)
    prediction = pricing.prediction(picks, pricing.replay(picks))
    return PredictedCall(
        **{name: getattr(prediction, name) for name in prediction.__dataclass_fields__},
        pipeline=seen.workload.pipeline,
        call=seen.workload.call,
        machine=machine,
        options=plan_options(pricing.fixed_options, picks),
    )


def _priced(
    seen: Observed,
    gpu: Gpu,
    machine: Machine,
    switches: Sequence[Option],
    shared: Shared | None = None,
    models: Models | None = None,
) -> Pricing:
    return Pricing(
        seen.workload,
        gpu,
        load_options=seen.load_options,
        process_options=switches,
        held_bytes=seen.held_bytes,
        shared=shared,
        num_cores=machine.host.num_cores,
        disk_bytes_per_s=machine.host.disk_bytes_per_s,
        ram_bytes=machine.host.available_bytes,
        models=models,
    )


def apply(pipe: Any, plan: Plan) -> Applied:
    """Put a plan in force on *pipe*, which must be the pipeline that it was made for.

    Raises:
        PlanMismatch: if it is another one.
        ApplyFailed: if it failed half-way; it was undone.
    """
    from pipefit.planner.apply import check_pipeline

    check_pipeline(pipe)
    _check_fingerprint(pipe, plan)
    return put_in_force(pipe, plan)


def put_in_force(pipe: Any, plan: Plan, *, loaded: Sequence[Option] = ()) -> Applied:
    """Put a plan in force but for what was done while *pipe* was *loaded*.

    Raises:
        ApplyFailed: if it failed half-way; it was undone.
    """
    from pipefit.planner.apply import apply_options
    from pipefit.planner.guard import hold_to_budget

    device = torch_device(plan.gpu)
    applied = apply_options(pipe, plan.options, device, plan=plan, loaded=loaded)
    try:
        for gpu, peak in zip(plan.gpus, plan.prediction.peak_vram, strict=True):
            applied.also_undo(
                hold_to_budget(
                    torch_device(gpu),
                    budget_bytes=plan.policy.budget_bytes[gpu.index],
                    context_bytes=peak.context_bytes,
                )
            )
    except BaseException:
        applied.undo()
        raise
    return applied


def verify(
    plan: Plan,
    pipe_or_name: Any = None,
    *,
    call: Mapping[str, Any] | None = None,
    dtype: Mapping[str, str] | str | None = None,
    timeline: str | Path | None = None,
) -> Verification:
    """Execute the planned call with the real hooks on a virtual GPU, and say if the budget holds.

    Nothing is loaded or moved. *pipe_or_name* is what the plan was made for (a live pipeline or a
    folder; None: the catalogue pipeline that it names), *call* and *dtype* are as then; the call is
    the plan's own unless given, and is cut to three denoising steps. *timeline* names a file for
    what happened when, on a virtual clock (see :mod:`pipefit.planner.timeline`).

    Raises:
        PlanMismatch: if it is another pipeline.
        InvalidRequest: also where the file cannot be written.
        UnknownName, InvalidRequest, UnsupportedPipeline, TraceError, ApplyFailed: as :func:`plan`
            and :func:`apply`.
    """
    import torch

    from pipefit.planner.build import quietly
    from pipefit.planner.call import default_inputs
    from pipefit.planner.rehearse import rehearse
    from pipefit.planner.timeline import Timeline

    source = source_of(plan.pipeline if pipe_or_name is None else pipe_or_name, dtype)
    budgets = {gpu.index: plan.policy.budget_bytes[gpu.index] for gpu in plan.gpus}
    # With several, a GPU's place on the virtual machine is its index.
    gpus = plan.machine.gpus if len(budgets) > 1 else plan.gpus

    def rehearsed(gpus: Sequence[Gpu], budgets: Mapping[int, int]) -> Rehearsal:
        with quietly():
            pipe, entry = source.get()
            _check_fingerprint(pipe, plan)
            arguments = default_inputs(pipe, entry, plan.call if call is None else call)
            kept = None if timeline is None else Timeline()
            found = rehearse(
                pipe,
                plan.options,
                arguments,
                gpus,
                budget_bytes=budgets,
                main=plan.gpu.index if len(gpus) > 1 else None,
                links=plan.machine.links,
                timeline=kept,
                in_place=source.is_ours,
                num_cores=plan.machine.host.num_cores,
            )
        if kept is not None:
            kept.write(Path(str(timeline)))
        return found

    try:
        return Verification(plan, rehearsed(gpus, budgets))
    except (torch.OutOfMemoryError, ApplyFailed) as error:
        cause = error.__cause__ if isinstance(error, ApplyFailed) else error
        if not isinstance(cause, torch.OutOfMemoryError):
            raise
        full = str(cause)
    # Once more where there is room: how much would it have been?
    unbounded = rehearsed(
        [replace(gpu, total_bytes=_ROOM_BYTES, other_bytes=0) for gpu in gpus],
        dict.fromkeys(budgets, _ROOM_BYTES),
    )
    return Verification(plan, unbounded, out_of_memory=full)


_ROOM_BYTES = 1 << 50
"""More than any GPU has."""


def _check_fingerprint(pipe: Any, plan: Plan) -> None:
    from pipefit.planner.trace import fingerprint
    from pipefit.strategies.describe import describe_component
    from pipefit.strategies.live import module_components

    components = [
        describe_component(name, part, {}) for name, part in module_components(pipe).items()
    ]
    found = fingerprint(type(pipe).__name__, components)
    if found != plan.fingerprint:
        raise PlanMismatch(
            f"The plan was made for a pipeline with fingerprint {plan.fingerprint}, but this "
            f"{type(pipe).__name__} has {found}: give the pipeline or folder that it was made for, "
            "or plan again for this one."
        )


def _machine_of(device: str | int | None) -> tuple[Machine, int | None]:
    """Return the machine to plan for and the index of the GPU asked for; None: the first."""
    if device is None or str(device) in ("cuda", "xpu", "mps"):
        return probe(), None
    if str(device) == "cpu":
        return cpu_machine(), 0
    machine = probe()
    kind, _, index = str(device).rpartition(":")
    if not index.isdigit() or kind not in ("", "cuda", "xpu", "mps"):
        raise InvalidRequest(
            f'The device {device!r} was not understood: write an index, "cuda:0" or "cpu".'
        )
    if int(index) not in {gpu.index for gpu in machine.gpus}:
        there = ", ".join(str(gpu.index) for gpu in machine.gpus) or "none"
        raise InvalidRequest(f"The device {device!r} is not there: the GPUs found are {there}.")
    return machine, int(index)


def machine_and_budget(
    device: str | int | None, budget: BudgetRequest
) -> tuple[Machine, BudgetRequest]:
    """Return what is here, and *budget* for the one GPU *device*: the first unless it is said."""
    machine, index = _machine_of(device)
    if index is None and machine.gpus:
        index = machine.gpus[0].index
    return machine, _on_device(budget, machine, index)


def _on_device(budget: BudgetRequest, machine: Machine, index: int | None) -> BudgetRequest:
    """Return *budget* for one GPU only, unless it names GPUs itself."""
    names_gpus = isinstance(budget, Mapping) or (isinstance(budget, str) and "=" in budget)
    if index is None or names_gpus or not machine.gpus:
        return budget
    if budget is None:
        budget = next(gpu.free_bytes for gpu in machine.gpus if gpu.index == index)
    return {index: budget} if isinstance(budget, (str, int, float)) else budget


def torch_device(gpu: Gpu) -> str:
    """Return how torch names *gpu*."""
    kinds = {"cpu": "cpu", "apple": "mps"}
    if gpu.architecture in kinds:
        return kinds[gpu.architecture]
    return f"{'xpu' if gpu.architecture.startswith('xe') else 'cuda'}:{gpu.index}"


def _options(strategies: Strategies) -> tuple[Option, ...]:
    """Return *strategies* as options.

    Raises:
        UnknownName: for a strategy that does not exist.
    """
    names = [s.name for s in BUILT_IN]
    found: list[Option] = []
    for one in [strategies] if isinstance(strategies, str) else strategies:
        if isinstance(one, Option):
            check_strategy_name(one.strategy, names)
            found.append(one)
        else:
            found += parse_strategy_spec(one, strategies=names)
    return tuple(found)


def policy_of(
    budget: BudgetRequest,
    machine: Machine,
    quality: str | Quality,
    ram: str | int | float | None,
    with_: Strategies,
    without: Sequence[str],
    compile_allowed: bool,
) -> Policy:
    """Return what was asked for, understood and free of contradictions.

    Raises:
        InvalidRequest, UnknownName: naming what was not understood.
    """
    names = [s.name for s in BUILT_IN]
    unwanted = [without] if isinstance(without, str) else without
    required, forbidden = _options(with_), tuple(check_strategy_name(n, names) for n in unwanted)
    budgets = parse_budget(budget, machine)
    level = parse_quality(quality)
    for option in required:
        needed = quality_of(option)
        if needed.rank > level.rank:
            raise InvalidRequest(
                f"Strategy {option.strategy} is of quality {needed.value}, but quality "
                f"{level.value} was asked for: drop it, or ask for {needed.value}."
            )
    both = {o.strategy for o in required} & set(forbidden)
    if both:
        raise InvalidRequest(
            f"Strategy {', '.join(sorted(both))} is both required and forbidden: drop one of them."
        )
    return Policy(
        budget_bytes=budgets,
        ram_bytes=None if ram is None else parse_bytes(ram, total_bytes=machine.host.total_bytes),
        quality=level,
        required=required,
        forbidden=forbidden,
        compile_allowed=compile_allowed,
        notes=budget_notes(budget, machine),
    )


def _check_devices(required: Sequence[Option], budgets: Mapping[int, int]) -> None:
    """Refuse a device map onto GPUs that there is no budget for.

    Raises:
        InvalidRequest: naming those that there are.
    """
    for option in required:
        named = devices_of(option.parameters) if option.strategy == "device_map" else ()
        for index in named:
            if index not in budgets:
                there = ", ".join(map(str, sorted(budgets)))
                raise InvalidRequest(
                    f"device_map names GPU {index}, which the budget does not: it is for {there}."
                )


def _lower_levels(quality: Quality) -> list[Quality]:
    """Return the levels below, the next one first; at each some strategy is offered."""
    return [level for level in Quality if level.rank > quality.rank]


def _weights_in_ram_bytes(subject: Any) -> int:
    """Return the RAM that a live pipeline's weights hold already."""
    if isinstance(subject, (str, Path)):
        return 0
    from pipefit.strategies.live import module_components

    return sum(
        tensor.numel() * tensor.element_size()
        for module in module_components(subject).values()
        for tensor in module.parameters()
        if tensor.device.type == "cpu"
    )
