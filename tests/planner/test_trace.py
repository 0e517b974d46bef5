"""The trace against real runs, and remembered calls against executed ones."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, DiffusionPipeline, UNet2DConditionModel
from tests.planner.timelines import peak_bytes, timeline
from torch.utils._python_dispatch import TorchDispatchMode

from pipefit.cost_models.workload import Workload
from pipefit.errors import InvalidRequest, TraceError, UnsupportedPipeline
from pipefit.planner.build import build_pipeline
from pipefit.planner.call import default_inputs
from pipefit.planner.trace import trace
from pipefit.strategies.live import wrap_method


class Pipeline:
    """The least that ``trace`` needs of a pipeline: components and a call."""

    def __init__(self, run: Callable[..., Any], **components: torch.nn.Module) -> None:
        self.run = run
        self.names = tuple(components)
        self.__dict__.update(components)

    @property
    def components(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.names}

    def __call__(self, **arguments: Any) -> Any:
        return self.run(self, **arguments)


def traced(run: Callable[..., Any], remember: bool = True, **components: Any) -> Workload:
    return trace(Pipeline(run, **components), {}, remember=remember)


def both_ways(run: Callable[..., Any], build: Callable[[], torch.nn.Module]) -> Workload:
    """Trace with and without remembering; the timelines must be equal."""
    remembered, executed = (traced(run, remember, net=build()) for remember in (True, False))
    assert peak_bytes(remembered) == peak_bytes(executed)
    assert list(timeline(remembered)) == list(timeline(executed))
    return remembered


class LiveBytes(TorchDispatchMode):
    """Sums the storages that a real run makes while they live."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.untyped_storage().seen = True

    def free(self, num_bytes: int) -> None:
        self.live -= num_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for o in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(o, torch.Tensor) and not hasattr(o.untyped_storage(), "seen"):
                storage = o.untyped_storage()
                storage.seen = True
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.free, storage.nbytes())
        return out


def small_vae() -> AutoencoderKL:
    blocks = 2
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
    ).eval()


def small_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()


def decode(pipe: Any) -> Any:
    return pipe.net.decode(torch.zeros(1, 4, 16, 16, device=pipe.net.device)).sample


def denoise(pipe: Any) -> Any:
    device = pipe.net.device
    latents = torch.zeros(2, 4, 16, 16, device=device)
    for t in torch.arange(3, device=device):
        latents = latents - pipe.net(latents, t, torch.zeros(2, 7, 32, device=device)).sample
    return latents


@pytest.mark.parametrize(
    ("run", "build"), [(decode, small_vae), (denoise, small_unet)], ids=["vae", "unet"]
)
def test_the_peak_equals_a_real_runs(run: Any, build: Any) -> None:
    net = build()
    real = LiveBytes(net)
    with torch.no_grad(), real:
        run(Pipeline(run, net=net))
    # CPU attention keeps one fp32 number a row that CUDA's memory-efficient kernel does not.
    assert peak_bytes(traced(run, net=net)) == pytest.approx(real.peak, rel=0.002)


def test_remembered_denoising_equals_executed() -> None:
    workload = both_ways(denoise, small_unet)
    calls = [e[1] for e in workload.root if e[0] == "c"]
    assert len(calls) == 3
    assert len(set(calls)) == 1


def test_remembered_frames_with_a_cache_equal_executed() -> None:
    """The Wan decoder keeps the last frames of every convolution in a list that it is given."""

    def build() -> AutoencoderKLWan:
        return AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1,
                                latents_mean=[0.0] * 4, latents_std=[1.0] * 4).eval()  # fmt: skip

    def run(pipe: Any) -> Any:
        return pipe.net.decode(torch.zeros(1, 4, 7, 4, 4, device=pipe.net.device)).sample

    workload = both_ways(run, build)
    decoder = [r for r in workload.routines if r.module_class == "WanDecoder3d"]
    assert len(decoder) <= 4


