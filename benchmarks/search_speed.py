"""How long the exact search takes.

Run with ``python -m benchmarks.search_speed``. Two families of instances of six components with 200
candidates each and eight phases, a fixed set of seeds and budgets from just above the smallest that
works to two and a half times as much:

* ``placement``: a component weighs on every phase with what stays resident, on its own phase with
  its activations too, and is slower the less it keeps on the GPU. Plans look like this.
* ``adversarial``: independent random bytes in all eight phases, which no pipeline has: hardly
  anything is dominated, and eight constraints bind at once.

And ``catalogue``: four pipelines of the catalogue, every strategy in play (quality low, compiling
allowed) on an RTX 4090, within 6, 8 … 24 GB. Their traces are made first, if they are not
remembered: minutes.

And ``devices``: a plan over sixteen uneven GPUs, of two kinds and of sixteen, pricing and search;
the goal is 2 s for both. ``python -m benchmarks.search_speed --only-devices`` prints these alone.

Printed are the median, the 90th percentile and the worst, in milliseconds of this process, of the
search alone; pricing the candidates comes before. The goal is 100 ms with all strategies. The
constants of the search were chosen on the seeds of the first two, so other instances may do worse.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.sharing import Models
from pipefit.planner.catalog import reference_machine
from pipefit.planner.decide import Candidates, limits_of
from pipefit.planner.devices import price_devices
from pipefit.planner.options import process_options
from pipefit.planner.policy import Policy
from pipefit.planner.pricing import Pricing, Shared
from pipefit.planner.search import Candidate, Limits, Problem, search, smallest_budget
from pipefit.planner.workloads import Observed, observe
from pipefit.strategies.strategy import Option, Quality

NUM_COMPONENTS, NUM_CANDIDATES, NUM_PHASES = 6, 200, 8
GB = 10**9
BUDGET_FACTORS = (1.02, 1.1, 1.3, 1.6, 2.5)
PIPELINES = ("flux.1-dev", "stable-diffusion-xl-base-1.0", "wan2.2-t2v-a14b", "qwen-image")
BUDGETS_GB = range(6, 25, 2)
SIXTEEN = {
    "two kinds": ("rtx-4090", "rtx-3090") * 8,
    "sixteen kinds": (
        "rtx-4090", "rtx-3090", "rtx-4080", "rtx-3080-10gb", "a100-40gb", "l4", "rtx-4060",
        "rtx-3060-12gb", "rtx-4070", "rtx-3070", "t4", "v100-16gb", "a10g", "l40s", "rtx-5090",
        "rtx-2080-ti",
    ),
}  # fmt: skip
SIXTEEN_PIPELINES = ("flux.1-dev", "wan2.2-t2v-a14b")


def placement(rng: np.random.Generator, component: int, index: int) -> Candidate:
    """Return one way to place and run a component that weighs 2, 4 … 12 GB."""
    weight_bytes = 2 * GB * (component + 1)
    streamed, activations = rng.random(), rng.random()
    resident_bytes = round(weight_bytes * (1 - streamed))
    stays = rng.random() < 0.5
    phase_bytes = np.full(NUM_PHASES, resident_bytes if stays else 0)
    phase_bytes[component] = resident_bytes + round(3 * GB * activations)
    return Candidate(
        key=f"{index:03}",
        phase_bytes=tuple(map(int, phase_bytes)),
        call_s=2 * streamed * (component + 1) + 3 * (1 - activations) + 0.2 * (not stays),
        host_bytes=weight_bytes - resident_bytes,
        pinned_bytes=(weight_bytes - resident_bytes) * int(rng.integers(2)),
        quality_rank=int(rng.integers(3)),
        num_strategies=int(rng.integers(4)),
    )


def adversarial(rng: np.random.Generator, component: int, index: int) -> Candidate:
    """Return a candidate with independent random figures."""
    return Candidate(
        key=f"{index:03}",
        phase_bytes=tuple(int(b) for b in rng.integers(0, GB, NUM_PHASES)),
        call_s=float(rng.random()),
        host_bytes=int(rng.integers(GB)),
        pinned_bytes=int(rng.integers(GB)),
        quality_rank=int(rng.integers(3)),
        num_strategies=int(rng.integers(4)),
    )


def problem(family: Callable[..., Candidate], seed: int) -> Problem:
    """Return one instance."""
    rng = np.random.default_rng(seed)
    return Problem(
        name="mixed",
        phases=tuple(f"phase_{i}" for i in range(NUM_PHASES)),
        base_bytes=tuple(int(b) for b in rng.integers(0, GB // 10, NUM_PHASES)),
        components={
            f"component_{c}": [family(rng, c, i) for i in range(NUM_CANDIDATES)]
            for c in range(NUM_COMPONENTS)
        },
    )


def measure(family: Callable[..., Candidate], num_seeds: int) -> list[float]:
    """Return the milliseconds of each search."""
    taken_ms = []
    for seed in range(num_seeds):
        instance = problem(family, seed)
        host = Limits(ram_bytes=40 * GB, pinnable_bytes=20 * GB)
        least_bytes = smallest_budget([instance], host)
        assert least_bytes is not None
        for factor in BUDGET_FACTORS:
            limits = Limits(
                budget_bytes=int(least_bytes * factor),
                ram_bytes=host.ram_bytes,
                pinnable_bytes=host.pinnable_bytes,
            )
            started_s = time.process_time()
            assert search([instance], limits) is not None
            taken_ms.append((time.process_time() - started_s) * 1e3)
    return taken_ms


def catalogue(name: str) -> list[float]:
    """Return the milliseconds of each search for a catalogue pipeline, all strategies in play."""
    machine = reference_machine(["rtx-4090"], ram_bytes=128 * GB)
    gpu = machine.gpus[0]
    policy = Policy(
        budget_bytes={gpu.index: gpu.total_bytes}, quality=Quality.LOW, compile_allowed=True
    )
    shared: Shared = {}
    seen = observe(name, {}, gpu=gpu, policy=policy)
    pricings = [
        Pricing(
            one.workload,
            gpu,
            load_options=one.load_options,
            process_options=process_options(one.workload, gpu, policy),
            held_bytes=one.held_bytes,
            shared=shared,
            num_cores=machine.host.num_cores,
        )
        for one in seen
    ]
    problems = Candidates(pricings, policy).problems
    num_candidates = sum(len(group) for p in problems for group in p.components.values())
    print(f"{name}: {len(problems)} problems, {num_candidates} candidates")
    taken_ms = []
    for budget_gb in BUDGETS_GB:
        at = replace(policy, budget_bytes={gpu.index: budget_gb * GB})
        limits = limits_of(at, machine, gpu.index, 0)
        started_s = time.process_time()
        search(problems, limits)
        taken_ms.append((time.process_time() - started_s) * 1e3)
    return taken_ms


def devices(name: str, kinds: Sequence[str]) -> tuple[float, float]:
    """Return the seconds of pricing and of searching a plan over sixteen GPUs, no two alike.

    Their budgets grow from 7 GB by 0.6, as far as their memory goes.
    """
    machine = reference_machine(kinds, ram_bytes=256 * GB)
    budgets = {
        gpu.index: min(gpu.total_bytes, 7 * GB + gpu.index * 6 * GB // 10) for gpu in machine.gpus
    }
    policy = Policy(budget_bytes=budgets)
    traced_s = 0.0

    def observed(gpu: Gpu) -> list[Observed]:
        nonlocal traced_s
        started_s = time.process_time()
        found = observe(name, {}, gpu=gpu, policy=policy)
        traced_s += time.process_time() - started_s
        return found

    def priced(seen: Observed, gpu: Gpu, switches: Sequence[Option], models: Models) -> Pricing:
        return Pricing(
            seen.workload,
            gpu,
            load_options=seen.load_options,
            process_options=switches,
            held_bytes=seen.held_bytes,
            num_cores=machine.host.num_cores,
            models=models,
        )

    started_s = time.process_time()
    pricings = price_devices(observed, priced, machine, budgets, policy)
    problems = Candidates(pricings, policy).problems
    priced_s = time.process_time() - started_s - traced_s
    started_s = time.process_time()
    assert search(problems, limits_of(policy, machine, None, 0)) is not None
    return priced_s, time.process_time() - started_s


def main() -> None:
    """Print a line for each family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--adversarial-seeds", type=int, default=1)
    parser.add_argument("--only-devices", action="store_true")
    arguments = parser.parse_args()
    print(
        f"Python {platform.python_version()}, numpy {np.__version__}, {platform.machine()}, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    for name, (about, kinds) in itertools.product(SIXTEEN_PIPELINES, SIXTEEN.items()):
        devices(name, kinds)  # its traces, and whatever is imported on the way
        pricing_s, search_s = devices(name, kinds)
        print(
            f"devices      {name} over sixteen GPUs of {about}: "
            f"pricing {pricing_s:.2f} s, search {search_s:.2f} s",
            flush=True,
        )
    if arguments.only_devices:
        return
    for family, num_seeds in (
        (placement, arguments.seeds),
        (adversarial, arguments.adversarial_seeds),
    ):
        _print(family.__name__, measure(family, num_seeds))
    _print("catalogue", [ms for name in PIPELINES for ms in catalogue(name)])


def _print(family: str, taken_ms: list[float]) -> None:
    taken_ms = sorted(taken_ms)
    print(
        f"{family:12} {len(taken_ms):4} searches: "
        f"median {statistics.median(taken_ms):7.1f} ms, "
        f"90% {taken_ms[int(len(taken_ms) * 0.9)]:7.1f} ms, worst {taken_ms[-1]:7.1f} ms"
    )


if __name__ == "__main__":
    main()
