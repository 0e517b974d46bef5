"""One step of FLUX.1-dev's transformer with its weights here and there: its time, memory, output.

Everything is put in force by the library it belongs to: streaming and diffusers' group offload by
pipefit's ``apply_options``, mmgp by its own call. The transformer is called as its pipeline calls
it, step after step with nothing between, so that the copies for the next step begin in this one.
Weights are random and the same in every process on one GPU: they are drawn there with one seed.

What is easily got wrong: a step's time is the distance of two ends, not of its own begin and end,
which would leave out what the step before copied for it.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_map

from benchmarks.gpu_memory.counters import Counter
from benchmarks.gpu_memory.pipelines import GROUPS, give_weights, options_of
from benchmarks.gpu_memory.probes import copy_seconds
from benchmarks.gpu_memory.worker import Missing
from pipefit.cost_models.blocks import Blocks, blocks_of
from pipefit.cost_models.machine import Gpu, Machine
from pipefit.cost_models.placement import MAX_BLOCK_BYTES
from pipefit.cost_models.units import GIB, KIB, MIB
from pipefit.cost_models.workload import TensorInfo
from pipefit.errors import InvalidRequest
from pipefit.planner.api import predict
from pipefit.planner.apply import apply_options
from pipefit.planner.build import build_pipeline
from pipefit.planner.host import read_host
from pipefit.strategies import traits_of
from pipefit.strategies.describe import describe_component
from pipefit.strategies.page_locked import page_lock
from pipefit.strategies.strategy import Option

PIPELINE = "flux.1-dev"
COMPONENT = "transformer"
PICTURE_PX, TEXT_TOKENS = 1024, 512
"""What FLUX.1-dev's pipeline is called with when nothing is said: ``FluxPipeline.__call__`` in
pipelines/flux/pipeline_flux.py, diffusers 0.42.1."""

SEED = 0

NUM_LEVELS = 16
"""Shares of resident blocks are sixteenths, as in the search (strategies/streaming.py)."""

SMALL_CONFIG: Mapping[str, Any] = {
    "patch_size": 1, "in_channels": 16, "attention_head_dim": 32, "num_attention_heads": 4,
    "joint_attention_dim": 64, "pooled_projection_dim": 32, "axes_dims_rope": (8, 12, 12),
    "guidance_embeds": True,
}  # fmt: skip
SMALL_PICTURE_PX, SMALL_TEXT_TOKENS, SMALL_BLOCK_BYTES = 64, 8, 320 * KIB
"""A dry run's call; blocks are cut where those at full size are: large ones into their parts."""

WARM_UP_STEPS = 2
"""Steps before the timed ones: engines learn their order in the first, the second begins with what
the first foresaw wrongly, and from the third on every step copies the same."""

LEAST_STEPS, MOST_STEPS = 3, 9
TIMED_S = 8.0
"""How long the timed steps of a row take together, within the two bounds; our choice: fifteen rows
and their setting up are to end in eight minutes."""

WINDOW_REPEATS = 3
"""Steps whose windows are timed one by one, after as many as warm up."""

BESIDE_BYTES = 3 * GIB
"""Kept free beside resident weights: 0.5 GiB of activations, as predicted, and room for the blocks
that a placement copies before it frees them; our choice."""

LARGE_COPY_BYTES, SMALL_COPY_BYTES = 1 * GIB, 4 * MIB
"""One copy from which the link's rate is taken; in a dry run."""

MMGP_TRIES = 3
"""Budgets tried until mmgp's memory is that of the row beside it; it keeps whole blocks of up to
0.65 GiB, so that it cannot be closer than one of them."""

MMGP_PINNED_SHARE = 0.9
"""How much of the host's RAM mmgp may page-lock; its own bound, a half, is too little for all of
FLUX.1-dev on a host of 48 GB (``_get_perc_reserved_mem_max`` in mmgp/offload.py, 3.8.2)."""

