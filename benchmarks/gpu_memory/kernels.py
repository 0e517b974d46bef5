"""One operator as a pipeline of its own, so that it takes the same road as a whole one.

It is traced by the recorder, predicted by ``simulate`` and measured by the phase meter. What it
takes beyond its inputs is its growth: the result, temporaries and workspace.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.gpu_memory.counters import Counter
from benchmarks.gpu_memory.phases import PhaseMeter
from benchmarks.gpu_memory.pipelines import give_weights
from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.memory import simulate
from pipefit.cost_models.placement import Resident
from pipefit.cost_models.prediction import Choice
from pipefit.cost_models.serial import to_json
from pipefit.planner.trace import trace
from pipefit.planner.trace_cache import library_versions

Parameters = Mapping[str, Any]
MakeInputs = Callable[[Any], tuple[torch.Tensor, ...]]


class OneKernel:
    """What :func:`pipefit.planner.trace.trace` and a GPU both run: inputs are made, then one call.

    Weights are on the meta device until someone gives them data.
    """

    def __init__(self, parameters: Parameters) -> None:
        with torch.device("meta"):
            self.kernel, self._inputs = _BUILDERS[parameters["op"]](parameters)
        self.kernel.eval()

    @property
    def components(self) -> dict[str, torch.nn.Module]:
        """The one module."""
        return {"kernel": self.kernel}

    def __call__(self, device: Any) -> Any:
        """Make inputs on *device* and return what the kernel makes of them."""
        inputs = self._inputs(device)
        return self.kernel(*inputs)


class _Function(torch.nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def _zeros(size: Any, dtype: torch.dtype, device: Any, layout: str = "contiguous") -> torch.Tensor:
    return torch.empty(
        tuple(size), dtype=dtype, device=device, memory_format=_layout(layout, len(size))
    ).zero_()


def _layout(name: str, num_dims: int) -> torch.memory_format:
    if name != "channels_last" or num_dims not in (4, 5):
        return torch.contiguous_format
    return torch.channels_last if num_dims == 4 else torch.channels_last_3d


def _dtype(parameters: Parameters) -> torch.dtype:
    found: torch.dtype = getattr(torch, parameters["dtype"])
    return found


def _conv(p: Parameters) -> tuple[torch.nn.Module, MakeInputs]:
    """*layout* is that of input and weight, or of the one that it names."""
    num_dims = len(p["size"])
    kind = f"Conv{'Transpose' if p.get('transposed') else ''}{num_dims}d"
    kernel, stride = p["kernel"], p.get("stride", 1)
    same = kernel % 2 == 1 and not p.get("transposed") if isinstance(kernel, int) else False
    conv = getattr(torch.nn, kind)(
        *p["channels"],
        kernel,
        stride=stride,
        padding=kernel // 2 if same else 0,
        groups=p.get("groups", 1),
        dtype=_dtype(p),
    )
    words = p["layout"].split()
    if words[-1] == "channels_last" and words[0] != "input":
        conv.to(memory_format=_layout("channels_last", num_dims + 2))
    input_layout = "contiguous" if words[0] == "weight" else words[-1]
    size = (p["batch"], p["channels"][0], *p["size"])
    return conv, lambda device: (_zeros(size, _dtype(p), device, input_layout),)


def _linear(p: Parameters) -> tuple[torch.nn.Module, MakeInputs]:
    linear = torch.nn.Linear(*p["features"], bias=p.get("bias", False), dtype=_dtype(p))
    return linear, lambda device: (_zeros((p["rows"], p["features"][0]), _dtype(p), device),)


def _bmm(p: Parameters) -> tuple[torch.nn.Module, MakeInputs]:
    inner, columns = p["features"]

    def inputs(device: Any) -> tuple[torch.Tensor, ...]:
        left = _zeros((p["batch"], p["rows"], inner), _dtype(p), device)
        right = _zeros((p["batch"], inner, columns), _dtype(p), device)
        return left, right

    return _Function(torch.bmm), inputs


def _baddbmm(p: Parameters) -> tuple[torch.nn.Module, MakeInputs]:
    _, factors = _bmm(p)
    size = (p["batch"], p["rows"], p["features"][1])
    return _Function(torch.baddbmm), lambda device: (
        _zeros(size, _dtype(p), device),
        *factors(device),
    )


def _attention(p: Parameters) -> tuple[torch.nn.Module, MakeInputs]:
    heads, kv_heads = p["heads"], p.get("kv_heads", p["heads"])
    queries, keys = p["tokens"]
    mask = p.get("mask")

    def inputs(device: Any) -> tuple[torch.Tensor, ...]:
        query, key, value = (
            _zeros((p["batch"], h, n, p["head_dim"]), _dtype(p), device)
            for h, n in ((heads, queries), (kv_heads, keys), (kv_heads, keys))
        )
        if mask not in ("bool", "float"):
            return query, key, value
        size = (p["batch"], p.get("mask_heads", heads), queries, keys)
        bias = _zeros(size, torch.bool if mask == "bool" else _dtype(p), device)
        return query, key, value, bias

    def attend(query: Any, key: Any, value: Any, bias: Any = None) -> Any:
        with _backend(p["backend"]):
            return torch.nn.functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=bias,
                is_causal=mask == "causal",
                enable_gqa=kv_heads != heads,
            )

    return _Function(attend), inputs


@contextlib.contextmanager
def _backend(name: str) -> Iterator[None]:
    if name == "auto":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }
    with sdpa_kernel(backends[name]):
        yield


def _group_norm(p: Parameters) -> tuple[torch.nn.Module, MakeInputs]:
    norm = torch.nn.GroupNorm(32, p["channels"], dtype=_dtype(p))
    size = (1, p["channels"], *p["size"])
    return norm, lambda device: (_zeros(size, _dtype(p), device, p["layout"]),)


def _upsample(p: Parameters) -> tuple[torch.nn.Module, MakeInputs]:
    size = (1, p["channels"], *p["size"])
    return torch.nn.Upsample(scale_factor=2.0, mode="nearest"), lambda device: (
        _zeros(size, _dtype(p), device, p["layout"]),
    )


def _rowwise(make: Callable[[Parameters], torch.nn.Module]) -> Any:
    def build(p: Parameters) -> tuple[torch.nn.Module, MakeInputs]:
        return make(p), lambda device: (_zeros((p["rows"], p["channels"]), _dtype(p), device),)

    return build


_BUILDERS: Mapping[str, Callable[[Parameters], tuple[torch.nn.Module, MakeInputs]]] = {
    "conv": _conv,
    "linear": _linear,
    "bmm": _bmm,
    "baddbmm": _baddbmm,
    "attention": _attention,
    "group_norm": _group_norm,
    "upsample": _upsample,
    "layer_norm": _rowwise(lambda p: torch.nn.LayerNorm(p["channels"], dtype=_dtype(p))),
    "rms_norm": _rowwise(lambda p: torch.nn.RMSNorm(p["channels"], dtype=_dtype(p))),
    "softmax": _rowwise(lambda p: torch.nn.Softmax(dim=-1)),
}


def measure_kernel(parameters: Parameters, counter: Counter) -> dict[str, Any]:
    """Run the kernel twice; the first call of a GEMM takes what cuBLAS then keeps."""
    subject = OneKernel(parameters)
    counter.release()
    give_weights(subject, counter.device)
    calls = []
    with _tf32(parameters):
        for _ in range(2):
            meter = PhaseMeter(subject.components, counter)
            with torch.no_grad(), counter.history() as events, meter.watching():
                output = subject(counter.device)
            phase = meter.phases[0]
            output_bytes = output.untyped_storage().nbytes()
            del output
            left = counter.read()
            calls.append(
                {
                    "growth_bytes": phase.allocated_bytes - phase.begin_bytes,
                    "output_bytes": output_bytes,
                    "left_bytes": left.allocated,
                    "phase": asdict(phase),
                    "events": events,
                }
            )
    return {"calls": calls}


@contextlib.contextmanager
def _tf32(parameters: Parameters) -> Iterator[None]:
    """Set what the case asks for: convolutions use TF32 by default, matrix products do not."""
    if "tf32" not in parameters:
        yield
        return
    owners = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [owner.allow_tf32 for owner in owners]
    for owner in owners:
        owner.allow_tf32 = parameters["tf32"]
    try:
        yield
    finally:
        for owner, value in zip(owners, before, strict=True):
            owner.allow_tf32 = value


def predict_kernel(parameters: Parameters, gpu: Gpu) -> dict[str, Any]:
    """Trace the kernel and return what it is predicted to take beyond its inputs."""
    workload = trace(
        OneKernel(parameters),
        {"device": "cuda:0"},
        compute_capability=gpu.compute_capability or (8, 9),
        in_place=True,
    )
    workload = replace(workload, versions=library_versions())
    (peak,) = simulate(workload, {"kernel": Choice(placement=Resident())}, gpu)
    return {
        "growth_bytes": peak.activation_bytes + peak.workspace_bytes,
        "workspace_bytes": peak.workspace_bytes,
        "reserved_bytes": peak.reserved_bytes,
        "kernels": [to_json(kernel) for kernel in workload.kernels],
    }