class Branching(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if t.item() > 1 else torch.cat([x, self.linear(x)])


def test_value_dependent_code_is_executed_again() -> None:
    def run(pipe: Any) -> None:
        for t in torch.arange(4, device="cpu"):
            pipe.net(torch.zeros(2, 8, device=pipe.net.linear.weight.device), t)

    workload = both_ways(run, Branching)
    assert len({e[1] for e in workload.root if e[0] == "c"}) == 2


class Keeping(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = x * 2
        return x + 1


def test_a_module_that_keeps_something_is_executed_again() -> None:
    def run(pipe: Any) -> None:
        for _ in range(3):
            pipe.net(torch.zeros(4, device="cuda" if pipe.run is run else "cpu"))

    both_ways(run, Keeping)


SEEN: list[torch.Tensor] = []


class Hooked(torch.nn.Module):
    """Collects its layers' outputs past their results, as transformers does hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        for layer in self.layers:
            layer.register_forward_hook(lambda module, args, out: SEEN.append(out))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        SEEN.clear()
        for layer in self.layers:
            x = layer(x)
        collected = tuple(SEEN)
        SEEN.clear()
        return collected


def test_forward_hooks_run_around_remembered_calls() -> None:
    def run(pipe: Any) -> None:
        for _ in range(2):
            out = pipe.net(torch.zeros(4, 8, device=pipe.net.layers[0].weight.device))
            assert len(out) == 3

    both_ways(run, Hooked)


def test_an_upcast_inside_the_call_changes_weights_not_tensors() -> None:
    def run(pipe: Any) -> None:
        pipe.net.to(torch.float32)
        pipe.net(torch.zeros(2, 8, device=pipe.net.weight.device))

    workload = traced(run, net=torch.nn.Linear(8, 8, dtype=torch.float16))
    changes = [e[2] for e in workload.root if e[0] == "w"]
    assert sum(changes) == (64 + 8) * 2
    assert peak_bytes(workload) == 2 * 8 * 4 * 2


def test_a_failing_call_raises_trace_error() -> None:
    def run(pipe: Any) -> None:
        raise ValueError("no prompt")

    with pytest.raises(TraceError, match="no prompt"):
        traced(run, net=torch.nn.Linear(2, 2))


def test_the_live_pipeline_is_untouched() -> None:
    net = small_unet()
    pipe = Pipeline(denoise, net=net)
    weights = [(id(p), p.data_ptr()) for p in net.parameters()]
    with torch.no_grad():
        before = pipe()
    trace(pipe, {})
    with torch.no_grad():
        assert torch.equal(pipe(), before)
    assert [(id(p), p.data_ptr()) for p in net.parameters()] == weights


def test_a_weight_that_weight_norm_computed_does_not_keep_a_pipeline_from_being_traced() -> None:
    net = torch.nn.utils.weight_norm(torch.nn.Linear(4, 4))
    assert not net.weight.is_leaf  # what deepcopy refuses

    def run(pipe: Any) -> Any:
        return pipe.net(torch.ones(2, 4, device=pipe.net.weight_g.device))

    workload = trace(Pipeline(run, net=net), {})
    assert [phase.component for phase in workload.phases] == ["net"]


def test_the_pipelines_that_one_is_combined_of_share_its_twins(
    capfd: pytest.CaptureFixture[str],
) -> None:
    pipe, info = build_pipeline("kandinsky-2-2-combined")
    args = default_inputs(pipe, info.entry, {"num_inference_steps": 2})
    workload = trace(pipe, args)  # not in place: the inner pipelines hold the same components
    called = {event[2].split("/")[1] for event in workload.root if event[0] == "c"}
    assert called == {"prior_prior", "prior_image_encoder", "prior_text_encoder", "unet", "movq"}
    assert pipe.decoder_pipe.unet is pipe.unet
    assert not capfd.readouterr().err  # no progress bar either


def test_a_package_that_a_pipeline_uses_without_asking_is_named() -> None:
    class Cleaning(DiffusionPipeline):
        def __init__(self, part: torch.nn.Module) -> None:
            super().__init__()
            self.register_modules(part=part)

        def __call__(self) -> None:
            no_such_package_anywhere.fix_text("a prompt")  # noqa: F821

    with pytest.raises(UnsupportedPipeline, match=r"`pip install no_such_package_anywhere`"):
        trace(Cleaning(torch.nn.Linear(2, 2)), {})


class Doubler(torch.nn.Module):
    """An autoencoder of sorts: pipelines call its ``decode``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 64)

    def decode(self, z: Any) -> Any:
        return self.layer(z)


def in_parts(count: int, decode: Any, z: Any) -> Any:
    return torch.cat([decode(part) for part in z.split(count)])


def decode_in_parts(twin: Any, component: str, parts: Any) -> Callable[[], None]:
    """Decode so many rows at a time, as a strategy would."""
    return wrap_method(twin.vae, "decode", functools.partial(in_parts, parts["parts"]["count"]))


def variants_of(
    apply_variant: Callable[..., Any], counts: Sequence[int], is_required: bool
) -> Workload:
    def run(pipe: Any) -> None:
        pipe.vae.decode(torch.empty(64, 64, device="cuda"))

    return trace(
        Pipeline(run, vae=Doubler()),
        {},
        variants=lambda workload: {"vae": [{"parts": {"count": count}} for count in counts]},
        apply_variant=apply_variant,
        is_required=lambda parts: is_required,
    )


def test_a_wrapped_entry_is_told_apart_from_the_plain_one_and_from_other_wrappers() -> None:
    found = variants_of(decode_in_parts, (16, 32), True)
    (plain,) = found.variants["vae|parts:count=16"]
    chosen = [plain, *(found.variants[f"vae|parts:count={n}"][plain] for n in (16, 32))]
    calls = [sum(e[0] == "c" for e in found.routines[number].events) for number in chosen]
    assert calls == [1, 4, 2]


def test_a_variant_that_fails_is_left_out_and_said_unless_it_is_required() -> None:
    def fail(decode: Any, z: Any) -> Any:
        raise ValueError("no such size")

    def failing(twin: Any, component: str, parts: Any) -> Callable[[], None]:
        return wrap_method(twin.vae, "decode", fail)

    found = variants_of(failing, (16,), False)
    assert found.variants == {}
    assert found.assumptions == ("Not considered: parts on vae fails in this call (no such size).",)
    with pytest.raises(InvalidRequest, match=r"parts on vae fails in this call .no such size."):
        variants_of(failing, (16,), True)
