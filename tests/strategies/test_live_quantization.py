"""Weights of live components quantised by the libraries themselves, and put back.

What is made is what is predicted: the same layers, the same bytes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from tests.small_pipelines import SMALL_PIPELINES, picture
from tests.strategies.described import described
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pipefit.errors import ApplyFailed, InvalidRequest, UnsupportedPipeline
from pipefit.planner.apply import apply_options, check_pipeline
from pipefit.planner.snapshot import differences, snapshot
from pipefit.strategies import strategy
from pipefit.strategies.live import device_restorer, module_components, tensor_slots
from pipefit.strategies.quantization import IN_PLACE
from pipefit.strategies.quantized_linear import QuantizedLinear
from pipefit.strategies.strategy import Option

QUANTIZATION: Any = strategy("quantization")

INT8 = {"backend": "torchao", "type": "int8_weight_only"}

FLOOR_DB = {
    ("torchao", "int8_weight_only"): 61,
    ("torchao", "int8_dynamic_activation_int8_weight"): 57,
    ("torchao", "float8_weight_only"): 42,
    ("torchao", "int8_dynamic_activation_int4_weight"): 38,
    ("quanto", "int8"): 60,
    ("quanto", "float8"): 42,
    ("quanto", "int4"): 38,
}
"""The least PSNR of the small FLUX's picture, for every type that a CPU can compute with.

3 dB below what torchao 0.18 and optimum-quanto 0.2.7 gave: errors of 1.4 times the size."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Several threads are ten times slower for tensors of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def library(backend: str) -> Any:
    """Return the module of *backend*, or skip the test."""
    name, package = {
        "torchao": ("torchao", "torchao"),
        "quanto": ("optimum.quanto", "optimum-quanto"),
    }[backend]
    return pytest.importorskip(name, reason=f"needs `pip install {package}`")