MMGP_BUDGET_BYTES = 2**20
"""Its budgets are in units of this: ``ONE_MB`` there."""


@dataclass(kw_only=True)
class Subject:
    """A pipeline of the transformer alone, first without weights, and how it is called."""

    pipe: Any
    call: Mapping[str, Any]
    max_block_bytes: int
    timed_s: float = TIMED_S
    """How long timed steps take together, within bounds."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What the pipeline gives the transformer; known once there are weights."""
    is_resident: bool = True
    """Whether the weights lie on the GPU before a placement takes them; else on the host."""

    @property
    def transformer(self) -> Any:
        """The module itself."""
        return self.pipe.transformer

    @functools.cached_property
    def cut(self) -> Blocks:
        """The blocks that streaming divides it into; not to be asked for first while it is
        streamed, when parameters share buffers and look tied."""
        described = describe_component(COMPONENT, self.transformer, traits_of(self.transformer))
        return blocks_of(described, self.max_block_bytes)

    def step(self) -> torch.Tensor:
        """Call the transformer once."""
        with torch.no_grad():
            output: torch.Tensor = self.transformer(**self.arguments)[0]
        return output


def build_subject(model: Mapping[str, Any]) -> Subject:
    """Return the transformer that *model* says, on the meta device.

    *model* has ``layers`` and ``single_layers``, the numbers of its blocks of either kind, and
    ``is_small`` for a dry run's widths.
    """
    layers, single_layers = model["layers"], model["single_layers"]
    if model["is_small"]:
        with torch.device("meta"):
            transformer = diffusers.FluxTransformer2DModel(
                **SMALL_CONFIG, num_layers=layers, num_single_layers=single_layers
            ).to(torch.bfloat16)
        picture_px, num_tokens, max_block_bytes = (
            SMALL_PICTURE_PX, SMALL_TEXT_TOKENS, SMALL_BLOCK_BYTES,
        )  # fmt: skip
    else:
        transformer = build_pipeline(PIPELINE)[0].transformer
        transformer.transformer_blocks = transformer.transformer_blocks[:layers]
        transformer.single_transformer_blocks = transformer.single_transformer_blocks[
            :single_layers
        ]
        transformer.register_to_config(num_layers=layers, num_single_layers=single_layers)
        picture_px, num_tokens, max_block_bytes = PICTURE_PX, TEXT_TOKENS, MAX_BLOCK_BYTES
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        transformer=transformer.eval().requires_grad_(False),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    config, dtype = transformer.config, torch.bfloat16
    call = {
        "prompt_embeds": torch.randn(
            1, num_tokens, config.joint_attention_dim, generator=generator
        ).to(dtype),
        "pooled_prompt_embeds": torch.randn(
            1, config.pooled_projection_dim, generator=generator
        ).to(dtype),
        "height": picture_px,
        "width": picture_px,
        "num_inference_steps": 2,
        "output_type": "latent",
    }
    timed_s = 0.0 if model["is_small"] else TIMED_S
    return Subject(pipe=pipe, call=call, max_block_bytes=max_block_bytes, timed_s=timed_s)


def make_real(subject: Subject, device: torch.device, *, is_resident: bool | None = None) -> None:
    """Give *subject* weights, on the GPU where they fit, and the inputs of its step.

    *is_resident* says where they lie, in place of the GPU's free memory.
    """
    if subject.arguments:
        return
    num_bytes = sum(p.numel() * p.element_size() for p in subject.transformer.parameters())
    if is_resident is None:
        is_resident = device.type == "cpu" or (
            num_bytes + BESIDE_BYTES <= torch.cuda.mem_get_info(device)[0]
        )
    subject.is_resident = is_resident
    torch.manual_seed(SEED)
    give_weights(subject.pipe, device if is_resident else None, drawn_on=device)
    given = _given_to(subject.transformer, lambda: subject.pipe(
        **subject.call, generator=torch.Generator().manual_seed(SEED)
    ))  # fmt: skip
    subject.arguments = tree_map(
        lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, given
    )


