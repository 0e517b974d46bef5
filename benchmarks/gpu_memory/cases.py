"""What is measured, in the order in which it is worth knowing; plain data, no torch.

A run is cut off by its time, so the order decides what is learnt. Pipelines go from small to large
and configurations from common to special, along a diagonal: a dozen pipelines have their resident
row before the first of them has its last configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pipefit.cost_models.context import context_bytes
from pipefit.cost_models.units import DTYPE_BYTES
from pipefit.planner.catalog import find_gpu, pipeline_entry

Kind = Literal[
    "context", "transfer", "allocator", "kernel", "pipeline",
    "link", "resident", "streaming", "group_offload", "mmgp",
]  # fmt: skip
"""The second line is those of ``benchmarks/streaming_gpu.py``."""

NUM_STEPS = 2
"""Denoising steps of a measured call: peaks repeat from the second step on (the first has no
carried noise prediction, and a streamed component learns its order in it)."""

PIPELINES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("stable-diffusion-v1-5", {}),
    ("stable-diffusion-xl-base-1.0", {}),
    ("sana-1600m-1024px", {}),
    ("lumina-image-2.0", {}),
    ("pixart-sigma-xl-2-1024-ms", {}),
    ("wan2.1-t2v-1.3b", {"num_frames": 17}),
    ("ltx-video-0.9.0", {"num_frames": 49}),
    ("cogvideox-2b", {"num_frames": 17}),
    ("stable-diffusion-3-medium", {}),
    ("flux.2-klein-4b", {}),
    ("z-image-turbo", {}),
    ("auraflow-v0.3", {}),
    ("flux.1-dev", {}),
    ("sdxl-controlnet-canny", {}),
    ("qwen-image", {}),
)
"""Catalogue pipelines, small ones first, each with the arguments that differ from its default call:
videos are short, so that a row takes seconds."""

CONFIGURATIONS = (
    "resident",
    "leaf-stream",
    "model-offload",
    "tiling",
    "channels-last",
    "leaf",
    "block-stream",
    "block",
    "leaf-record-stream",
    "compile-default",
    "compile-max-autotune",
)
"""Names that :func:`benchmarks.gpu_memory.pipelines.options_of` turns into options; of those that
compile, resident ones."""

COMPILE_S = {"compile-default": 60.0, "compile-max-autotune": 240.0}
"""Seconds that compiling a denoiser and a decoder is allowed for; guessed, no run is known."""

PIPELINES_PER_CONFIGURATION = 3
"""How many pipelines the next configuration trails behind; with 3, the first pipeline has three
configurations when the seventh has its first."""

CARDS = {
    "6GB": "rtx-2060-6gb",
    "8GB": "rtx-4060",
    "12GB": "rtx-4070-super",
    "16GB": "rtx-4060-ti-16gb",
    "24GB": "rtx-4090",
}
"""Cards that a bound on the allocator stands for, by the catalogue's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row to measure."""

    key: str
    """Names the row; a restart skips the keys that are there."""
    kind: Kind
    parameters: Mapping[str, Any]
    """JSON values, from which a fresh process knows what to do."""
    estimate_s: float
    """Seconds of the GPU that it will take, as far as is known beforehand."""
    batch: str
    """Cases of one batch share a process; what process memory means is then theirs together."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables set for that process, such as the allocator's."""


def card_bytes(card: str) -> int:
    """Return what the allocator may reserve where a process has all of *card* to itself.

    >>> card_bytes("6GB") < card_bytes("8GB") < 8 * 2**30
    True
    """
    gpu = find_gpu(CARDS[card])
    return gpu.total_bytes - context_bytes(gpu)


def all_cases() -> tuple[Case, ...]:
    """Return every row, the most informative first."""
    pipelines = pipeline_cases()
    kernels = {batch: [c for c in kernel_cases() if c.batch == batch] for batch in KERNEL_BATCHES}
    first, second = len(PIPELINES), 2 * len(PIPELINES)
    return (
        _context_case(),
        *kernels["kernels: conv2d"],
        *pipelines[:first],
        *allocator_cases(),
        *kernels["kernels: attention"],
        _transfer_case(),
        *pipelines[first:second],
        *kernels["kernels: gemm"],
        *kernels["kernels: conv, other"],
        *kernels["kernels: norm, upsample"],
        *pipelines[second:],
    )


# -- pipelines

