"""Plans over several uneven GPUs: nothing is lost, every budget kept, nothing slower than stock."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.cost_models.workloads import linear_stack, routine, workload
from tests.end_to_end.small_runs import untouched
from tests.small_pipelines import flux, small_call

import pipefit
from pipefit.cost_models.context import context_bytes
from pipefit.cost_models.machine import Gpu, Machine
from pipefit.cost_models.sharing import Models
from pipefit.cost_models.units import MIB
from pipefit.cost_models.workload import Kernel, Workload, variant_key
from pipefit.planner import api
from pipefit.planner.catalog import reference_machine
from pipefit.planner.decide import decide
from pipefit.planner.devices import DevicePricing, main_gpus, price_devices
from pipefit.planner.options import process_options
from pipefit.planner.plan import Plan
from pipefit.planner.policy import Policy
from pipefit.planner.pricing import Pricing
from pipefit.planner.search import Limits, search
from pipefit.planner.stock_maps import stock
from pipefit.planner.workloads import Observed, observe
from pipefit.strategies.attention import backend_name
from pipefit.strategies.live import attention_backends, balanced_components
from pipefit.strategies.strategy import Option

GB = 10**9
MATRIX = Kernel(
    kind="gemm",
    name="aten.mm",
    dtype="bfloat16",
    read_bytes=GB,
    write_bytes=MIB,
    shape=(1, 1024, 4096, 4096),
)


def priced(seen: Observed, gpu: Gpu, switches: Sequence[Option], models: Models) -> Pricing:
    return Pricing(
        seen.workload,
        gpu,
        load_options=seen.load_options,
        process_options=switches,
        held_bytes=seen.held_bytes,
        models=models,
    )


def by_hand(sizes: Mapping[str, int], **blocks: int) -> Workload:
    """A pipeline that calls components of these sizes one after the other, the last ten times.

    A component with *blocks* may be split between them.
    """
    components, routines, root, phases = [], [], [], []
    for name, num_bytes in sizes.items():
        count = blocks.get(name, 8)
        component = linear_stack(name, [num_bytes // count] * count)
        whole = ["Linear"] if name in blocks else []
        components.append(replace(component, traits={"no_split_modules": whole}))
        calls = 10 if name == list(sizes)[-1] else 1
        block = len(routines)
        routines.append(routine(("a", 0, MIB), ("k", 0), returns=(0,)))
        steps: list[Any] = []
        for i in range(count):
            steps.append(("c", block, f"blocks.{i}", (i,), ()))
            steps += [("f", i - 1)] if i else []
        routines.append(routine(*steps, returns=(count - 1,)))
        for _ in range(calls):
            number = len(root)
            root += [("c", block + 1, f"/{name}", (number,), ()), ("f", number)]
        phases.append((name, "forward", calls))
    return workload(
        components,
        routines,
        root,
        phases,
        kernels=(MATRIX,),
        input_bytes=dict.fromkeys(range(len(routines)), MIB),
    )


def machine(*total_bytes: int, name: str = "rtx-3090") -> Machine:
    made = reference_machine([name] * len(total_bytes), ram_bytes=512 * GB)
    return replace(
        made,
        gpus=tuple(
            replace(gpu, total_bytes=total, free_bytes=total)
            for gpu, total in zip(made.gpus, total_bytes, strict=True)
        ),
    )


def planned(of: Workload, on: Machine, **more: Any) -> Plan:
    budgets = {gpu.index: gpu.total_bytes for gpu in on.gpus}
    policy = Policy(budget_bytes=budgets, **more)
    pricings = price_devices(lambda gpu: [Observed(workload=of)], priced, on, budgets, policy)
    return decide(pricings, policy=policy, machine=on, device=None)


def keeps_its_budgets(plan: Plan) -> bool:
    return all(
        peak.process_bytes + peak.slack_bytes <= plan.policy.budget_bytes[peak.device]
        for peak in plan.prediction.peak_vram
    )


SIZES = {"first": 10 * GB, "second": 9 * GB, "third": 8 * GB, "fourth": 5 * GB}


def test_balanced_forgets_a_component_and_a_plan_does_not() -> None:
    assert balanced_components(SIZES, {0: 20 * GB, 1: 10 * GB}).keys() == {
        "first",
        "second",
        "fourth",
    }
    of, on = by_hand(SIZES), machine(20 * GB + GB, 10 * GB + GB)
    with pytest.raises(pipefit.InvalidRequest, match=r"gives no GPU to third .*, fourth"):
        stock([Option(strategy="device_map", parameters={"mode": "balanced"})], of, on)
    plan = planned(of, on)
    assert {option.component for option in plan.options} == set(SIZES)
    assert len(plan.prediction.peak_vram) == 2
    assert keeps_its_budgets(plan)


def test_what_fits_no_single_gpu_is_split_and_the_rest_goes_where_room_is() -> None:
    of = by_hand({"text_encoder": 6 * GB, "transformer": 30 * GB}, transformer=30)
    plan = planned(of, machine(18 * GB, 17 * GB, 8 * GB), forbidden=("streaming", "group_offload"))
    split, away = (
        next(o for o in plan.options if o.strategy == "device_map" and o.component == name)
        for name in ("transformer", "text_encoder")
    )
    assert sum(int(part.split(":")[1]) for part in split.parameters["split"].split("+")) == 30
    assert away.parameters == {"device": 2}
    assert keeps_its_budgets(plan)
    weights = {p.device: p.weights_bytes for p in plan.prediction.phases}
    assert sum(weights.values()) == pytest.approx(36 * GB, rel=1e-3)


WIDE = {"text_encoder": 2 * GB, "transformer": 30 * GB}


@pytest.mark.parametrize("totals", [(12, 11), (12, 8, 6)])
def test_what_all_gpus_together_cannot_hold_is_streamed_to_each_of_them(
    totals: tuple[int, ...],
) -> None:
    of, on = by_hand(WIDE, transformer=120), machine(*(total * GB for total in totals))
    plan = planned(of, on)
    split = next(o for o in plan.options if o.component == "transformer")
    assert {*split.parameters} == {"split", "resident_blocks"}
    assert len(plan.prediction.peak_vram) == len(totals)
    assert keeps_its_budgets(plan)
    # What is not resident is on the host, and comes over all links instead of one.
    weights = {p.device: p.weights_bytes for p in plan.prediction.phases}
    assert plan.prediction.pinned_bytes >= 30 * GB - sum(weights.values())
    alone = planned(of, on, forbidden=("device_map",))
    assert plan.prediction.latency.call_s < 0.6 * alone.prediction.latency.call_s
    without = planned(of, on, forbidden=("streaming",))
    assert not any("resident_blocks" in o.parameters for o in without.options)


def test_nothing_of_a_split_is_on_the_host_where_the_gpus_have_room() -> None:
    of, on = by_hand(WIDE, transformer=120), machine(*[24 * GB] * 2)
    budgets = {gpu.index: gpu.total_bytes for gpu in on.gpus}
    priced = DevicePricing(of, on, budgets, 0, lambda gpu: Pricing(of, gpu))
    offered = priced.problems(Policy(budget_bytes=budgets))[-1].components["transformer"]
    splits = [
        c.payload.options[-1].parameters for c in offered if "split" in str(c.payload.options)
    ]
    assert splits
    assert not any("resident_blocks" in parameters for parameters in splits)


def test_ram_that_cannot_be_page_locked_rules_out_what_needs_it() -> None:
    of, on = by_hand(WIDE, transformer=120), machine(12 * GB, 11 * GB)
    poor = replace(on, host=replace(on.host, pinnable_bytes=6 * GB))
    plan = planned(of, poor)
    assert plan.prediction.pinned_bytes <= 6 * GB
    assert not any(
        "resident_blocks" in o.parameters and "split" in o.parameters for o in plan.options
    )


def test_a_plan_is_on_the_faster_gpu_where_both_have_room() -> None:
    of = by_hand({"text_encoder": GB, "transformer": 2 * GB})
    pair = reference_machine(["rtx-3060-12gb", "rtx-4090"], ram_bytes=64 * GB)
    plan = planned(of, pair)
    assert plan.gpu.index == 1
    assert not any(o.component == "transformer" for o in plan.options if o.strategy == "device_map")


def test_budgets_that_nothing_keeps_name_the_smallest_for_every_gpu() -> None:
    of = by_hand({"text_encoder": 6 * GB, "transformer": 30 * GB})
    without = ("streaming", "group_offload", "sequential_offload", "model_offload")
    with pytest.raises(pipefit.NoPlanFits, match=r"GPU 0 and .* on GPU 1: .* on every GPU") as no:
        planned(of, machine(9 * GB, 8 * GB), forbidden=without)
    smallest = no.value.smallest_budget_bytes["high"]
    assert keeps_its_budgets(planned(of, machine(smallest, smallest), forbidden=without))


def sixteen() -> tuple[Machine, dict[int, int]]:
    """Four kinds of GPUs, no two with the same budget."""
    names = ["rtx-4090", "rtx-3090", "rtx-4060", "l4"] * 4
    on = reference_machine(names, ram_bytes=512 * GB)
    return on, {gpu.index: (3 + gpu.index) * GB // 2 for gpu in on.gpus}


def test_sixteen_uneven_gpus_take_what_none_of_them_could() -> None:
    on, budgets = sixteen()
    sizes = {"a": 4 * GB, "b": 6 * GB, "vae": GB // 2, "transformer": 24 * GB}
    of = by_hand(sizes, transformer=48)
    policy = Policy(budget_bytes=budgets, forbidden=("streaming", "group_offload"))
    pricings = price_devices(lambda gpu: [Observed(workload=of)], priced, on, budgets, policy)
    plan = decide(pricings, policy=policy, machine=on, device=None)
    assert keeps_its_budgets(plan)
    assert len(plan.prediction.peak_vram) >= 4


def test_what_pricings_share_is_as_each_would_find_it_alone() -> None:
    """Two GPUs of a kind, one of another, a cast and a variant: every figure of every candidate."""
    pipe, _ = untouched("wan_two_experts")
    call = {k: v for k, v in small_call("wan_two_experts").items() if k != "generator"}
    on = reference_machine(["rtx-4060", "rtx-5090", "rtx-2080-ti", "rtx-4060"], ram_bytes=64 * GB)
    budgets = {gpu.index: gpu.total_bytes - gpu.index for gpu in on.gpus}
    policy = Policy(budget_bytes=budgets)

    def observed(gpu: Gpu) -> list[Observed]:
        return observe(pipe, call, gpu=gpu, policy=policy)

    shared = price_devices(observed, priced, on, budgets, policy)
    assert len({pricing.gpu.index for pricing in shared}) > 1
    assert any(pricing.load_options for pricing in shared)
    assert any(pricing.workload.variants for pricing in shared)
    for pricing in shared:
        gpu = pricing.gpu
        seen = next(o for o in observed(gpu) if list(o.load_options) == list(pricing.load_options))
        alone = DevicePricing(
            seen.workload,
            on,
            budgets,
            gpu.index,
            lambda each, seen=seen, gpu=gpu: Pricing(
                seen.workload,
                each,
                load_options=seen.load_options,
                process_options=process_options(seen.workload, gpu, policy),
                held_bytes=seen.held_bytes,
            ),
        )
        for one, other in zip(pricing.problems(policy), alone.problems(policy), strict=True):
            assert one == other


def test_of_many_gpus_those_are_the_main_one_that_none_exceeds_in_speed_and_budget() -> None:
    of = by_hand({"transformer": 2 * GB})
    on = reference_machine(["rtx-3090", "rtx-4090", "rtx-3090", "rtx-4060"] * 2, ram_bytes=64 * GB)
    budgets = {0: 8 * GB, 1: 8 * GB, 2: 8 * GB, 3: 4 * GB}
    assert main_gpus(of, on, budgets) == (1, 0, 3)
    assert main_gpus(of, on, {**budgets, 4: 7 * GB, 7: 5 * GB}) == (1,)
    assert main_gpus(of, on, {**budgets, 4: 12 * GB, 6: 12 * GB, 7: 5 * GB}) == (1, 4)


RESIDENT_ONLY = ("streaming", "group_offload", "model_offload", "sequential_offload", "vae_tiling")


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    totals=st.lists(st.integers(2, 14), min_size=2, max_size=3),
)
def test_whatever_assignment_of_components_fits_a_plan_is_found(
    sizes: list[int], totals: list[int]
) -> None:
    """Sizes in units that leave a third of one for everything besides weights."""
    unit = 3 * GB
    of = by_hand({f"component_{i}": size * unit for i, size in enumerate(sizes)})
    on = machine(*(total * unit + GB for total in totals))
    fits = any(
        all(
            sum(size for size, gpu in zip(sizes, places, strict=True) if gpu == index) <= total
            for index, total in enumerate(totals)
        )
        for places in itertools.product(range(len(totals)), repeat=len(sizes))
    )
    try:
        plan = planned(of, on, forbidden=RESIDENT_ONLY)
    except pipefit.NoPlanFits:
        assert not fits
    else:
        assert fits
        assert keeps_its_budgets(plan)
        assert {o.component for o in plan.options if o.strategy == "resident"} == {
            component.name for component in of.components
        }


def test_leaving_out_what_only_renames_equal_gpus_loses_nothing() -> None:
    sizes = {"a": 5 * GB, "b": 4 * GB, "c": 3 * GB, "transformer": 7 * GB}
    of, on = by_hand(sizes), machine(*[9 * GB] * 3)
    budgets = {gpu.index: gpu.total_bytes for gpu in on.gpus}
    # Told apart by a byte of budget, every one of them may be chosen by every component.
    apart = {index: most + index for index, most in budgets.items()}
    policy = Policy(budget_bytes=budgets)
    fewer, whole = (
        DevicePricing(of, on, given, 0, lambda gpu: Pricing(of, gpu)).problems(policy)[-1]
        for given in (budgets, apart)
    )
    assert len(fewer.components["a"]) < len(whole.components["a"])
    found = [search([problem], Limits(budget_bytes=budgets)) for problem in (fewer, whole)]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].call_s == pytest.approx(found[1].call_s, rel=1e-9)


PAIR = reference_machine(["rtx-4060", "rtx-3060-12gb"], ram_bytes=32 * GB)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("stable_diffusion_xl", ("device_map:device=1@vae", "device_map:device=0@unet")),
        ("flux", ("device_map:device=1@text_encoder_2", "device_map:device=0@transformer")),
        ("flux", ("device_map:split=1:2+0:2@transformer",)),
        (
            "flux",
            (
                Option(
                    strategy="device_map",
                    component="transformer",
                    parameters={
                        "split": "0:2+1:2",
                        "resident_blocks": "0:3+1:1",
                        "max_block_bytes": 1 << 15,
                    },
                ),
            ),
        ),
    ],
)
def test_small_pipelines_keep_each_budget_in_their_rehearsal(
    name: str, asked: Sequence[str | Option]
) -> None:
    pipe, _ = untouched(name)
    call = {k: v for k, v in small_call(name).items() if k != "generator"}
    budgets = {gpu.index: context_bytes(gpu) + 48 * MIB for gpu in PAIR.gpus}
    plan = api.plan(pipe, budgets, call=call, machine=PAIR, with_=asked, rehearse=True)
    assert len(plan.gpus) == 2
    assert plan.rehearsal is not None
    assert plan.rehearsal.within_budget
    assert {peak.device for peak in plan.rehearsal.phases} == {gpu.index for gpu in plan.gpus}
    for gpu in plan.gpus:
        assert plan.rehearsal.peak_on(gpu.index).process_bytes <= budgets[gpu.index]
    assert keeps_its_budgets(plan)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    verified = api.verify(again, pipe, call=call)
    assert verified.holds
    assert "on GPU 1" in str(verified)
    assert "GPU 1 peaks at" in str(again)


def test_a_component_is_put_where_it_was_asked_for() -> None:
    pipe, _ = untouched("flux")
    call = {k: v for k, v in small_call("flux").items() if k != "generator"}
    asked = ["device_map:device=1@text_encoder_2"]
    plan = api.plan(pipe, "0=1GB,1=1GB", call=call, machine=PAIR, with_=asked, rehearse=False)
    own = [o for o in plan.options if o.component == "text_encoder_2"]
    is_main = plan.gpu.index == 1
    assert is_main or any(o.parameters == {"device": 1} for o in own)
    predicted = api.predict(pipe, asked, call=call, machine=PAIR)
    assert [peak.device for peak in predicted.peak_vram] == [0, 1]
    assert any(o.strategy == "resident" and o.component == "vae" for o in predicted.options)
    with pytest.raises(pipefit.InvalidRequest, match="names GPU 7"):
        api.predict(pipe, ["device_map:device=7@vae"], call=call, machine=PAIR)
    with pytest.raises(pipefit.InvalidRequest, match="names GPU 7"):
        api.predict(
            pipe, ["device_map:mode=auto,max_memory=0:1GB+7:1GB@vae"], call=call, machine=PAIR
        )
    with pytest.raises(
        pipefit.InvalidRequest, match=r"leaves \d+ modules of transformer on no GPU"
    ):
        api.predict(
            pipe,
            [
                Option(
                    strategy="device_map",
                    component="transformer",
                    parameters={"mode": "sequential", "max_memory": {0: "1KB", 1: "2KB"}},
                )
            ],
            call=call,
            machine=PAIR,
        )
    with pytest.raises(pipefit.InvalidRequest, match="can only be predicted"):
        api.plan(pipe, "1GB", call=call, machine=PAIR, with_=["device_map:mode=balanced"])


@pytest.mark.parametrize("names", [("rtx-2080-ti", "rtx-3060-12gb"), ("rtx-4060", "rtx-2080-ti")])
def test_a_gpu_too_old_for_what_is_required_is_not_the_main_one(names: Sequence[str]) -> None:
    pipe = flux().to(torch.bfloat16)
    call = {k: v for k, v in small_call("flux").items() if k != "generator"}
    asked = ["attention:backend=flash@transformer"]
    on = reference_machine(names, ram_bytes=32 * GB)
    plan = api.plan(pipe, "0=2GB,1=2GB", call=call, machine=on, with_=asked, rehearse=False)
    assert plan.gpu.compute_capability >= (8, 0)
    assert any(o.strategy == "attention" and o.component == "transformer" for o in plan.options)
    old = reference_machine(["rtx-2080-ti", "rtx-2060-6gb"], ram_bytes=32 * GB)
    with pytest.raises(pipefit.InvalidRequest, match="flash needs compute capability 8"):
        api.plan(pipe, "0=2GB,1=2GB", call=call, machine=old, with_=asked, rehearse=False)


@pytest.mark.parametrize(
    ("name", "parameter", "where"),
    [("transformer", "split", r"(\d+):"), ("text_encoder", "device", r"(\d+)")],
)
def test_neither_blocks_nor_components_go_to_a_gpu_too_old_for_what_is_required(
    name: str, parameter: str, where: str
) -> None:
    of = by_hand({"text_encoder": GB, "transformer": 30 * GB}, transformer=30)
    backends = {backend_name(value): facts for value, facts in attention_backends().items()}
    traits = {
        "attention_processors": ["FluxAttnProcessor"],
        "dispatches_attention": True,
        "attention_backends": backends,
    }
    flash = Option(strategy="attention", component=name, parameters={"backend": "flash"})
    of = replace(
        of,
        components=tuple(replace(c, traits={**c.traits, **traits}) for c in of.components),
        variants={variant_key(name, {"attention": flash.parameters}): {}},
    )

    def used(*names: str) -> set[str]:
        made = reference_machine(names, ram_bytes=512 * GB)
        budgets = {gpu.index: 18 * GB for gpu in made.gpus}
        policy = Policy(budget_bytes=budgets, required=(flash,))
        priced = DevicePricing(of, made, budgets, 0, lambda gpu: Pricing(of, gpu))
        picks = [c.payload for c in priced.problems(policy)[-1].components[name]]
        asked = [o.parameters for p in picks for o in p.options if parameter in o.parameters]
        return {index for one in asked for index in re.findall(where, str(one[parameter]))} - {"0"}

    assert used("rtx-3090", "rtx-3090") == {"1"}
    assert used("rtx-3090", "titan-rtx") == set()
    assert used("rtx-3090", "titan-rtx", "rtx-3090") == {"2"}


def test_a_plan_is_never_slower_than_what_balanced_does() -> None:
    pipe, _ = untouched("flux")
    call = {k: v for k, v in small_call("flux").items() if k != "generator"}
    stock = api.predict(pipe, ["device_map:mode=balanced"], call=call, machine=PAIR)
    assert {o.component for o in stock.options if o.strategy == "device_map"}
    plan = api.plan(pipe, {0: "100%", 1: "100%"}, call=call, machine=PAIR, rehearse=False)
    assert plan.prediction.latency.call_s <= stock.latency.call_s * 1.02
