"""The real hooks on a virtual GPU: there, unlike on the CPU, a tensor can be in the wrong place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.end_to_end.small_runs import PLACEMENTS, untouched
from tests.small_pipelines import SMALL_PIPELINES, small_call

from pipefit.planner.apply import apply_options
from pipefit.planner.catalog import find_gpu
from pipefit.planner.rehearse import on_stage
from pipefit.planner.signatures import GPU
from pipefit.strategies.live import module_components

CARD = find_gpu("rtx-4060")
MOVING = [name for name in PLACEMENTS if name != "resident"]
QUICK = ("stable_diffusion_xl", "flux")
NAMES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in SMALL_PIPELINES
]


def places(pipe: Any) -> set[str]:
    return {
        str(tensor.device)
        for module in module_components(pipe).values()
        for tensor in (*module.parameters(), *module.buffers())
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("placement", MOVING)
def test_two_calls_find_every_tensor_where_it_is_needed(name: str, placement: str) -> None:
    with on_stage(untouched(name)[0], CARD) as stage:
        with apply_options(stage.pipe, PLACEMENTS[placement](stage.pipe), GPU):
            away = places(stage.pipe) - {str(GPU)}
            for _ in range(2):
                stage.pipe(**small_call(name))
        assert away & {"cpu", "meta"}
        assert places(stage.pipe) == {"cpu"}


def test_weights_that_sequential_offload_drops_leave_the_gpu() -> None:
    pipe, _ = untouched("flux")
    options = PLACEMENTS["sequential_offload"](pipe)
    with on_stage(pipe, CARD) as stage, apply_options(stage.pipe, options, GPU):
        assert "meta" in places(stage.pipe)
        stage.pipe(**small_call("flux"))
        assert "meta" in places(stage.pipe)


def test_a_weight_that_nobody_loads_is_noticed() -> None:
    with on_stage(untouched("flux")[0], CARD) as stage:
        stage.pipe.transformer.to(GPU)
        layer = stage.pipe.transformer.x_embedder
        layer._parameters["weight"] = layer.weight.to("meta")
        with pytest.raises(RuntimeError, match="same device"):
            layer(torch.zeros(1, 4, layer.in_features, device=GPU))


def test_blocks_of_an_autoencoder_that_names_none_would_stay_on_the_cpu() -> None:
    with on_stage(untouched("cogvideox")[0], CARD) as stage:
        vae = stage.pipe.vae
        vae.enable_group_offload(GPU, offload_type="block_level", num_blocks_per_group=1)
        latents = torch.zeros(1, 4, 1, 6, 8, device=GPU)
        with pytest.raises(RuntimeError, match="same device"):
            vae.decode(latents)