START_S = 2.0
"""CUDA's own start in a fresh process, and the loading of its first kernels. Our guess; a run
corrects its estimates by what its rows took."""

FILL_BYTES_PER_S = 3e9
"""Weights to the GPU and, where they are offloaded, back into fresh host pages: of the order of
``FRESH_HOST_BYTES_PER_S`` in cost_models/transfers.py."""

CALL_S = 3.0
"""A call of two steps on a fast GPU, and a second one; known better once it is predicted."""


def pipeline_cases() -> list[Case]:
    """Return the pipelines in all configurations, along the diagonal."""
    ranked = [
        (p + PIPELINES_PER_CONFIGURATION * c, c, _pipeline_case(name, call, configuration))
        for c, configuration in enumerate(CONFIGURATIONS)
        for p, (name, call) in enumerate(PIPELINES)
    ]
    return [case for *_, case in sorted(ranked, key=lambda entry: entry[:2])]


def _pipeline_case(name: str, call: Mapping[str, Any], configuration: str) -> Case:
    compile_s = COMPILE_S.get(configuration, 0.0)
    is_still = compile_s or configuration in ("resident", "tiling", "channels-last")
    moves = 0 if is_still else 1
    return Case(
        key=f"pipeline {name} {configuration}",
        kind="pipeline",
        parameters={
            "pipeline": name,
            "configuration": configuration,
            "call": {**call, "num_inference_steps": NUM_STEPS},
        },
        estimate_s=START_S + CALL_S + compile_s + moves * weight_bytes(name) / FILL_BYTES_PER_S,
        batch=f"pipeline {name} {configuration}",
    )


def weight_bytes(name: str) -> int:
    """Return what the parameters of a catalogue pipeline take in its load dtypes."""
    entry = pipeline_entry(name)
    dtypes = entry["dtype"]
    return sum(
        part["parameters"] * DTYPE_BYTES[dtypes.get(component, dtypes["default"])]
        for component, part in entry["components"].items()
    )


# -- kernels

KERNEL_BATCHES = (
    "kernels: conv2d",
    "kernels: attention",
    "kernels: gemm",
    "kernels: conv, other",
    "kernels: norm, upsample",
)

KERNEL_S = 0.1
"""One kernel with its inputs, called twice; the largest take a few times that."""


def kernel_cases() -> list[Case]:
    """Return the isolated kernels of all batches."""
    return [*_conv2d(), *_attention(), *_gemm(), *_other_convs(), *_norms()]


def _kernel(together: str, /, **parameters: Any) -> Case:
    words = " ".join(f"{name}={_short(value)}" for name, value in parameters.items())
    return Case(
        key=f"kernel {words}",
        kind="kernel",
        parameters=parameters,
        estimate_s=KERNEL_S,
        batch=together,
    )


