"""Quantised layers hold and allocate what those of the libraries do."""

from __future__ import annotations

import importlib
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from tests.small_pipelines import SMALL_PIPELINES, small_call
from tests.strategies.described import ADA, decoding, described
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipefit import plan, predict
from pipefit.cost_models.allocator import block_bytes
from pipefit.cost_models.storage import TYPES, stored_weight
from pipefit.cost_models.units import GIB, format_bytes
from pipefit.cost_models.workload import Phase
from pipefit.errors import NoPlanFits, UnsupportedPipeline
from pipefit.planner.catalog import reference_machine
from pipefit.strategies import quality_of, strategy
from pipefit.strategies.quantization import PACKAGES
from pipefit.strategies.quantized_linear import QuantizedLinear
from pipefit.strategies.strategy import Option, Quality

QUANTIZATION = strategy("quantization")

ROWS, INPUTS, OUTPUTS = 512, 1024, 2048

REAL_LAYERS = {
    ("torchao", "int8_weight_only"): (2_107_392, 6_291_456),
    ("torchao", "float8_weight_only"): (2_105_344, 20_971_520),
    ("torchao", "int8_dynamic_activation_int4_weight"): (2_293_760, 9_568_256),
    ("quanto", "int8"): (2_101_248, 6_291_456),
    ("quanto", "float8"): (2_101_248, 8_388_608),
    ("gguf", "Q8_0"): (2_228_224, 8_388_608),
    ("gguf", "Q4_0"): (1_179_648, 8_388_608),
    ("gguf", "Q4_1"): (1_310_720, 10_485_760),
    ("gguf", "Q5_0"): (1_441_792, 20_971_520),
    ("gguf", "Q5_1"): (1_572_864, 20_971_520),
    ("gguf", "Q2_K"): (688_128, 11_010_052),
    ("gguf", "Q3_K"): (901_120, 11_141_120),
    ("gguf", "Q4_K"): (1_179_648, 10_878_976),
    ("gguf", "Q5_K"): (1_441_792, 15_073_280),
    ("gguf", "Q6_K"): (1_720_320, 10_747_904),
}
"""Bytes of the weight, and the most allocated in one forward, of the libraries' own layers.

A bfloat16 layer of 1024 inputs and 2048 outputs with a bias, 512 rows of input, every storage that
an operator makes counted; torchao 0.18, optimum-quanto 0.2.7 (``qbytes_mm``), diffusers 0.42.1 with
gguf 0.19, torch 2.13 on a CPU."""

SHIFT_TABLE_BYTES = 8
"""What the constants that shift packed bits apart may add or not."""


