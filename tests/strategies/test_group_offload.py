"""Group offload: what is offered to which class, and that what is refused does fail."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import diffusers
import pytest
import torch
import transformers
from diffusers.models import StableCascadeUNet
from tests.strategies.described import ADA, decoding, described

from pipefit.cost_models import placement
from pipefit.cost_models.machine import Gpu
from pipefit.strategies import strategy

GROUP = strategy("group_offload")
CPU = Gpu(name="cpu", architecture="cpu", total_bytes=1 << 30, free_bytes=1 << 30)


def on_meta(build: Any) -> Any:
    with torch.device("meta"):
        return build()


def offered(module: Any, gpu: Gpu = ADA) -> list[tuple[str, bool]]:
    component = described(module)
    return [
        (parameters["offload_type"], parameters.get("use_stream", False))
        for parameters in GROUP.options(component, decoding(component), gpu)
    ]


def t5() -> Any:
    config = transformers.T5Config(d_model=16, d_ff=16, d_kv=4, num_layers=2, num_heads=2)
    return transformers.T5EncoderModel(config)


def clip(cls: Any) -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    return cls(config)


def test_a_denoiser_is_offered_leaves_and_blocks_with_and_without_a_stream() -> None:
    flux = on_meta(lambda: diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1))
    assert offered(flux) == [
        ("leaf_level", False),
        ("block_level", False),
        ("leaf_level", True),
        ("block_level", True),
        ("leaf_level", True),
        ("block_level", True),
    ]


def test_a_device_without_streams_is_offered_none() -> None:
    flux = on_meta(lambda: diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1))
    assert offered(flux, CPU) == [("leaf_level", False), ("block_level", False)]


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (diffusers.AutoencoderKL, [("leaf_level", False), ("block_level", False)]),
        (diffusers.AutoencoderKLLTXVideo, [("leaf_level", False)]),
        (diffusers.AutoencoderKLFlux2, []),
        (diffusers.VQModel, []),
    ],
)
def test_autoencoders_go_without_streams_and_some_classes_not_at_all(
    build: Any, expected: list[tuple[str, bool]]
) -> None:
    assert offered(on_meta(build)) == expected


@pytest.mark.parametrize(
    ("build", "blocks", "streams_blocks"),
    [
        (t5, ["encoder"], False),
        (lambda: clip(transformers.CLIPTextModel), ["encoder"], True),
        (lambda: clip(transformers.CLIPTextModelWithProjection), ["text_model", "encoder"], False),
    ],
)
def test_text_encoders_name_the_way_to_their_blocks(
    build: Any, blocks: list[str], streams_blocks: bool
) -> None:
    module = on_meta(build)
    assert described(module).traits["block_modules"] == blocks
    by_leaf, by_block = ("leaf_level", True), ("block_level", True)
    assert offered(module) == [
        ("leaf_level", False),
        ("block_level", False),
        *((by_leaf, by_block) * 2 if streams_blocks else (by_leaf, by_leaf)),
    ]


def test_lists_of_lists_are_refused_blocks_and_would_fail() -> None:
    from pipefit.planner.virtual import Observer, VirtualMachine
    from pipefit.planner.virtual_tensors import CPU as HOST

    parameters = {"offload_type": "block_level", "num_blocks_per_group": 1}
    small = {"block_out_channels": (8, 8), "down_num_layers_per_block": (1, 1)}
    module = on_meta(
        lambda: StableCascadeUNet(
            conditioning_dim=8,
            block_types_per_layer=(("SDCascadeResBlock",), ("SDCascadeResBlock",)),
            up_num_layers_per_block=(1, 1),
            down_blocks_repeat_mappers=(1, 1),
            up_blocks_repeat_mappers=(1, 1),
            num_attention_heads=(0, 1),
            **small,
        )
    )
    assert "lists of lists" in str(GROUP.refusal(described(module), parameters))
    assert GROUP.refusal(described(module), {"offload_type": "leaf_level"}) is None
    with VirtualMachine(Observer()) as machine, torch.no_grad():
        for part in module.modules():
            for table in (part._parameters, part._buffers):
                for key, tensor in table.items():
                    table[key] = tensor if tensor is None else machine.parameter(tensor, HOST)
        GROUP.apply(SimpleNamespace(decoder=module), "decoder", parameters, "cuda")
        noise = torch.empty(1, module.config.in_channels, 16, 16, device="cuda")
        text = torch.empty(1, 1, module.config.clip_text_pooled_in_channels or 1280, device="cuda")
        with pytest.raises(RuntimeError, match="same device"):
            module(noise, torch.empty(1, device="cuda"), text)


def test_blocks_within_blocks_are_refused_a_stream_and_would_fail() -> None:
    from pipefit.planner.virtual import Observer, VirtualMachine

    parameters = {
        "num_blocks_per_group": 1,
        "block_modules": ("encoder",),
        "use_stream": True,
        "low_cpu_mem_usage": True,  # without a GPU nothing can be page-locked
    }
    module = t5()
    assert "nested blocks" in str(GROUP.refusal(described(module), parameters))
    pipe = SimpleNamespace(text_encoder=module)
    with VirtualMachine(Observer()), pytest.raises(ValueError, match="already exists"):
        GROUP.apply(pipe, "text_encoder", parameters, "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_decoder_may_be_streamed_unless_pipelines_cast_it(dtype: torch.dtype) -> None:
    module = on_meta(diffusers.AutoencoderKL).to(dtype)
    refused = GROUP.refusal(described(module), {"offload_type": "leaf_level", "use_stream": True})
    assert bool(refused) == (dtype != torch.float32)
    steady = on_meta(lambda: diffusers.AutoencoderKL(force_upcast=False)).to(dtype)
    assert not GROUP.refusal(described(steady), {"offload_type": "leaf_level", "use_stream": True})


def flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=1,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8), in_channels=4,
    )  # fmt: skip


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_weights_come_back_from_the_disk_and_leave_nothing_there(
    offload_type: str, tmp_path: Path
) -> None:
    module = flux()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    pipe = SimpleNamespace(transformer=module, other=flux())
    undos = [
        GROUP.apply(
            pipe,
            name,
            {
                "offload_type": offload_type,
                "num_blocks_per_group": 1,
                "offload_to_disk_path": str(tmp_path),
            },
            "cpu",
        )
        for name in ("transformer", "other")
    ]
    assert len(list(tmp_path.iterdir())) == 2
    for undo in undos:
        undo()
    assert list(tmp_path.iterdir()) == []
    after = module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_tied_weights_are_refused_on_the_disk_and_would_be_lost(tmp_path: Path) -> None:
    parameters = {"offload_type": "leaf_level", "offload_to_disk_path": str(tmp_path)}
    module = t5().eval()
    assert "tied" in str(GROUP.refusal(described(module), parameters))
    ids = torch.arange(4)[None]
    with torch.no_grad():
        expected = module(ids)[0]
        GROUP.apply(SimpleNamespace(text_encoder=module), "text_encoder", parameters, "cpu")
        assert not torch.equal(module(ids)[0], expected)


def test_block_modules_divide_a_text_encoder_into_its_blocks() -> None:
    module = t5()
    parameters = {
        "offload_type": "block_level",
        "num_blocks_per_group": 1,
        "block_modules": ("encoder",),
    }
    undo = GROUP.apply(SimpleNamespace(text_encoder=module), "text_encoder", parameters, "cpu")
    hooked = [path for path, part in module.named_modules() if hasattr(part, "_diffusers_hook")]
    undo()
    assert hooked == ["", "encoder", "encoder.block.0", "encoder.block.1"]
    assert not any(hasattr(part, "_diffusers_hook") for part in module.modules())


class Pooler(torch.nn.Module):
    """A head that pools by torch's own attention module, as SigLIP's vision tower does."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


