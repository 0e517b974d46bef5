"""Tables for people: a plan, a prediction, a machine, the catalogue.

Everything fits one screen of 100 columns by 40 lines for a pipeline of the usual size, and is plain
text where the output is no terminal. A row shows *process* memory, which is what the budget bounds,
not the allocated bytes that torch reports.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from pipefit.cost_models.machine import Gpu, Machine
from pipefit.cost_models.prediction import PhasePrediction, Prediction
from pipefit.cost_models.units import format_bytes, format_seconds
from pipefit.planner.plan import Plan, PredictedCall, Verification, call_seconds
from pipefit.planner.trace_cache import CacheInfo
from pipefit.strategies.strategy import Option

REPORT_WIDTH = 100
"""Columns of a report that goes to a file or a pipe."""

BAR_WIDTH = 14
"""Characters of a bar: what the other columns of a phase leave of a line."""

REJECTED_WIDTH = 44
"""Characters of a rejected configuration; the rest of the line is for the reason."""

MAX_ASSUMPTIONS = 3
"""Assumptions shown; the JSON has all."""


@dataclass(frozen=True)
class _Bar:
    """How much of a budget is used; more than all of it is shown as all and coloured red."""

    used: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        full, empty = ("#", ".") if options.ascii_only else ("█", "░")
        num_full = min(BAR_WIDTH, round(self.used * BAR_WIDTH))
        style = "red" if self.used > 1 else "yellow" if self.used > 0.95 else "green"
        bar = Text(full * num_full, style=style)
        bar.append(empty * (BAR_WIDTH - num_full), style="dim")
        yield bar.append(f" {self.used:4.0%}", style="default")


def to_text(report: RenderableType, *, width: int = REPORT_WIDTH) -> str:
    """Return *report* as plain text, without colours and without trailing spaces."""
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(report)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def plan_report(plan: Plan) -> RenderableType:
    """Return the plan: verdict, phases against the budget, what goes where and why, what lost."""
    budgets = plan.policy.budget_bytes
    parts: list[RenderableType] = [
        _headline(plan.pipeline, plan.call, plan.machine),
        *(_verdict(plan, device.device) for device in plan.prediction.peak_vram),
        *_rehearsal_line(plan),
        _cost_line(plan.prediction, f"quality {plan.quality.value}"),
        "",
        _phase_table(plan.prediction.phases, budgets),
        "",
        _option_table(plan.options),
        "",
    ]
    if plan.alternatives:
        parts += [_alternative_table(plan), ""]
    if plan.next_quality:
        parts.append(Text(plan.next_quality))
    parts += _assumptions(plan.assumptions)
    return Group(*parts)


def prediction_report(predicted: PredictedCall) -> RenderableType:
    """Return what one given configuration needs, against the whole of each GPU."""
    totals = {gpu.index: gpu.total_bytes for gpu in predicted.machine.gpus}
    parts: list[RenderableType] = [
        _headline(predicted.pipeline, predicted.call, predicted.machine),
        *(
            Text(
                f"GPU {peak.device} peak: {format_bytes(peak.process_bytes)} process "
                f"(+ {format_bytes(peak.slack_bytes)} slack), "
                f"{format_bytes(peak.reserved_bytes)} reserved, "
                f"{format_bytes(peak.allocated_bytes)} allocated"
                + (f", {format_bytes(peak.loading_bytes)} by loading" if peak.loading_bytes else "")
            )
            for peak in predicted.peak_vram
        ),
        *(
            Text(
                f"This does not fit, not even with all {format_bytes(totals[peak.device])} of GPU "
                f"{peak.device}: `pipefit plan` looks for what does.",
                style="red",
            )
            for peak in predicted.peak_vram
            if peak.process_bytes + peak.slack_bytes > totals[peak.device]
        ),
        _cost_line(predicted),
        "",
        _phase_table(predicted.phases, totals, of="of the GPU"),
        "",
    ]
    if predicted.options:
        parts += [_option_table(predicted.options), ""]
    parts += _assumptions(predicted.assumptions)
    return Group(*parts)


def verification_report(verified: Verification) -> RenderableType:
    """Return predicted beside rehearsed peaks, phase by phase, and whether the budget holds."""
    plan, rehearsal = verified.plan, verified.rehearsal
    several = len(plan.gpus) > 1
    budget = " and ".join(
        format_bytes(plan.policy.budget_bytes[gpu.index]) + f" on GPU {gpu.index}" * several
        for gpu in plan.gpus
    )
    held = " and ".join(
        format_bytes(held_bytes) + f" on GPU {index}" * several
        for index, held_bytes in verified.process_bytes.items()
    )
    verdict = Text(
        f"the budget of {budget} holds: the process has {held} at its peak"
        if verified.holds
        else f"the budget of {budget} does NOT hold: the process needs {held} at its peak",
        style="green" if verified.holds else "red",
    )
    gpu_column = [">GPU"] * several
    memory = _table(
        *gpu_column, "phase", "component", ">predicted", ">allocated", ">predicted", ">reserved"
    )
    time = _table(
        *gpu_column,
        *("phase", "component", ">calls", ">predicted", ">rehearsed", ">to GPU", ">to host"),
    )
    for predicted, phase in verified.phases:
        memory.add_row(
            *[str(phase.device)] * several,
            phase.name,
            phase.component,
            format_bytes(predicted.allocated_bytes) if predicted else "",
            format_bytes(phase.allocated_bytes),
            format_bytes(predicted.reserved_bytes) if predicted else "",
            format_bytes(phase.reserved_bytes),
        )
        computes = not several or bool(predicted and predicted.seconds)
        time.add_row(
            *[str(phase.device)] * several,
            phase.name,
            phase.component,
            str(predicted.calls if predicted else phase.calls),
            format_seconds(predicted.seconds) if predicted and computes else "",
            format_seconds(call_seconds(predicted, phase)) if computes else "",
            format_bytes(phase.copies.to_gpu_bytes),
            format_bytes(phase.copies.to_host_bytes),
        )
    notes = [
        "Peaks as torch counts them, predicted and rehearsed; the context of "
        f"{format_bytes(rehearsal.context_bytes)} comes on top.",
        f"Host memory of tensors {format_bytes(rehearsal.host_bytes)}, page-locked "
        f"{format_bytes(rehearsal.pinned_bytes)}; placed before the call "
        f"{format_bytes(rehearsal.placing.to_gpu_bytes)}.",
        "A call of three denoising steps at most was executed: that much was copied, and what more "
        "steps would take is the last one's time.",
    ]
    notes += [f"torch: {verified.out_of_memory}"] if verified.out_of_memory else []
    notes += [
        f"{where} read {count} values that only real weights give; zero was taken."
        for where, count in rehearsal.unknown_reads.items()
    ]
    return Group(
        _headline(plan.pipeline, rehearsal.call, plan.machine),
        verdict,
        "",
        memory,
        "",
        time,
        "",
        *(Text(f"· {note}") for note in notes),
    )


def machine_report(machine: Machine) -> RenderableType:
    """Return the GPUs, the host and what could not be found out."""
    table = _table("GPU", "name", ">total", ">free", ">others", "compute", "PCIe", ">bandwidth")
    for gpu in machine.gpus:
        table.add_row(
            str(gpu.index),
            gpu.name,
            format_bytes(gpu.total_bytes),
            format_bytes(gpu.free_bytes),
            format_bytes(gpu.other_bytes),
            ".".join(map(str, gpu.compute_capability)) if gpu.compute_capability else "?",
            _slot(gpu),
            f"{gpu.memory_bytes_per_s / 1e9:.0f} GB/s" if gpu.memory_bytes_per_s else "?",
        )
    host = machine.host
    lines = [
        f"Host: {format_bytes(host.available_bytes)} of {format_bytes(host.total_bytes)} RAM "
        f"available, {format_bytes(host.pinnable_bytes)} can be pinned, {host.num_cores} cores",
        *(
            f"Link: GPU {link.first} and {link.second}, {link.kind}, "
            f"{link.bytes_per_s / 1e9:.0f} GB/s"
            for link in machine.links
        ),
        *(f"Note: {note}" for note in machine.notes),
    ]
    gpus = table if machine.gpus else Text("No GPU was found.")
    return Group(gpus, *map(Text, lines))


def catalogue_report(catalogue: Mapping[str, Sequence[Mapping[str, Any]]]) -> RenderableType:
    """Return the names of the known pipelines and GPUs."""
    pipelines = _table("pipeline", "class", "task")
    for entry in catalogue["pipelines"]:
        pipelines.add_row(
            entry["name"], str(entry.get("pipeline_class", "")), str(entry.get("task", ""))
        )
    gpus = _table("GPU", ">memory", "architecture")
    for entry in catalogue["gpus"]:
        total_bytes = entry.get("total_bytes")
        gpus.add_row(
            entry["name"],
            format_bytes(total_bytes) if total_bytes else "",
            str(entry.get("architecture", "")),
        )
    return Group(pipelines, gpus)


def cache_report(held: CacheInfo) -> RenderableType:
    """Return what lies in the cache."""
    table = _table("kept", ">number", ">size", "limit")
    entries = format_bytes(held.entries_bytes), format_bytes(held.limit_bytes)
    table.add_row("traces and rehearsals", str(held.num_entries), *entries)
    shards = format_bytes(held.checkpoints_bytes)
    table.add_row("weights in shards, by component", str(held.num_checkpoints), shards, "none")
    return Group(f"In {held.folder}:", table)


def describe_option(option: Option) -> str:
    """Return an option in short, without its component, what it leaves off, and tables of facts.

    >>> describe_option(Option(strategy="vae_tiling", parameters={"tile_px": 512, "stream": False}))
    'vae_tiling: tile_px=512'
    >>> describe_option(Option(strategy="group_offload", parameters={"block_modules": ["encoder"]}))
    'group_offload: block_modules=encoder'
    """
    parts = [
        name if value is True else f"{name}={'+'.join(value) if isinstance(value, list) else value}"
        for name, value in option.parameters.items()
        if value is not None and value is not False and not isinstance(value, dict)
    ]
    return f"{option.strategy}: {', '.join(parts)}" if parts else option.strategy


def _headline(pipeline: str, call: Mapping[str, Any], machine: Machine) -> Text:
    gpus = ", ".join(gpu.name for gpu in machine.gpus) or "no GPU"
    line = Text(pipeline, style="bold")
    line.append(f" on {gpus}", style="default")
    arguments = ", ".join(f"{k}={_shortened(v)}" for k, v in call.items())
    return line.append(f"\ncall: {arguments or 'all defaults'}", style="not bold dim")


def _shortened(value: Any, limit: int = 32) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _verdict(plan: Plan, device: int) -> Text:
    budget_bytes = plan.policy.budget_bytes.get(device, 0)
    peak = next(p for p in plan.prediction.peak_vram if p.device == device)
    phases = [p for p in plan.prediction.phases if p.device == device]
    where = max(phases, key=lambda p: p.process_bytes).name if phases else "no phase"
    left_bytes = budget_bytes - peak.process_bytes - peak.slack_bytes
    fits = left_bytes >= 0
    return Text.assemble(
        ("fits" if fits else "DOES NOT FIT", "bold green" if fits else "bold red"),
        f": GPU {device} peaks at {format_bytes(peak.process_bytes)} in {where} "
        f"(+ {format_bytes(peak.slack_bytes)} slack), budget {format_bytes(budget_bytes)}, "
        f"{format_bytes(abs(left_bytes))} {'left' if fits else 'over'}",
    )


def _rehearsal_line(plan: Plan) -> list[RenderableType]:
    """Say what the rehearsal held beside what was predicted, or why there was none."""
    if plan.rehearsal is None:
        reason = plan.not_rehearsed
        return [Text(f"not rehearsed: {reason}", style="yellow")] if reason else []
    found: list[RenderableType] = []
    for gpu in plan.gpus:
        peak = plan.rehearsal.peak_on(gpu.index)
        predicted = next(
            p
            for p in plan.prediction.phases
            if (p.component, p.entry, p.device) == (peak.component, peak.entry, gpu.index)
        )
        where = f" on GPU {gpu.index}" if len(plan.gpus) > 1 else ""
        found.append(
            Text(
                f"rehearsed: {format_bytes(peak.process_bytes)} in {peak.name}{where}, "
                f"predicted {format_bytes(predicted.process_bytes)}"
            )
        )
    return found


def _cost_line(prediction: Prediction, *more: str) -> Text:
    latency = prediction.latency
    costs = [
        f"{format_seconds(latency.call_s)} a call "
        f"({format_seconds(latency.low_s)} to {format_seconds(latency.high_s)}), "
        f"the first {format_seconds(latency.first_call_s)}",
        f"host RAM {format_bytes(prediction.host_ram_bytes)}",
    ]
    if prediction.pinned_bytes:
        costs.append(f"{format_bytes(prediction.pinned_bytes)} of it pinned")
    if prediction.disk_bytes:
        costs.append(f"disk {format_bytes(prediction.disk_bytes)}")
    return Text("; ".join([*costs, *more]))


def _phase_table(
    phases: Sequence[PhasePrediction], bounds: Mapping[int, int], *, of: str = "of the budget"
) -> Table:
    several = len({p.device for p in phases}) > 1
    columns = ["phase", "component", ">calls", ">peak", of, ">weights", ">activ.", ">time"]
    table = _table(*[">GPU"] * several, *columns)
    for phase in phases:
        bound_bytes = bounds.get(phase.device)
        used = phase.process_bytes / bound_bytes if bound_bytes else 0.0
        table.add_row(
            *[str(phase.device)] * several,
            phase.name,
            phase.component,
            str(phase.calls),
            format_bytes(phase.process_bytes),
            (f"{used:.0%}" if several else _Bar(used)) if bound_bytes else "",
            format_bytes(phase.weights_bytes),
            format_bytes(phase.activation_bytes),
            # With several GPUs a phase has a row for each, of which one computes.
            format_seconds(phase.seconds) if phase.seconds or not several else "",
        )
    return table


def _option_table(options: Sequence[Option]) -> Table:
    """One row for all components that do the same for the same reason; a prediction has none."""
    has_reasons = any(option.reason for option in options)
    table = _table("component", "strategy", *["why"] * has_reasons)
    components: dict[tuple[str, str], list[str]] = {}
    for option in options:
        row = (describe_option(option), option.reason)
        components.setdefault(row, []).append(option.component or "whole pipeline")
    for (strategy, reason), names in components.items():
        table.add_row(", ".join(names), strategy, *[reason] * has_reasons)
    return table


def _alternative_table(plan: Plan) -> Table:
    """One line each: what an alternative does that the plan does not."""
    table = _table("rejected", ">peak", ">time", "because")
    table.columns[0].no_wrap = True
    table.columns[0].max_width = REJECTED_WIDTH
    for alternative in plan.alternatives:
        other = [o for o in alternative.options if not any(_same(o, mine) for mine in plan.options)]
        table.add_row(
            "; ".join(
                describe_option(o) + (f" @{o.component}" if o.component else "")
                for o in other or alternative.options
            ),
            format_bytes(alternative.process_bytes),
            format_seconds(alternative.call_s),
            alternative.rejected_because,
        )
    return table


def _same(first: Option, second: Option) -> bool:
    return replace(first, reason="") == replace(second, reason="")


def _assumptions(assumptions: Sequence[str]) -> list[RenderableType]:
    lines = [f"· {assumption}" for assumption in assumptions[:MAX_ASSUMPTIONS]]
    if len(assumptions) > MAX_ASSUMPTIONS:
        lines.append(f"· and {len(assumptions) - MAX_ASSUMPTIONS} more in the JSON")
    return [Text(line, style="dim") for line in lines]


def _slot(gpu: Gpu) -> str:
    if gpu.pcie_generation is None or gpu.pcie_lanes is None:
        return "?"
    return f"{gpu.pcie_generation}.0 x{gpu.pcie_lanes}"


def _table(*columns: str) -> Table:
    """Return an empty table; a column whose name starts with ``>`` is aligned to the right."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
        header_style="bold",
    )
    for column in columns:
        right = column.startswith(">")
        table.add_column(
            column.removeprefix(">"),
            justify="right" if right else "left",
            no_wrap=right or column == "phase",
            overflow="ellipsis" if column == "rejected" else "fold",
        )
    return table