class _Counted(TorchDispatchMode):
    """Counts the bytes of storages that operators make, while they live."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self._seen = {one.untyped_storage()._cdata for one in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return made

    def _free(self, key: int, num_bytes: int) -> None:
        self._seen.discard(key)
        self.now -= num_bytes


@pytest.mark.parametrize(("backend", "type_"), REAL_LAYERS)
def test_a_layer_holds_and_allocates_what_the_library_s_does(backend: str, type_: str) -> None:
    weight_bytes, peak_bytes = REAL_LAYERS[backend, type_]
    linear = torch.nn.Linear(INPUTS, OUTPUTS, device="meta", dtype=torch.bfloat16)
    stored = stored_weight(backend, type_, outputs=OUTPUTS, inputs=INPUTS, dtype="bfloat16")
    layer = QuantizedLinear(linear, stored, backend, type_)
    assert sum(tensor.num_bytes for tensor in stored) == weight_bytes
    rows = torch.empty(ROWS, INPUTS, device="meta", dtype=torch.bfloat16)
    with torch.no_grad(), _Counted([rows, *layer.parameters()]) as counted:
        out = layer(rows)
    assert (out.shape, out.dtype) == ((ROWS, OUTPUTS), torch.bfloat16)
    assert counted.peak == pytest.approx(peak_bytes, abs=SHIFT_TABLE_BYTES)


def flux() -> Any:
    with torch.device("meta"):
        return diffusers.FluxTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            num_attention_heads=2,
            joint_attention_dim=256,
            pooled_projection_dim=256,
        ).bfloat16()


def t5() -> Any:
    config = transformers.T5Config(
        d_model=256, d_ff=512, d_kv=64, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
    )
    with torch.device("meta"):
        return transformers.T5EncoderModel(config).bfloat16()


def quantized(module: Any, **parameters: Any) -> Any:
    assert QUANTIZATION.refusal(described(module), parameters) is None
    QUANTIZATION.imitate(SimpleNamespace(part=module), "part", parameters)  # type: ignore[attr-defined]
    return module


def kept(module: Any) -> set[str]:
    """Linear layers that hold an ordinary weight, numbers taken out of their paths."""
    return {
        ".".join(name for name in path.split(".") if not name.isdigit())
        for path, one in module.named_modules()
        if type(one) is torch.nn.Linear
    }


@pytest.mark.parametrize(
    ("backend", "type_"), [(b, t) for b, types in TYPES.items() for t in types]
)
def test_every_type_runs_a_model_without_weights(backend: str, type_: str) -> None:
    module = quantized(flux(), backend=backend, type=type_)
    with torch.no_grad():
        out = module(
            hidden_states=torch.empty(1, 16, 64, device="meta", dtype=torch.bfloat16),
            encoder_hidden_states=torch.empty(1, 8, 256, device="meta", dtype=torch.bfloat16),
            pooled_projections=torch.empty(1, 256, device="meta", dtype=torch.bfloat16),
            timestep=torch.empty(1, device="meta", dtype=torch.bfloat16),
            img_ids=torch.empty(16, 3, device="meta"),
            txt_ids=torch.empty(8, 3, device="meta"),
            guidance=torch.empty(1, device="meta") if module.config.guidance_embeds else None,
        ).sample
    assert (out.shape, out.dtype) == ((1, 16, 64), torch.bfloat16)


def test_transformers_leaves_out_what_its_class_wants_in_float32() -> None:
    wo = {"encoder.block.layer.DenseReluDense.wo"}
    parameters = {"backend": "torchao", "type": "int8_weight_only"}
    assert kept(quantized(t5(), **parameters)) == wo
    assert kept(quantized(t5(), **parameters, all_linear=True)) == set()
    assert kept(quantized(t5(), **parameters, modules_to_not_convert=("q",))) == {
        "encoder.block.layer.SelfAttention.q"
    }


def test_layers_that_are_left_out_can_be_in_another_dtype() -> None:
    module = quantized(t5(), backend="bitsandbytes", type="nf4", kept_dtype="float32")
    wo = module.encoder.block[0].layer[1].DenseReluDense.wo
    assert wo.weight.dtype == torch.float32
    assert module.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("backend", "type_"), [(b, t) for b, types in TYPES.items() for t in types]
)
def test_a_model_s_dtype_is_not_that_of_packed_data_or_of_a_scale(backend: str, type_: str) -> None:
    with torch.device("meta"):
        module = diffusers.Flux2Transformer2DModel(
            num_layers=1, num_single_layers=1, num_attention_heads=2, joint_attention_dim=256
        ).bfloat16()
    assert quantized(module, backend=backend, type=type_).dtype == torch.bfloat16


def test_a_gguf_file_keeps_the_ends_of_the_model_and_stores_fused_projections_better() -> None:
    module = quantized(flux(), backend="gguf", type="q4_k_m")
    assert kept(module) == {
        "x_embedder",
        "context_embedder",
        "proj_out",
        "norm_out.linear",
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        "time_text_embed.text_embedder.linear_1",
        "time_text_embed.text_embedder.linear_2",
    }
    assert module.transformer_blocks[0].attn.add_k_proj.type == "Q5_K"
    assert module.transformer_blocks[0].ff.net[2].type == "Q4_K"
    assert module.single_transformer_blocks[0].attn.to_v.type == "Q4_K"


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({}, "backend is one of torchao, bitsandbytes, gguf, quanto"),
        ({"backend": "torchao", "type": "nf4"}, "torchao has the types int8_weight_only"),
        ({"backend": "torchao", "type": "int8_weight_only", "per_row": True}, "per_row is for"),
        (
            {"backend": "torchao", "type": "int4_weight_only", "group_size": 48},
            "group_size is one of 32",
        ),
        ({"backend": "bitsandbytes", "type": "nf4", "double_quant": 1}, "true or false"),
        ({"backend": "bitsandbytes", "type": "nf4", "kept_dtype": "int8"}, "kept_dtype is one of"),
        ({"backend": "gguf", "type": "Q8_0"}, "cannot be read from a GGUF file"),
    ],
)
def test_what_no_library_has_is_refused(parameters: dict[str, Any], words: str) -> None:
    assert words in str(QUANTIZATION.refusal(described(t5()), parameters))


def test_what_is_quantised_while_it_loads_is_read_whole() -> None:
    before, after = described(t5()), described(quantized(t5(), backend="quanto", type="int8"))

    def note(backend: str, type_: str, *, is_loaded: bool = False) -> str:
        parameters = {"backend": backend, "type": type_}
        return QUANTIZATION.note(parameters, before, after, is_loaded=is_loaded)  # type: ignore[attr-defined]

    assert f"reads {format_bytes(before.weight_bytes)}." in note("quanto", "int8")
    assert "reads" not in note("gguf", "Q8_0")
    assert "when it is loaded, not afterwards" in note("gguf", "Q8_0")
    assert "not afterwards" not in note("quanto", "int8")
    live = note("quanto", "int8", is_loaded=True)
    assert "once the plan is applied" in live
    held = QUANTIZATION.held_bytes(before, after, is_loaded=True)  # type: ignore[attr-defined]
    assert f"{format_bytes(held)} of original weights" in live
    assert QUANTIZATION.held_bytes(before, after, is_loaded=False) == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("placed", ["resident", "model_offload"])
def test_what_is_quantised_on_the_gpu_is_there_together_before_any_offload(placed: str) -> None:
    def ask(backend: str) -> Any:
        pipe = SMALL_PIPELINES["flux"]()
        parts = ("transformer", "text_encoder_2")
        asked = [f"quantization:backend={backend}@{part}" for part in parts]
        wide = ["model_offload"] if placed == "model_offload" else []
        call = small_call("flux")
        machine = reference_machine(["rtx-4090"])
        return predict(pipe, [*asked, *wide], call=call, machine=machine)

    found = ask("bitsandbytes,type=int8")
    (peak,) = found.peak_vram
    in_phases_bytes = max(phase.allocated_bytes for phase in found.phases)
    together_bytes = sum(_loaded_bytes(part) for part in ("transformer", "text_encoder_2"))
    assert peak.loading_bytes == together_bytes
    assert peak.allocated_bytes == max(in_phases_bytes, peak.loading_bytes)
    assert peak.process_bytes >= peak.loading_bytes + peak.context_bytes
    assert peak.slack_bytes >= 0
    (said,) = [a for a in found.assumptions if "quantised on the GPU" in a]
    assert said.startswith(format_bytes(peak.loading_bytes))

    elsewhere = ask("quanto,type=int8")
    assert elsewhere.peak_vram[0].loading_bytes == 0
    assert not any("quantised on the GPU" in a for a in elsewhere.assumptions)


def _loaded_bytes(part: str) -> int:
    """Return what *part* of the small pipeline takes on the GPU in blocks, tied tensors once."""
    module = getattr(SMALL_PIPELINES["flux"](), part)
    QUANTIZATION.imitate(
        SimpleNamespace(**{part: module}), part, {"backend": "bitsandbytes", "type": "int8"}
    )
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(block_bytes(t.numel() * t.element_size()) for t in tensors.values())


@pytest.mark.slow
def test_loading_is_the_peak_of_flux_in_four_bits_under_model_offload() -> None:
    """12.24 GiB: docs/source/en/optimization/speed-memory-optims.md in diffusers at 58eb52c0."""
    asked = _both("backend=bitsandbytes,type=nf4", ",kept_dtype=float32")
    machine = reference_machine(["rtx-4090"])
    found = predict("flux.1-dev", [*asked, "model_offload"], machine=machine)
    assert found.peak_vram[0].allocated_bytes / GIB == pytest.approx(12.24, rel=0.01)
    assert max(phase.allocated_bytes for phase in found.phases) / GIB < 8


def test_a_loaded_pipeline_is_told_to_load_again() -> None:
    for backend, type_ in (("gguf", "Q8_0"), ("bitsandbytes", "nf4")):
        with pytest.raises(UnsupportedPipeline, match=r"let pipefit\.load do it"):
            QUANTIZATION.apply(None, "transformer", {"backend": backend, "type": type_}, "cpu")


@pytest.mark.parametrize(
    ("parameters", "goes"),
    [
        ({"backend": "torchao", "type": "int8_weight_only"}, True),
        ({"backend": "torchao", "type": "int8_weight_only", "kept_dtype": "float32"}, False),
        ({"backend": "torchao", "type": "int4_weight_only"}, False),
        ({"backend": "quanto", "type": "int4"}, True),
        ({"backend": "bitsandbytes", "type": "int8"}, False),
    ],
)
def test_what_a_library_makes_of_live_modules_goes_on_loaded_ones(
    parameters: dict[str, Any], goes: bool
) -> None:
    assert QUANTIZATION.goes_on_loaded(parameters) is goes  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("backend", "type_", "quality"),
    [
        ("torchao", "int8_weight_only", Quality.BALANCED),
        ("gguf", "Q8_0", Quality.BALANCED),
        ("gguf", "q6_k", Quality.LOW),
        ("bitsandbytes", "nf4", Quality.LOW),
        ("gguf", "F16", Quality.HIGH),
    ],
)
def test_fewer_than_eight_bits_are_of_low_quality(
    backend: str, type_: str, quality: Quality
) -> None:
    option = Option(strategy="quantization", parameters={"backend": backend, "type": type_})
    assert quality_of(option) == quality


def _both(text: str, t5: str = "") -> list[str]:
    return [f"quantization:{text}@transformer", f"quantization:{text}{t5}@text_encoder_2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategies", "published_gib"),
    [
        (["quantization:backend=gguf,type=Q8_0@transformer"], 25.973),
        (["quantization:backend=gguf,type=Q4_1@transformer"], 21.326),
        (["quantization:backend=gguf,type=Q2_K@transformer"], 17.752),
        (_both("backend=bitsandbytes,type=int8", ",kept_dtype=float32"), 24.432),
        (_both("backend=quanto,type=float8,all_linear=true"), 20.898),
        ([*_both("backend=torchao,type=int8_weight_only"), "model_offload"], 12.189),
        ([*_both("backend=quanto,type=int8"), "model_offload"], 12.166),
        (["layerwise_casting@transformer", "model_offload"], 15.621),
    ],
)
def test_reserved_peaks_of_flux_are_those_published(
    strategies: list[str], published_gib: float
) -> None:
    """FLUX.1-dev on an H100, from https://huggingface.co/blog/diffusers-quantization (2025-05)."""
    found = predict("flux.1-dev", strategies, machine=reference_machine(["h100-80gb"]))
    assert found.peak_vram[0].reserved_bytes / GIB == pytest.approx(published_gib, rel=0.01)


