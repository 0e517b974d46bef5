"""What each budget buys with streaming, against diffusers' own ways to fit a pipeline.

    python -m benchmarks.streaming_budgets            # prints the tables
    python -m benchmarks.streaming_budgets --write    # and writes docs/streaming.md
    python -m benchmarks.streaming_budgets flux.1-dev # of one pipeline

Nothing is measured: every budget is planned for one catalogue GPU, and every plan is verified, call
and hooks as they are, on a virtual GPU whose process is held to the budget. "Stock" is the fastest
plan that keeps the same budget with one of diffusers' ways on every component that takes it, and
everything else (tiling, slicing, what the others do) as good as pipefit finds it. About fifteen
minutes on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipefit import plan
from pipefit.cost_models.machine import Machine
from pipefit.cost_models.units import GIB
from pipefit.errors import NoPlanFits
from pipefit.planner.api import verify
from pipefit.planner.catalog import reference_machine
from pipefit.planner.plan import Plan, Verification, call_seconds

DOC = Path(__file__).parent.parent / "docs" / "streaming.md"
BEGIN, END = "<!-- begin: benchmarks.streaming_budgets -->", "<!-- end -->"

PIPELINES = (
    "flux.1-dev",
    "qwen-image",
    "wan2.1-t2v-14b",
    "hunyuan-video",
    "stable-diffusion-xl-base-1.0",
)
CALLS: Mapping[str, Mapping[str, Any]] = {
    "hunyuan-video": {"height": 544, "width": 960, "num_frames": 61},
}
"""Calls other than the catalogue's, whose 129 frames of 720p fit no budget below 18 GB."""

GPU = "rtx-4090"
RAM_BYTES = 128 * 10**9
BUDGETS_GB = range(4, 25, 2)

CLOSE = 0.03
"""By which share the predicted time may differ from the rehearsed one."""

STOCK = {
    "resident": ("resident",),
    "model offload": ("model_offload",),
    "leaves, streamed": ("group_offload:offload_type=leaf_level,use_stream=true",),
    "blocks, streamed": (
        "group_offload:offload_type=block_level,num_blocks_per_group=1,use_stream=true",
    ),
    "leaves, streamed, little RAM": (
        "group_offload:offload_type=leaf_level,use_stream=true,low_cpu_mem_usage=true",
    ),
    "blocks, streamed, little RAM": (
        "group_offload:offload_type=block_level,num_blocks_per_group=1,use_stream=true,"
        "low_cpu_mem_usage=true",
    ),
    "sequential": ("sequential_offload",),
}
"""diffusers' ways -> the strategies that are required for them; streaming is forbidden."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One budget of one pipeline."""

    budget_gb: int
    plan: Plan | None
    stock: str
    stock_s: float | None
    verification: Verification | None

    @property
    def rehearsed_s(self) -> float:
        """The whole call: what was rehearsed, and for each further step the last one again."""
        assert self.verification is not None
        return sum(call_seconds(*phases) for phases in self.verification.phases)

    @property
    def off(self) -> float:
        """By which share the predicted time differs from it."""
        assert self.plan is not None
        return self.plan.prediction.latency.call_s / self.rehearsed_s - 1

    @property
    def rehearsed_bytes(self) -> int:
        """The process at its highest."""
        assert self.verification is not None
        (process_bytes,) = self.verification.process_bytes.values()
        return process_bytes

    def problems(self, before: Row | None) -> list[str]:
        """Say what the row shows that it must not."""
        found = []
        if self.plan is None:
            return ["no plan where stock has one"] if self.stock_s is not None else []
        call_s = self.plan.prediction.latency.call_s
        assert self.verification is not None
        if not self.verification.holds or self.rehearsed_bytes > self.budget_gb * 10**9:
            found.append("over budget")
        if self.stock_s is not None and call_s > self.stock_s:
            found.append(f"{call_s / self.stock_s - 1:.2%} slower than stock")
        if before is not None and before.plan is not None:
            earlier_s = before.plan.prediction.latency.call_s
            if call_s > earlier_s:
                found.append(f"{call_s / earlier_s - 1:.2%} slower than with less memory")
        if abs(self.off) > CLOSE:
            found.append(f"time {self.off:+.1%} of the rehearsal")
        return found