def _short(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


DTYPES = ("bfloat16", "float16", "float32")
LAYOUTS = ("contiguous", "channels_last")


def _conv(together: str, /, **changed: Any) -> Case:
    """A 3×3 convolution of 64 channels at 256², unless said otherwise."""
    given: dict[str, Any] = {
        "op": "conv",
        "dtype": "bfloat16",
        "layout": "contiguous",
        "batch": 1,
        "channels": [64, 64],
        "size": [256, 256],
        "kernel": 3,
        **changed,
    }
    return _kernel(together, **given)


def _conv2d() -> Iterable[Case]:
    """A decoder's convolutions by dtype and layout, then one property at a time."""
    these = "kernels: conv2d"
    for dtype in DTYPES:
        for layout in LAYOUTS:
            yield _conv(these, dtype=dtype, layout=layout, channels=[256, 256], size=[512, 512])
            yield _conv(these, dtype=dtype, layout=layout, channels=[512, 512], size=[64, 64])
    yield _conv(these, dtype="float32", tf32=False, channels=[256, 256], size=[512, 512])
    yield _conv(these, dtype="float32", tf32=False, layout="channels_last")
    for layout in ("input channels_last", "weight channels_last"):
        yield _conv(these, layout=layout, channels=[256, 256], size=[512, 512])
    for dtype in DTYPES:
        yield _conv(these, dtype=dtype, channels=[3, 128], size=[1024, 1024])
        yield _conv(these, dtype=dtype, channels=[128, 3], size=[1024, 1024])
        yield _conv(these, dtype=dtype, channels=[4, 512], size=[128, 128])
        yield _conv(these, dtype=dtype, channels=[16, 512], size=[128, 128])
        yield _conv(these, dtype=dtype, channels=[512, 256], size=[256, 256], kernel=1)
        yield _conv(these, dtype=dtype, channels=[320, 320], size=[128, 128], batch=2)
        yield _conv(these, dtype=dtype, channels=[320, 320], size=[128, 128], stride=2)
    yield _conv(these, layout="channels_last", channels=[512, 256], kernel=1)
    yield _conv(these, layout="channels_last", channels=[3, 128], size=[1024, 1024])
    yield _conv(these, groups=64)
    yield _conv(these, dtype="float32", groups=64)
    yield _conv(these, layout="channels_last", groups=64)
    yield _conv(these, groups=4)
    for channels in ([1, 1], [8, 8], [12, 12], [36, 64], [60, 60], [64, 12]):
        yield _conv(these, channels=channels)
    for size in ([16, 16], [32, 32], [128, 128], [1024, 1024], [255, 253]):
        yield _conv(these, channels=[128, 128], size=size)
    for kernel, stride in ((4, 2), (5, 1), (7, 1), (2, 2), (16, 16)):
        yield _conv(these, kernel=kernel, stride=stride, channels=[16, 64])
    # At exactly 2^31 elements a 16-bit convolution still converts; beyond, another engine runs.
    yield _conv(these, batch=8, channels=[256, 128], size=[1024, 1024])
    yield _conv(these, batch=9, channels=[256, 128], size=[1024, 1024])
    yield _conv(these, batch=9, channels=[256, 128], size=[1024, 1024], layout="channels_last")


def _other_convs() -> Iterable[Case]:
    """Video, sound and transposed convolutions."""
    these = "kernels: conv, other"
    video: dict[str, Any] = {"channels": [128, 128], "size": [3, 240, 416]}
    for dtype in DTYPES:
        yield _conv(these, dtype=dtype, **video)
        yield _conv(these, dtype=dtype, layout="channels_last", **video)
        yield _conv(these, dtype=dtype, channels=[128, 128], size=[65536])
        yield _conv(these, dtype=dtype, channels=[128, 64], size=[65536], transposed=True, stride=2)
        yield _conv(these, dtype=dtype, channels=[128, 64], transposed=True, stride=2, kernel=4)
    yield _conv(these, dtype="float32", tf32=False, **video)
    yield _conv(these, channels=[96, 3], size=[3, 480, 832])
    yield _conv(these, channels=[3, 96], size=[3, 480, 832])
    yield _conv(these, channels=[384, 384], size=[5, 60, 104])
    yield _conv(these, channels=[384, 192], size=[5, 60, 104], kernel=1)
    yield _conv(these, channels=[16, 3072], size=[17, 60, 104], kernel=[1, 2, 2], stride=[1, 2, 2])
    yield _conv(these, channels=[64, 64], size=[65536], groups=64)
    yield _conv(these, channels=[128, 64], transposed=True, stride=2, layout="channels_last")
    yield _conv(
        these, channels=[64, 32], size=[9, 60, 104], transposed=True, stride=2, dtype="float16"
    )


def _attention() -> Iterable[Case]:
    """Every backend of torch's attention; masks, head sizes and grouped queries that rule some out.

    Backend "auto" is what a pipeline gets.
    """
    these = "kernels: attention"

    def attention(**changed: Any) -> Case:
        given: dict[str, Any] = {
            "op": "attention",
            "backend": "auto",
            "dtype": "bfloat16",
            "batch": 1,
            "heads": 24,
            "tokens": [4608, 4608],
            "head_dim": 128,
            **changed,
        }
        return _kernel(these, **given)

    for dtype in DTYPES:
        for backend in ("auto", "flash", "efficient", "cudnn", "math"):
            yield attention(backend=backend, dtype=dtype)
    for head_dim in (40, 64, 72, 80, 96, 160, 256, 512):
        yield attention(head_dim=head_dim, heads=8, tokens=[4096, 4096])
    yield attention(head_dim=512, heads=1, tokens=[16384, 16384])
    for mask in ("bool", "float", "causal"):
        for dtype in ("bfloat16", "float32"):
            yield attention(mask=mask, dtype=dtype, tokens=[1024, 1024])
        yield attention(mask=mask, tokens=[4096, 77] if mask != "causal" else [333, 333])
    yield attention(mask="bool", mask_heads=1, tokens=[4096, 300])
    yield attention(mask="bool", tokens=[1024, 300], backend="math")
    yield attention(heads=10, tokens=[4096, 77], head_dim=64, batch=2)
    yield attention(heads=32, kv_heads=8, tokens=[512, 512])
    yield attention(heads=32, kv_heads=8, tokens=[512, 512], mask="bool")
    yield attention(heads=32, kv_heads=8, tokens=[512, 512], mask="causal")
    yield attention(heads=32, kv_heads=8, tokens=[512, 512], backend="math")


def _gemm() -> Iterable[Case]:
    """cuBLAS and cuBLASLt: what a first call takes and keeps, with and without a bias."""
    these = "kernels: gemm"
    for dtype in DTYPES:
        for bias in (True, False):
            yield _kernel(
                these, op="linear", dtype=dtype, rows=4096, features=[3072, 3072], bias=bias
            )
        yield _kernel(these, op="linear", dtype=dtype, rows=1, features=[768, 3072], bias=True)
        yield _kernel(these, op="linear", dtype=dtype, rows=154, features=[2048, 640], bias=True)
        yield _kernel(these, op="bmm", dtype=dtype, batch=16, rows=1024, features=[64, 1024])
        yield _kernel(these, op="baddbmm", dtype=dtype, batch=16, rows=1024, features=[64, 1024])
    yield _kernel(these, op="linear", dtype="float32", tf32=True, rows=4096, features=[3072, 3072])
    yield _kernel(
        these, op="linear", dtype="bfloat16", rows=4096, features=[3072, 12288], bias=True
    )
    yield _kernel(
        these, op="linear", dtype="bfloat16", rows=32768, features=[1536, 8960], bias=True
    )


def _norms() -> Iterable[Case]:
    """Norms and upsampling, whose temporaries differ between a CPU trace and CUDA."""
    these = "kernels: norm, upsample"
    for dtype in DTYPES:
        for layout in LAYOUTS:
            yield _kernel(
                these, op="group_norm", dtype=dtype, layout=layout, channels=256, size=[512, 512]
            )
            yield _kernel(
                these, op="upsample", dtype=dtype, layout=layout, channels=256, size=[256, 256]
            )
        yield _kernel(these, op="group_norm", dtype=dtype, layout="contiguous", channels=128,
                      size=[5, 240, 416])  # fmt: skip
        yield _kernel(these, op="upsample", dtype=dtype, layout="contiguous", channels=128,
                      size=[3, 120, 208])  # fmt: skip
        yield _kernel(these, op="layer_norm", dtype=dtype, rows=4608, channels=3072)
        yield _kernel(these, op="rms_norm", dtype=dtype, rows=4608, channels=3072)
        yield _kernel(these, op="softmax", dtype=dtype, rows=4608, channels=4608)


# -- the process and the machine

EXPANDABLE = "expandable_segments:True"
NATIVE = "expandable_segments:False"


def _context_case() -> Case:
    return Case(key="context", kind="context", parameters={}, estimate_s=START_S, batch="context")


def _transfer_case() -> Case:
    return Case(key="transfer", kind="transfer", parameters={}, estimate_s=6.0, batch="transfer")


def allocator_cases() -> list[Case]:
    """Return decodes whose every allocation is written down, native and with expandable segments.

    Both variables are set, native too: torch reads the first it finds, older ones know one only.
    """
    cases = []
    for name, conf in (("native", NATIVE), (EXPANDABLE, EXPANDABLE)):
        for pipeline, latents in (
            ("stable-diffusion-v1-5", [1, 4, 64, 64]),
            ("stable-diffusion-xl-base-1.0", [1, 4, 128, 128]),
            ("wan2.1-t2v-1.3b", [1, 16, 3, 60, 104]),
        ):
            key = f"allocator {pipeline} decode {name}"
            cases.append(
                Case(
                    key=key,
                    kind="allocator",
                    parameters={"pipeline": pipeline, "latents": latents, "conf": conf},
                    estimate_s=START_S + 1.0,
                    batch=key,
                    environment={"PYTORCH_ALLOC_CONF": conf, "PYTORCH_CUDA_ALLOC_CONF": conf},
                )
            )
    return cases


UNFINISHED = ("stopped", "missing")
"""Outcomes of rows that a later run measures again: the run's time was over, or what the
row needs was not there yet."""


def finished(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the keys that need no second look."""
    return {row["key"] for row in rows if row["outcome"] not in UNFINISHED}