class _Given(Exception):
    """Carries the arguments out of a pipeline that need not go on."""


def _given_to(module: Any, run: Callable[[], Any]) -> dict[str, Any]:
    """Return the keyword arguments that *module* is called with first in *run*."""

    def catch(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        raise _Given(kwargs)

    handle = module.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        run()
    except _Given as given:
        return dict(given.args[0])
    finally:
        handle.remove()
    raise InvalidRequest(f"{type(module).__name__} is not called by its pipeline.")


# -- what is predicted


def resident_blocks(cut: Blocks, level: int) -> int:
    """Return how many blocks stay at *level* sixteenths.

    >>> resident_blocks(Blocks(blocks=(), rest=(), buffers=()), 8)
    0
    """
    return round(len(cut.called) * level / NUM_LEVELS)


def option_of(subject: Subject, placement: Mapping[str, Any]) -> Option:
    """Return the option that *placement*, a row's parameters, stands for."""
    if "configuration" in placement:
        configuration = placement["configuration"]
        (option,) = options_of(configuration, subject.pipe, subject.call["height"])
        if any(option.parameters.get(k) != v for k, v in GROUPS[configuration].items()):
            raise InvalidRequest(f"{configuration} cannot be used on the transformer.")
        return option
    parameters = {
        "resident_blocks": resident_blocks(subject.cut, placement["level"]),
        "num_slots": placement["num_slots"],
        "look_ahead": placement["num_slots"],
        "max_block_bytes": subject.max_block_bytes,
    }
    return Option(strategy="streaming", component=COMPONENT, parameters=parameters)


def predict_step(subject: Subject, options: list[Option], gpu: Gpu) -> dict[str, Any]:
    """Return what pipefit says of a step: seconds by the latency model, peaks by the memory's."""
    machine = Machine(gpus=(gpu,), host=read_host())
    said = predict(subject.pipe, options, call=subject.call, machine=machine)
    (phase,) = (phase for phase in said.phases if phase.component == COMPONENT)
    return {
        "step_s": phase.seconds / phase.calls,
        "allocated_bytes": phase.allocated_bytes,
        "reserved_bytes": phase.reserved_bytes,
        "process_bytes": phase.process_bytes,
        "pinned_bytes": said.pinned_bytes,
    }


# -- the link


def measure_link(counter: Counter) -> dict[str, Any]:
    """Return the rate of one large copy to the GPU from both kinds of page-locked memory.

    On a CPU, where nothing can be page-locked, of a copy in memory.
    """
    device = counter.device
    if device.type == "cpu":
        here = torch.ones(SMALL_COPY_BYTES, dtype=torch.uint8)
        there = torch.empty_like(here)
        rate = here.numel() / copy_seconds(lambda: there.copy_(here), lambda: None)
        return {"registered_bytes_per_s": rate, "torch_pinned_bytes_per_s": rate}
    there = torch.empty(LARGE_COPY_BYTES, dtype=torch.uint8, device=device)
    rates: dict[str, Any] = {}
    here = torch.ones(LARGE_COPY_BYTES, dtype=torch.uint8)
    start_s = time.perf_counter()
    unlock = page_lock(here, device)
    rates["register_s"] = time.perf_counter() - start_s
    rates["registered_bytes_per_s"] = None
    if unlock is not None:
        seconds = copy_seconds(lambda: there.copy_(here, non_blocking=True))
        rates["registered_bytes_per_s"] = LARGE_COPY_BYTES / seconds
        unlock()
    pinned = torch.ones(LARGE_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    seconds = copy_seconds(lambda: there.copy_(pinned, non_blocking=True))
    rates["torch_pinned_bytes_per_s"] = LARGE_COPY_BYTES / seconds
    return rates


# -- steps


class Marks:
    """Moments in the order of the computing stream; on a CPU, of the clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[Any] = []
        self.host_s: list[float] = []

    def add(self) -> int:
        """Mark the moment behind everything queued so far; return its number."""
        self.host_s.append(time.perf_counter())
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._events.append(event)
        return len(self.host_s) - 1

    def seconds(self, begin: int, end: int) -> float:
        """Return how long the GPU took from one to another."""
        if not self._events:
            return self.host_s[end] - self.host_s[begin]
        self._events[end].synchronize()
        return float(self._events[begin].elapsed_time(self._events[end])) / 1e3


def synchronize(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_steps(
    subject: Subject, counter: Counter, *, until_s: float = math.inf
) -> tuple[dict[str, Any], torch.Tensor]:
    """Return time and peaks of steps one after the other, and the last one's output.

    Peaks are those of all steps, the ones that warm up included.
    """
    device, step = counter.device, subject.step
    gc.collect()
    counter.release()
    counter.reset_peak()
    for _ in range(WARM_UP_STEPS):
        start_s = time.monotonic()
        output = step()
        synchronize(device)
    warm_s = time.monotonic() - start_s
    allowed_s = min(subject.timed_s, until_s - time.monotonic())
    num_steps = min(MOST_STEPS, max(LEAST_STEPS, int(allowed_s / warm_s)))
    marks = Marks(device)
    output = step()  # the first after the wait finds its copies done
    marks.add()
    for _ in range(num_steps):
        output = step()
        marks.add()
    times = [marks.seconds(i, i + 1) for i in range(num_steps)]
    reading = counter.read()
    context_bytes = counter.process_bytes() - reading.reserved
    return {
        "step_s": statistics.median(times),
        "steps_s": times,
        "warm_up_s": warm_s,
        "allocated_bytes": reading.peak_allocated,
        "reserved_bytes": reading.peak_reserved,
        "process_bytes": reading.peak_reserved + context_bytes,
        "process_source": counter.process_source,
    }, output


def compared(output: torch.Tensor, reference: Path) -> dict[str, Any]:
    """Return what tells whether *output* is the reference's, and how far it is off."""
    here = output.detach().cpu().contiguous()
    found: dict[str, Any] = {
        "output_sha256": hashlib.sha256(here.view(torch.uint8).numpy().tobytes()).hexdigest(),
        "is_finite": bool(here.isfinite().all()),
        "largest_difference": None,
    }
    if reference.exists():
        there = load_file(reference)["output"]
        found["largest_difference"] = float((here.float() - there.float()).abs().max())
        found["largest_reference"] = float(there.float().abs().max())
    return found


def measure_resident(
    subject: Subject, counter: Counter, reference: Path, *, until_s: float = math.inf
) -> dict[str, Any]:
    """Measure the step that all others are held to; writes its output to *reference*.

    Where the weights do not fit, every block is brought by itself and its time alone is counted.
    """
    found: dict[str, Any] = {"is_resident": subject.is_resident}
    if subject.is_resident:
        steps, output = measure_steps(subject, counter, until_s=until_s)
        found |= steps
        found["windows"], _ = timed_windows(subject, counter.device, WINDOW_REPEATS)
        found["compute_s"] = found["step_s"]
    else:
        found["windows"], output = timed_windows(subject, counter.device, 1)
        found["compute_s"] = math.fsum(gpu_s for _, gpu_s, _ in found["windows"])
    save_file({"output": output.detach().cpu().contiguous()}, reference)
    return found | compared(output, reference)


def timed_windows(
    subject: Subject, device: torch.device, repeats: int
) -> tuple[list[tuple[str | None, float, float]], torch.Tensor]:
    """Return (block, GPU seconds, host seconds) of each part of a step, and the output.

    Medians of *repeats* steps, after as many; None stands for what lies between blocks. Blocks that
    lie on the host are copied in before they are timed, which is not in the figures.
    """
    cut = subject.cut
    tensors = dict(subject.transformer.named_parameters())
    tensors |= subject.transformer.named_buffers()
    steps: list[list[tuple[str | None, float, float]]] = []
    around = (*cut.rest, *cut.buffers)
    with nullcontext() if subject.is_resident else _brought(around, tensors, device):
        for _ in range(2 * repeats):
            timer = _WindowTimer(device)
            handles = []
            for block in cut.blocks:
                own = [tensors[one.path] for one in block.tensors]
                bring = None if subject.is_resident else _Bringing(own, device)
                module = subject.transformer.get_submodule(block.path)
                handles += [
                    module.register_forward_pre_hook(timer.beginning(block.path, bring)),
                    module.register_forward_hook(timer.ending(bring), always_call=True),
                ]
            try:
                timer.open(None)
                output = subject.step()
                timer.close()
            finally:
                for handle in handles:
                    handle.remove()
            synchronize(device)
            steps.append(timer.windows())
    kept = steps[repeats:]
    if len({tuple(path for path, *_ in one) for one in kept}) != 1:
        raise InvalidRequest("The blocks of a step did not come in one order.")
    return [
        (
            parts[0][0],
            statistics.median(gpu_s for _, gpu_s, _ in parts),
            statistics.median(host_s for *_, host_s in parts),
        )
        for parts in zip(*kept, strict=True)
    ], output


class _Bringing:
    """Parameters that are on the device for a while."""

    def __init__(self, parameters: Sequence[torch.Tensor], device: torch.device) -> None:
        self._parameters, self._device = parameters, device
        self._homes: list[torch.Tensor] = []

    def begin(self) -> None:
        self._homes = [one.data for one in self._parameters]
        for one in self._parameters:
            one.data = one.data.to(self._device)

    def end(self) -> None:
        for one, home in zip(self._parameters, self._homes, strict=True):
            one.data = home
        self._homes = []


@contextmanager
def _brought(
    around: Sequence[TensorInfo], tensors: Mapping[str, torch.Tensor], device: torch.device
) -> Iterator[None]:
    bringing = _Bringing([tensors[one.path] for one in around], device)
    bringing.begin()
    try:
        yield
    finally:
        bringing.end()


class _WindowTimer:
    """Marks the borders of the windows of one step."""

    def __init__(self, device: torch.device) -> None:
        self._marks = Marks(device)
        self._open: tuple[str | None, int] | None = None
        self._closed: list[tuple[str | None, int, int]] = []

    def open(self, path: str | None) -> None:
        self._open = path, self._marks.add()

    def close(self) -> None:
        assert self._open is not None
        self._closed.append((*self._open, self._marks.add()))

    def beginning(self, path: str, bring: _Bringing | None) -> Callable[..., None]:
        def begin(*_: Any) -> None:
            self.close()
            if bring is not None:
                bring.begin()
            self.open(path)

        return begin

    def ending(self, bring: _Bringing | None) -> Callable[..., None]:
        def end(*_: Any) -> None:
            self.close()
            if bring is not None:
                bring.end()
            self.open(None)

        return end

    def windows(self) -> list[tuple[str | None, float, float]]:
        host_s = self._marks.host_s
        return [
            (path, self._marks.seconds(begin, end), host_s[end] - host_s[begin])
            for path, begin, end in self._closed
        ]


def measure_placed(
    subject: Subject,
    option: Option,
    counter: Counter,
    reference: Path,
    *,
    until_s: float = math.inf,
) -> dict[str, Any]:
    """Measure steps with *option* in force, and take it back."""
    start_s = time.monotonic()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")  # what could not be page-locked is said by a warning
        applied = apply_options(subject.pipe, [option], counter.device)
        try:
            found: dict[str, Any] = {"apply_s": time.monotonic() - start_s}
            steps, output = measure_steps(subject, counter, until_s=until_s)
            found |= steps | compared(output, reference)
            del output
        finally:
            applied.undo()
    found["warnings"] = sorted({str(one.message).splitlines()[0] for one in warned})
    if option.strategy == "streaming":
        found |= streamed(subject.cut, option.parameters["resident_blocks"])
    return found


def streamed(cut: Blocks, num_resident: int) -> dict[str, int]:
    """Return what goes over the link in a step, and in how many copies."""
    numbers = cut.streamed(num_resident)
    return {
        "resident_blocks": num_resident,
        "streamed_blocks": len(numbers),
        "streamed_bytes": sum(cut.blocks[number].num_bytes for number in numbers),
    }


# -- mmgp


def check_mmgp(device: torch.device) -> None:
    """Raise Missing if mmgp is not installed, InvalidRequest where it does not work."""
    if importlib.util.find_spec("mmgp") is None:
        raise Missing("It needs `pip install mmgp`.")
    if device != torch.device("cuda", 0):
        raise InvalidRequest("mmgp works on the first CUDA GPU alone: run this row there.")


def measure_mmgp(
    subject: Subject,
    target_bytes: int,
    counter: Counter,
    reference: Path,
    *,
    until_s: float = math.inf,
) -> dict[str, Any]:
    """Measure steps under mmgp, with the budget at which it allocates *target_bytes* at its peak.

    Use a process for this alone: importing mmgp changes diffusers and torch's default device.

    See :func:`check_mmgp` for what it needs.
    """
    from mmgp import offload

    transformer = subject.transformer.to("cpu")
    found: dict[str, Any] = {"target_bytes": target_bytes, "tries": []}
    budget_bytes = float(target_bytes)
    best: dict[str, Any] | None = None
    for _ in range(MMGP_TRIES):
        # One number for all would be ignored: `budget = get_parsed_budget(budget)` in 3.8.2.
        manager = offload.all(
            {COMPONENT: transformer},
            pinnedMemory=True,
            quantizeTransformer=False,
            budgets={COMPONENT: budget_bytes / MMGP_BUDGET_BYTES},
            perc_reserved_mem_max=MMGP_PINNED_SHARE,
            verboseLevel=0,
        )
        torch.set_default_device(None)  # it leaves it on the GPU
        try:
            steps, output = measure_steps(subject, counter, until_s=until_s)
            one = {"budget_bytes": round(budget_bytes), **steps, **compared(output, reference)}
            del output
        finally:
            manager.release()
            torch.set_default_device(None)
            take_mmgp_off(transformer)
        found["tries"].append([one["budget_bytes"], one["allocated_bytes"], one["step_s"]])
        best = one if best is None else nearer(best, one, target_bytes)
        budget_bytes = next_budget(found["tries"], target_bytes)
        if budget_bytes <= 0 or time.monotonic() + 2 * MOST_STEPS * one["step_s"] > until_s:
            break
    return found | (best or {}) | {"mmgp": importlib.metadata.version("mmgp")}


def next_budget(tries: Sequence[Sequence[float]], target_bytes: int) -> float:
    """Return the budget to try after *tries* of (budget, allocated, seconds); 0: none is better.

    mmgp counts neither activations nor the blocks on their way, and keeps whole blocks.

    >>> next_budget([(100, 130, 1.0)], 120)
    90.0
    >>> next_budget([(100, 130, 1.0), (90, 130, 1.0)], 120)
    80.0
    >>> next_budget([(100, 120, 1.0)], 120)
    0.0
    """
    budget, allocated, _ = tries[-1]
    return max(0.0, float(budget + target_bytes - allocated)) if allocated != target_bytes else 0.0


def nearer(one: Mapping[str, Any], other: Mapping[str, Any], target_bytes: int) -> dict[str, Any]:
    """Return which of two tries allocates what is nearer to *target_bytes*."""
    return dict(min(one, other, key=lambda found: abs(found["allocated_bytes"] - target_bytes)))


def take_mmgp_off(module: Any) -> None:
    """Remove the forwards and marks that mmgp leaves on *module*, so that it can be hooked anew."""
    for part in module.modules():
        for name in list(part.__dict__):
            if name in ("forward", "_hf_hook") or name.startswith("_mm_"):
                del part.__dict__[name]