def rows(name: str, machine: Machine) -> Iterator[Row]:
    """Plan and verify *name* at every budget."""
    asked = CALLS.get(name, {})
    for budget_gb in BUDGETS_GB:
        budget = f"{budget_gb}GB"
        stock, stock_s = "nothing fits", None
        for way, required in STOCK.items():
            try:
                found = plan(
                    name,
                    budget,
                    call=asked,
                    machine=machine,
                    with_=required,
                    without=["streaming"],
                    rehearse=False,
                )
            except NoPlanFits:
                continue
            call_s = found.prediction.latency.call_s
            if stock_s is None or call_s < stock_s:
                stock, stock_s = way, call_s
        try:
            chosen = plan(name, budget, call=asked, machine=machine)
        except NoPlanFits:
            chosen = None
        yield Row(
            budget_gb=budget_gb,
            plan=chosen,
            stock=stock,
            stock_s=stock_s,
            verification=None if chosen is None else verify(chosen),
        )


def table(name: str, machine: Machine) -> tuple[list[str], list[str]]:
    """Return the lines of a pipeline's table, and what is wrong in it."""
    lines = [
        f"### {name}",
        "",
        "| budget | plan | a call | stock that fits | a call | rehearsed peak | its time |",
        "|---:|---|---:|---|---:|---:|---:|",
    ]
    wrong: list[str] = []
    before = None
    for row in rows(name, machine):
        stock_s = "" if row.stock_s is None else f"{row.stock_s:.1f} s"
        cells = ["no plan", "", row.stock, stock_s, "", ""]
        if row.plan is not None:
            cells = [
                described(row.plan),
                f"{row.plan.prediction.latency.call_s:.1f} s",
                row.stock,
                stock_s,
                f"{row.rehearsed_bytes / GIB:.2f} GiB",
                f"{row.off:+.1%}",
            ]
        lines.append(f"| {row.budget_gb} GB | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
        wrong += [f"{name} at {row.budget_gb} GB: {text}" for text in row.problems(before)]
        before = row
    return [*lines, ""], wrong


def described(found: Plan) -> str:
    """Say in a few words where the components are."""
    parts = []
    for option in found.options:
        given = option.parameters
        if option.strategy == "streaming":
            word = f"{given['resident_blocks']} blocks stay, {given['num_slots']} slots"
            if given.get("when_idle") == "leave":
                word += f", with {given['load_with']}" if given.get("load_with") else ", leaves"
        elif option.strategy == "group_offload":
            word = given["offload_type"].split("_")[0]
            word += " streamed" if given.get("use_stream") else ""
        elif option.strategy == "vae_tiling":
            word = f"tiles of {given['tile_px']}"
        else:
            word = option.strategy
        parts.append(f"{option.component or 'all'}: {word}")
    return "; ".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, and write them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pipelines", nargs="*", default=PIPELINES)
    parser.add_argument("--write", action="store_true", help="write docs/streaming.md")
    given = parser.parse_args(arguments)
    machine = reference_machine([GPU], ram_bytes=RAM_BYTES)
    text: list[str] = []
    wrong: list[str] = []
    for name in given.pipelines:
        lines, problems = table(name, machine)
        text += lines
        wrong += problems
    for problem in wrong:
        print(problem)
    if given.write and tuple(given.pipelines) != PIPELINES:
        parser.error("--write is for all pipelines together: name none")
    if given.write:
        before, rest = DOC.read_text().split(BEGIN)
        after = rest.split(END)[1]
        DOC.write_text("\n".join([before + BEGIN, "", *text, END + after]))


if __name__ == "__main__":
    main()