def test_a_projection_that_is_read_and_not_called_is_refused_and_would_fail() -> None:
    component = described(Pooler())
    for name, parameters in (
        ("group_offload", {"offload_type": "leaf_level"}),
        ("sequential_offload", {}),
    ):
        assert "MultiheadAttention" in str(strategy(name).refusal(component, parameters))
    module = accelerate.cpu_offload(Pooler(), torch.device("cpu"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        module(torch.ones(1, 2, 4))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"offload_type": "leaf"}, "block_level or leaf_level"),
        ({"offload_type": "block_level"}, "needs num_blocks_per_group"),
        ({"num_blocks_per_group": 0}, "at least 1"),
        ({"offload_type": "leaf_level", "record_stream": True}, "needs use_stream"),
        ({"offload_type": "leaf_level", "use_stream": "yes"}, "true or false"),
    ],
)
def test_parameters_that_the_library_would_reject_are_refused(
    parameters: dict[str, Any], message: str
) -> None:
    flux = on_meta(lambda: diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1))
    assert message in str(GROUP.refusal(described(flux), parameters))


def test_the_placement_says_what_the_parameters_say() -> None:
    parameters = {"offload_type": "leaf_level", "use_stream": True, "low_cpu_mem_usage": True}
    assert GROUP.placement(parameters) == placement.GroupOffload(
        offload_type="leaf_level", use_stream=True, low_cpu_mem_usage=True
    )


def test_a_stream_that_the_device_lacks_leaves_nothing_behind() -> None:
    module = t5()
    with pytest.raises(ValueError, match="implements streams"):
        GROUP.apply(
            SimpleNamespace(text_encoder=module),
            "text_encoder",
            {"offload_type": "leaf_level", "use_stream": True},
            "cpu",
        )
    assert not any(hasattr(part, "_diffusers_hook") for part in module.modules())