def flux() -> Any:
    pipe = SMALL_PIPELINES["flux"]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def leaves(tensor: Any) -> list[torch.Tensor]:
    """Return the plain tensors that a quantised one is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [
        leaf for name in tensor.__tensor_flatten__()[0] for leaf in leaves(getattr(tensor, name))
    ]


def made_bytes(module: Any) -> dict[str, int]:
    """Return what the weight of each quantised layer takes, by path."""
    return {
        path: sum(leaf.numel() * leaf.element_size() for leaf in leaves(weight))
        for path, layer in module.named_modules()
        # A layer that adapters are put around shows its weight as theirs.
        if is_traceable_wrapper_subclass(weight := layer._parameters.get("weight"))
    }


def predicted_bytes(module: Any, parameters: dict[str, Any]) -> dict[str, int]:
    """Return the same of a weightless copy of *module* that imitates it."""
    twin = copy.deepcopy(module).to("meta")
    QUANTIZATION.imitate(SimpleNamespace(part=twin), "part", parameters)
    return {
        path: sum(
            tensor.numel() * tensor.element_size()
            for name, tensor in layer.named_parameters()
            if name.startswith("weight")
        )
        for path, layer in twin.named_modules()
        if isinstance(layer, QuantizedLinear)
    }


def psnr_db(one: torch.Tensor, other: torch.Tensor) -> float:
    mean = (one.double() - other.double()).square().mean().item()
    return math.inf if mean == 0 else -10 * math.log10(mean)


@pytest.mark.parametrize(("backend", "type_"), FLOOR_DB)
def test_what_is_made_is_what_is_predicted_and_undo_gives_the_very_weights_back(
    backend: str, type_: str
) -> None:
    library(backend)
    pipe, parameters = flux(), {"backend": backend, "type": type_}
    untouched = picture(pipe, "flux")
    before = snapshot(pipe, with_values=True)
    tensors = [(slots, key, slots[key]) for slots, key in tensor_slots(pipe.transformer)]
    modules = dict(pipe.transformer.named_modules())
    predicted = predicted_bytes(pipe.transformer, parameters)

    undo = QUANTIZATION.apply(pipe, "transformer", parameters, torch.device("cpu"))
    assert made_bytes(pipe.transformer) == predicted
    assert len(predicted) > 10
    made = picture(pipe, "flux")
    assert math.inf > psnr_db(made, untouched) >= FLOOR_DB[backend, type_]

    undo()
    assert differences(before, snapshot(pipe, with_values=True)) == ()
    assert all(slots[key] is tensor for slots, key, tensor in tensors)
    assert dict(pipe.transformer.named_modules()) == modules
    assert not any("extra_repr" in vars(part) for part in modules.values())
    assert picture(pipe, "flux").equal(untouched)


def t5() -> Any:
    return SMALL_PIPELINES["flux"]().text_encoder_2


def with_adapters() -> Any:
    module = SMALL_PIPELINES["flux"]().transformer
    module.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_k"]))
    return module


def tied() -> Any:
    """Return a module with one layer in two places, and another that an embedding is tied to."""
    module = torch.nn.Module()
    module.words = torch.nn.Embedding(64, 32)
    module.head = torch.nn.Linear(32, 64)
    module.head.weight = module.words.weight
    module.one = torch.nn.Sequential(torch.nn.Linear(32, 32))
    module.other = torch.nn.Sequential(module.one[0])
    return module


@pytest.mark.parametrize("backend", IN_PLACE)
@pytest.mark.parametrize("build", [t5, with_adapters, tied])
def test_the_layers_that_are_converted_are_those_predicted(
    backend: str, build: Callable[[], Any]
) -> None:
    library(backend)
    module, parameters = build(), {"backend": backend, "type": IN_PLACE[backend][0]}
    predicted = predicted_bytes(module, parameters)
    before = list(module.parameters())
    undo = QUANTIZATION.apply(SimpleNamespace(part=module), "part", parameters, "cpu")
    assert made_bytes(module) == predicted
    assert predicted
    assert not any("lora" in path or path.endswith(".wo") for path in predicted)
    undo()
    assert all(a is b for a, b in zip(module.parameters(), before, strict=True))


def test_layers_and_groups_that_are_asked_for_otherwise_are_made_so() -> None:
    library("torchao")
    for parameters in (
        {**INT8, "all_linear": True},
        {**INT8, "modules_to_not_convert": ("wo", "wi_0")},
        {"backend": "torchao", "type": "int8_dynamic_activation_int4_weight", "group_size": 32},
    ):
        module = t5()
        predicted = predicted_bytes(module, parameters)
        QUANTIZATION.apply(SimpleNamespace(part=module), "part", parameters, "cpu")
        assert made_bytes(module) == predicted


QUANTO_PLACEMENTS = [
    Option(strategy="resident", component="transformer"),
    Option(strategy="model_offload"),
]

PLACEMENTS = [
    *QUANTO_PLACEMENTS,
    Option(strategy="sequential_offload"),
    Option(
        strategy="group_offload",
        component="transformer",
        parameters={"offload_type": "leaf_level"},
    ),
    Option(
        strategy="group_offload",
        component="transformer",
        parameters={"offload_type": "block_level", "num_blocks_per_group": 1},
    ),
]


@pytest.mark.parametrize(
    ("backend", "placed"),
    [
        *(("torchao", placed) for placed in PLACEMENTS),
        *(("quanto", placed) for placed in QUANTO_PLACEMENTS),
    ],
)
def test_what_may_place_quantised_weights_does_and_is_taken_back_first(
    backend: str, placed: Option
) -> None:
    library(backend)
    pipe, parameters = flux(), {"backend": backend, "type": IN_PLACE[backend][0]}
    quantised = Option(strategy="quantization", component="transformer", parameters=parameters)
    untouched, before = picture(pipe, "flux"), snapshot(pipe, with_values=True)
    with apply_options(pipe, [quantised], "cpu"):
        alone = picture(pipe, "flux")
    # In the order in which they are applied, whatever the order in which they are given.
    with apply_options(pipe, [placed, quantised], "cpu"):
        assert picture(pipe, "flux").equal(alone)
    assert not alone.equal(untouched)
    assert differences(before, snapshot(pipe, with_values=True)) == ()
    assert picture(pipe, "flux").equal(untouched)


def test_what_else_changes_a_component_goes_with_it() -> None:
    library("torchao")
    pipe = SMALL_PIPELINES["stable_diffusion_xl"]()
    pipe.set_progress_bar_config(disable=True)
    options = [
        Option(strategy="channels_last", component="unet"),
        Option(strategy="attention", component="unet", parameters={"slicing": 1}),
        Option(strategy="quantization", component="unet", parameters=INT8),
        *(
            Option(strategy="precision", component=name, parameters={"dtype": "bfloat16"})
            for name in module_components(pipe)  # one of another dtype would be handed theirs
        ),
        Option(strategy="model_offload"),
    ]
    untouched, before = picture(pipe, "stable_diffusion_xl"), snapshot(pipe, with_values=True)
    tensors = [(slots, key, slots[key]) for slots, key in tensor_slots(pipe.unet)]
    with apply_options(pipe, options, "cpu"):
        assert not any(weight.dtype == torch.float32 for weight in pipe.unet.parameters())
        assert psnr_db(picture(pipe, "stable_diffusion_xl"), untouched) > 30
    assert all(slots[key] is tensor for slots, key, tensor in tensors)
    assert differences(before, snapshot(pipe, with_values=True)) == ()
    assert picture(pipe, "stable_diffusion_xl").equal(untouched)


@pytest.mark.parametrize("backend", IN_PLACE)
def test_a_component_that_is_quantised_already_is_not_planned_for(backend: str) -> None:
    library(backend)
    pipe, parameters = flux(), {"backend": backend, "type": IN_PLACE[backend][0]}
    option = Option(strategy="quantization", component="transformer", parameters=parameters)
    with (
        apply_options(pipe, [option], "cpu"),
        pytest.raises(UnsupportedPipeline, match=r"quantised .*undo the earlier plan"),
    ):
        check_pipeline(pipe)
    check_pipeline(pipe)


@pytest.mark.parametrize(
    ("backend", "placed", "says"),
    [
        ("torchao", Option(strategy="streaming", component="transformer"), "block by block"),
        ("quanto", Option(strategy="sequential_offload"), "issue 10526"),
        (
            "torchao",
            Option(
                strategy="group_offload",
                component="transformer",
                parameters={"offload_type": "leaf_level", "use_stream": True},
            ),
            "survive neither",
        ),
    ],
)
def test_what_loses_quantised_weights_is_refused_before_they_are(
    backend: str, placed: Option, says: str
) -> None:
    pipe = flux()
    before = snapshot(pipe)
    parameters = {"backend": backend, "type": IN_PLACE[backend][0]}
    quantised = Option(strategy="quantization", component="transformer", parameters=parameters)
    with pytest.raises(InvalidRequest, match=says):
        apply_options(pipe, [quantised, placed], "cpu")
    assert differences(before, snapshot(pipe)) == ()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU may have what is missing")
def test_a_type_that_this_machine_cannot_make_leaves_all_as_it_was() -> None:
    library("torchao")
    pipe = flux()
    before = snapshot(pipe, with_values=True)
    parameters = {"backend": "torchao", "type": "float8_dynamic_activation_float8_weight"}
    option = Option(strategy="quantization", component="transformer", parameters=parameters)
    with pytest.raises(ApplyFailed, match=r"compute capability.*everything was undone"):
        apply_options(pipe, [option], "cpu")
    assert differences(before, snapshot(pipe, with_values=True)) == ()


def test_a_device_is_restored_with_all_that_a_quantised_weight_is_made_of() -> None:
    library("torchao")
    linear, elsewhere = (torch.nn.Linear(32, 32, bias=False, device=d) for d in ("cpu", "meta"))
    restore = device_restorer(elsewhere)
    QUANTIZATION.apply(SimpleNamespace(part=torch.nn.Sequential(linear)), "part", INT8, "cpu")
    elsewhere.weight = weight = linear.weight
    assert {leaf.device.type for leaf in leaves(weight)} == {"cpu"}
    restore()
    assert elsewhere.weight is weight
    assert {leaf.device.type for leaf in leaves(weight)} == {"meta"}


def test_the_original_weights_are_what_waits_in_host_memory() -> None:
    module = SMALL_PIPELINES["flux"]().transformer
    twin = copy.deepcopy(module).to("meta")
    QUANTIZATION.imitate(SimpleNamespace(part=twin), "part", INT8)
    converted = [p for p, one in twin.named_modules() if isinstance(one, QuantizedLinear)]
    weights = [module.get_submodule(path).weight for path in converted]
    held = QUANTIZATION.held_bytes(described(module), described(twin), is_loaded=True)
    assert held == sum(weight.numel() * weight.element_size() for weight in weights)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_what_lies_on_the_gpu_is_quantised_there_while_the_originals_wait_on_the_host() -> None:
    library("torchao")
    module = SMALL_PIPELINES["flux"]().transformer.to("cuda")
    layer = module.proj_out
    weight, values = layer.weight, layer.weight.detach().clone()
    pipe = SimpleNamespace(part=module)
    undo = QUANTIZATION.apply(pipe, "part", INT8, torch.device("cuda"))
    assert {leaf.device.type for leaf in leaves(layer.weight)} == {"cuda"}
    assert weight.device.type == "cpu"
    restore = device_restorer(module)
    module.to("cpu")
    restore()
    assert {leaf.device.type for leaf in leaves(layer.weight)} == {"cuda"}
    undo()
    assert layer.weight is weight
    assert weight.device.type == "cuda"
    assert weight.equal(values)
