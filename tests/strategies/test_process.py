"""Switches of the process: what they gain, when they are taken, and that they come back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tests.end_to_end.small_runs import untouched
from tests.small_pipelines import picture
from tests.strategies.described import ADA, decoding, described

from pipefit import predict
from pipefit.cost_models.latency import LatencyModel
from pipefit.cost_models.roofline import CUDNN_TRIAL_GAIN, Flags, kernel_seconds
from pipefit.cost_models.workload import Kernel, Workload
from pipefit.errors import InvalidRequest
from pipefit.planner.apply import apply_options
from pipefit.planner.catalog import reference_machine
from pipefit.planner.options import process_options
from pipefit.planner.policy import Policy
from pipefit.planner.rehearse import on_stage
from pipefit.planner.snapshot import differences, snapshot
from pipefit.planner.trace import GPU
from pipefit.strategies import strategy
from pipefit.strategies.strategy import Option, Quality

NAME = "stable_diffusion"
A100 = reference_machine(["a100-80gb"])
TITAN = reference_machine(["titan-rtx"])
SWITCHES = [Option(strategy="tf32"), Option(strategy="cudnn_benchmark")]


def product(dtype: str) -> Kernel:
    return Kernel(
        kind="gemm",
        name="aten.mm",
        dtype=dtype,
        read_bytes=1,
        write_bytes=1,
        shape=(1, *[8192] * 3),
    )


def convolution(dtype: str) -> Kernel:
    return replace(decoding(described(torch.nn.Linear(1, 1))).kernels[0], dtype=dtype)


def computing(kernel: Kernel) -> Workload:
    """Return a workload of one component that does nothing but *kernel*."""
    return replace(decoding(described(torch.nn.Linear(1, 1))), kernels=(kernel,))


@pytest.fixture
def _old_answers() -> Iterator[None]:
    """Leave torch's switches as a process begins with them."""
    yield
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True


# -- time


def test_tf32_makes_fp32_products_faster_where_the_gpu_has_it_and_nothing_else() -> None:
    on = Flags(tf32=True)
    a100, titan = A100.gpus[0], TITAN.gpus[0]
    plain, faster = (kernel_seconds(product("float32"), a100, flags=f) for f in (Flags(), on))
    assert faster < plain / 4
    for kernel, gpu in (
        (product("float32"), titan),
        (product("bfloat16"), a100),
        (convolution("float32"), a100),
    ):
        assert kernel_seconds(kernel, gpu, flags=on) == kernel_seconds(kernel, gpu)


def test_trials_gain_a_little_on_convolutions_and_cost_the_first_call_many_runs() -> None:
    workload = computing(convolution("float32"))
    flags = Flags(cudnn_benchmark=True)
    before, after = (LatencyModel(workload, TITAN.gpus[0], f) for f in (Flags(), flags))
    gained = 1 - after.routine_cost(1).gpu_s / before.routine_cost(1).gpu_s
    assert gained == pytest.approx(CUDNN_TRIAL_GAIN, abs=0.003)  # less on the launches
    # The routine runs the same convolution twice: it is tried once.
    assert after.trial_seconds([1, 1]) == pytest.approx(20 * after.routine_cost(0).gpu_s)
    assert before.trial_seconds([1]) == 0.0


def test_the_first_call_is_predicted_longer_while_cudnn_tries() -> None:
    pipe, _ = untouched(NAME)
    plain, tried = (
        predict(pipe, options, machine=TITAN)
        for options in ([], [Option(strategy="cudnn_benchmark")])
    )
    assert tried.latency.first_call_s > plain.latency.first_call_s
    assert tried.peak_vram == plain.peak_vram
    assert any("cuDNN's trials" in note for note in tried.assumptions)
    assert not any("cuDNN's trials" in note for note in plain.assumptions)


# -- choice


def chosen(workload: Workload, machine: object, quality: Quality = Quality.HIGH, **asked: object):
    policy = Policy(budget_bytes={0: 1 << 34}, quality=quality, **asked)
    return [o.strategy for o in process_options(workload, machine.gpus[0], policy)]