@pytest.mark.slow
def test_a_budget_below_what_loading_needs_is_not_planned_for() -> None:
    asked = _both("backend=bitsandbytes,type=nf4", ",kept_dtype=float32")
    machine = reference_machine(["rtx-4090"])
    with pytest.raises(NoPlanFits) as caught:
        plan("flux.1-dev", "10GB", machine=machine, quality="low", with_=asked, rehearse=False)
    smallest_bytes = caught.value.smallest_budget_bytes["low"]
    assert smallest_bytes / GIB == pytest.approx(12.24, rel=0.05)
    fits = plan(
        "flux.1-dev", smallest_bytes, machine=machine, quality="low", with_=asked, rehearse=False
    )
    assert fits.prediction.peak_vram[0].process_bytes <= smallest_bytes


@pytest.mark.parametrize("backend", PACKAGES)
def test_a_backend_that_is_missing_is_said_with_what_to_install(backend: str) -> None:
    module, package = PACKAGES[backend]
    try:
        importlib.import_module(module)
        missing = ""
    except ImportError:
        missing = package
    parameters = {"backend": backend, "type": TYPES[backend][0]}
    assert QUANTIZATION.missing_package(parameters) == missing  # type: ignore[attr-defined]
    before = described(t5())
    for is_loaded in (False, True):
        note = QUANTIZATION.note(parameters, before, before, is_loaded=is_loaded)  # type: ignore[attr-defined]
        assert (f"`pip install {package}`" in note) == bool(missing)
    if missing or not QUANTIZATION.goes_on_loaded(parameters):  # type: ignore[attr-defined]
        with pytest.raises(UnsupportedPipeline) as caught:
            QUANTIZATION.apply(None, "transformer", parameters, "cpu")
        assert (f"`pip install {package}`" in str(caught.value)) == bool(missing)


def test_one_type_of_each_width_is_offered_for_nvidia_alone() -> None:
    component = described(flux())
    phase = Phase(name="denoise", component="part", entry="forward", calls=(0,))
    workload = replace(decoding(component), phases=(phase,))
    offered = QUANTIZATION.options(component, workload, ADA)
    assert [one["type"] for one in offered] == ["int8_weight_only", "nf4"]
    assert not QUANTIZATION.options(component, workload, replace(ADA, compute_capability=None))
    stored = described(quantized(flux(), backend="torchao", type="int8_weight_only"))
    assert not QUANTIZATION.options(stored, workload, ADA)
