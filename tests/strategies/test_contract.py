"""What every strategy promises, whatever it does."""

from __future__ import annotations

import json
import subprocess
import sys

import diffusers
import pytest
import torch
import transformers

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.serial import from_json, to_json
from pipefit.cost_models.workload import Component, Workload
from pipefit.errors import UnknownName
from pipefit.strategies import BUILT_IN, strategy, traits_of
from pipefit.strategies.describe import describe_component
from pipefit.strategies.strategy import Option, Strategy

NAMES = [one.name for one in BUILT_IN]

GPU = Gpu(
    name="rtx-4060",
    architecture="ada",
    compute_capability=(8, 9),
    total_bytes=8 << 30,
    free_bytes=8 << 30,
)

MODULES = {
    "unet": lambda: diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
    ),
    "vae": lambda: diffusers.AutoencoderKL(block_out_channels=(32,), sample_size=64),
    "frames": lambda: diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",)
    ),
    "text_encoder": lambda: transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    ),
    "transformer": lambda: diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ),
    "head": lambda: torch.nn.Linear(2, 2),
}


@pytest.fixture(scope="module", params=MODULES)
def component(request: pytest.FixtureRequest) -> Component:
    """A component as the trace describes it."""
    module = MODULES[request.param]()
    return describe_component(request.param, module, traits_of(module))


@pytest.fixture
def workload(component: Component) -> Workload:
    """A workload in which the component exists and is not called."""
    return Workload(
        pipeline="p",
        pipeline_class="P",
        call={},
        components=(component,),
        kernels=(),
        routines=(),
        root=(),
        phases=(),
        offload_sequence=(component.name,),
    )


def test_names_are_the_names_of_the_files_and_unique() -> None:
    assert len(set(NAMES)) == len(NAMES)
    for one in BUILT_IN:
        assert type(one).__module__ == f"pipefit.strategies.{one.name}"
        assert strategy(one.name) is one


def test_an_unknown_strategy_is_answered_with_the_closest() -> None:
    with pytest.raises(UnknownName, match="did you mean vae_tiling"):
        strategy("vae_tilling")


@pytest.mark.parametrize("one", BUILT_IN, ids=NAMES)
def test_whatever_is_offered_is_not_refused(
    one: Strategy, component: Component, workload: Workload
) -> None:
    for parameters in one.options(component, workload, GPU):
        assert one.refusal(component, parameters) is None


@pytest.mark.parametrize("one", BUILT_IN, ids=NAMES)
def test_a_parameter_that_does_not_exist_is_refused(one: Strategy, component: Component) -> None:
    assert one.refusal(component, {"colour": "red"}) is not None


@pytest.mark.parametrize("one", BUILT_IN, ids=NAMES)
def test_placements_are_given_by_placement_strategies_alone(
    one: Strategy, component: Component, workload: Workload
) -> None:
    for parameters in one.options(component, workload, GPU):
        placed = one.placement(parameters)
        assert (placed is not None) == (one.kind in ("placement", "pipeline_placement"))


def test_traits_and_options_survive_json(component: Component, workload: Workload) -> None:
    traits = json.loads(json.dumps(component.traits))
    assert traits == component.traits
    for one in BUILT_IN:
        for parameters in one.options(component, workload, GPU):
            option = Option(strategy=one.name, component=component.name, parameters=parameters)
            again = from_json(Option, json.loads(json.dumps(to_json(option))))
            assert one.refusal(component, again.parameters) is None
            assert one.placement(again.parameters) == one.placement(parameters)


def test_naming_the_strategies_does_not_import_torch() -> None:
    code = "import sys, pipefit.strategies; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