def test_a_switch_is_taken_where_it_gains_more_than_a_tie() -> None:
    assert chosen(computing(product("float32")), A100) == ["tf32"]
    assert chosen(computing(product("bfloat16")), A100) == []
    assert chosen(computing(product("float32")), TITAN) == []
    assert chosen(computing(convolution("float32")), TITAN) == ["cudnn_benchmark"]


def test_a_switch_is_left_off_where_the_policy_says_so_and_on_where_it_is_asked_for() -> None:
    workload = computing(product("float32"))
    assert chosen(workload, A100, quality=Quality.EXACT) == []
    assert chosen(workload, A100, forbidden=("tf32",)) == []
    assert chosen(workload, TITAN, required=(Option(strategy="tf32"),)) == ["tf32"]


def test_a_switch_is_for_the_process_and_not_for_a_component() -> None:
    pipe, _ = untouched(NAME)
    for one in ("tf32", "cudnn_benchmark"):
        with pytest.raises(InvalidRequest, match="whole pipeline: leave @unet out"):
            predict(pipe, [Option(strategy=one, component="unet")], machine=A100)
        with pytest.raises(InvalidRequest, match="whole pipeline: leave @unet out"):
            apply_options(pipe, [Option(strategy=one, component="unet")], "cpu")


def test_options_are_none_without_an_nvidia_gpu() -> None:
    workload = computing(convolution("float32"))
    component = workload.components[0]
    apple = replace(ADA, architecture="apple", compute_capability=None)
    for one in ("tf32", "cudnn_benchmark"):
        assert strategy(one).options(component, workload, apple) == ()


# -- state


@pytest.mark.usefixtures("_old_answers")
@pytest.mark.parametrize("precise", [True, False])
def test_the_switches_come_back_and_the_picture_on_the_cpu_stays(precise: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = not precise
    torch.backends.cudnn.allow_tf32 = not precise
    pipe, expected = untouched(NAME)
    before = snapshot(pipe)
    answers = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with apply_options(pipe, SWITCHES, "cpu"):
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.benchmark
        assert torch.equal(picture(pipe, NAME), expected)
    assert differences(before, snapshot(pipe)) == ()
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == answers


STARTS = {
    "nothing said": "",
    "matmul by the new switch": "torch.backends.cuda.matmul.fp32_precision = 'ieee'",
    "tf32 by the new switch": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "convolutions by the new switch": "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "medium by the old switch": "torch.set_float32_matmul_precision('medium')",
    "convolutions off by the old switch": "torch.backends.cudnn.allow_tf32 = False",
}


@pytest.mark.slow
@pytest.mark.parametrize("said", STARTS.values(), ids=STARTS)
def test_whichever_way_torch_was_told_before_it_answers_as_before(said: str) -> None:
    # In a process of its own: once the new switch was written, the old one cannot be asked again.
    code = f"""
import torch
from pipefit.strategies import strategy
def ask():
    found = []
    for question in (
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cuda.matmul.fp32_precision,
        lambda: torch.get_float32_matmul_precision(),
        lambda: torch.backends.cudnn.allow_tf32,
        lambda: torch.backends.cudnn.conv.fp32_precision,
    ):
        try:
            found.append(question())
        except RuntimeError:
            found.append("raises")
    return found
{said}
before = ask()
undo = strategy("tf32").apply(None, None, {{}}, "cpu")
assert torch.backends.cuda.matmul.fp32_precision == "tf32"
assert torch.backends.cudnn.conv.fp32_precision == "tf32"
undo()
assert ask() == before, (before, ask())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_component_that_the_plan_does_not_place_leaves_the_gpu_under_a_switch_too() -> None:
    with on_stage(untouched(NAME)[0], TITAN.gpus[0]) as stage:
        stage.pipe.to(GPU)
        with apply_options(stage.pipe, SWITCHES, GPU, plan=object()):
            assert {p.device.type for p in stage.pipe.unet.parameters()} == {"cpu"}
        assert {p.device.type for p in stage.pipe.unet.parameters()} == {"cuda"}
