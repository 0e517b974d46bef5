"""TorchScript in a forward's place: what it takes, what it predicts, and what undo takes back."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.end_to_end.small_runs import untouched
from tests.small_pipelines import SMALL_PIPELINES, picture, small_call
from tests.strategies.described import ADA, described

from pipefit.cost_models.workload import Phase, Workload
from pipefit.errors import InvalidRequest
from pipefit.planner.apply import apply_options
from pipefit.planner.snapshot import differences, snapshot
from pipefit.planner.trace import trace
from pipefit.planner.workloads import _apply_parts
from pipefit.strategies import conflict_of, strategy, traits_of
from pipefit.strategies.jit_trace import MAX_SCRIPTS
from pipefit.strategies.strategy import Option

JIT = strategy("jit_trace")


@pytest.mark.parametrize(
    ("name", "component", "placed"),
    [
        ("stable_diffusion", "unet", "resident"),
        ("stable_diffusion_xl", "unet", "model_offload"),  # with tensors in a dictionary
        ("flux", "transformer", "resident"),
    ],
)
def test_the_picture_is_the_same_as_a_script_and_nothing_is_left_of_it(
    name: str, component: str, placed: str
) -> None:
    pipe, expected = untouched(name)
    before = snapshot(pipe, with_values=True)
    options = [
        Option(strategy="jit_trace", component=component),
        Option(strategy=placed, component=None if placed == "model_offload" else component),
    ]
    with apply_options(pipe, options, "cpu"):
        made = picture(pipe, name)
        again = picture(pipe, name)
        scripts = _scripts(getattr(pipe, component))
        assert len(scripts) == 1
    error = (made - expected).abs().max()
    assert error < 1e-5, f"the largest difference is {error}"
    assert torch.equal(made, again)
    assert differences(before, snapshot(pipe, with_values=True)) == ()
    assert torch.equal(picture(pipe, name), expected)


def _scripts(module: Any) -> dict[Any, Any]:
    forward = vars(module)["forward"]
    while not hasattr(forward, "scripts"):  # accelerate wraps it
        forward = module._old_forward
    return forward.scripts


class Doubling(torch.nn.Module):
    """Returns what is right for the shapes and numbers that it is given."""

    def forward(self, x: torch.Tensor, factor: float = 2.0) -> dict[str, torch.Tensor]:
        return {"sample": x * factor * x.shape[0]}


def test_other_shapes_and_numbers_are_other_scripts_and_at_last_eager() -> None:
    module = Doubling()
    undo = JIT.apply(SimpleNamespace(part=module), "part", {}, "cpu")
    for count in range(1, MAX_SCRIPTS + 3):
        assert module(torch.ones(count))["sample"][0] == 2 * count
    assert len(_scripts(module)) == MAX_SCRIPTS
    undo()
    assert "forward" not in vars(module)
    undo = JIT.apply(SimpleNamespace(part=module), "part", {}, "cpu")
    assert [module(torch.ones(1), f)["sample"].item() for f in (2.0, 3.0)] == [2.0, 3.0]
    undo()


class Naming(torch.nn.Module):
    """Returns what no script can."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        return x, "a name"


def test_what_cannot_be_traced_says_so_in_a_sentence() -> None:
    module = Naming()
    undo = JIT.apply(SimpleNamespace(part=module), "part", {}, "cpu")
    with pytest.raises(InvalidRequest, match=r"Naming cannot be traced \(.*: leave jit_trace out"):
        module(torch.ones(1))
    undo()
    assert module(torch.ones(1))[1] == "a name"


class Hiding(torch.nn.Module):
    """Writes where the tracer does not look, as CogVideoX does with its position table."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = x.new_zeros(x.shape)
        table.data.copy_(x)
        return x + table


def test_a_script_that_computes_something_else_is_refused_in_its_first_call() -> None:
    module = Hiding()
    undo = JIT.apply(SimpleNamespace(part=module), "part", {}, "cpu")
    with pytest.raises(InvalidRequest, match="differs from its own by 50%"):
        module(torch.ones(2))
    undo()
    assert module(torch.ones(2)).tolist() == [2, 2]


@pytest.mark.slow
def test_a_model_that_cannot_be_a_script_makes_no_wrong_picture() -> None:
    pipe, expected = untouched("cogvideox")
    with (
        apply_options(pipe, [Option(strategy="jit_trace", component="transformer")], "cpu"),
        pytest.raises(InvalidRequest, match="CogVideoXTransformer3DModel cannot be traced"),
    ):
        picture(pipe, "cogvideox")
    assert torch.equal(picture(pipe, "cogvideox"), expected)


def test_it_is_offered_only_where_the_gpu_is_too_old_for_compile() -> None:
    component = described(SMALL_PIPELINES["stable_diffusion"]().unet)
    phase = Phase(name="denoise", component="part", entry="forward", calls=tuple(range(50)))
    workload = Workload(
        pipeline="p",
        pipeline_class="P",
        call={},
        components=(component,),
        kernels=(),
        routines=(),
        root=(),
        phases=(phase,),
    )
    assert JIT.options(component, workload, ADA) == ()
    assert JIT.options(component, workload, replace(ADA, compute_capability=(6, 1))) == ({},)


def test_autoencoders_and_text_encoders_are_refused() -> None:
    pipe = SMALL_PIPELINES["stable_diffusion"]()
    assert "not its forward" in str(JIT.refusal(described(pipe.vae), {}))
    assert "is no denoiser" in str(JIT.refusal(described(pipe.text_encoder), {}))
    assert JIT.refusal(described(pipe.unet), {}) is None


@pytest.mark.parametrize(
    "other", ["streaming", "group_offload", "layerwise_casting", "quantization", "compile"]
)
def test_hooks_within_a_script_and_other_graphs_exclude_it(other: str) -> None:
    assert conflict_of([Option(strategy="jit_trace"), Option(strategy=other)])
    assert conflict_of([Option(strategy="jit_trace"), Option(strategy="model_offload")]) is None


def test_a_script_is_predicted_with_cheaper_launches_and_pointwise_chains_as_one() -> None:
    call = {k: v for k, v in small_call("stable_diffusion").items() if k != "generator"}
    workload = trace(
        SMALL_PIPELINES["stable_diffusion"](),
        call,
        traits=traits_of,
        variants=lambda workload: {"unet": [{"jit_trace": {}}]},
        apply_variant=_apply_parts,
    )
    ((plain, scripted),) = workload.variants["unet|jit_trace:"].items()
    kernels = [workload.kernels[e[1]] for e in workload.routines[scripted].events if e[0] == "k"]
    assert {kernel.launcher for kernel in kernels} == {"traced"}
    eager = _kernels(workload, plain)
    assert len(kernels) < len(eager)
    for kind in ("conv", "gemm", "attention", "norm"):
        assert sum(k.kind == kind for k in kernels) == sum(k.kind == kind for k in eager)


def _kernels(workload: Workload, routine: int) -> list[Any]:
    found = []
    for event in workload.routines[routine].events:
        if event[0] == "k":
            found.append(workload.kernels[event[1]])
        elif event[0] == "c":
            found += _kernels(workload, event[1])
    return found
