"""What strategies, alone and in pairs, do to the pictures of small real pipelines on the CPU.

The pipelines are those of ``tests/small_pipelines.py``: the libraries' own classes, few and narrow
layers, seeded random weights in float32. Where a call takes a number of pictures, it makes two, so
that a batch can be divided. Which parameters a strategy is exercised with, it says itself
(``options`` after a trace of the same call); ``TO_EXERCISE`` and ``SMALL`` add what it does not
offer.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tests.small_pipelines import FURTHER_PIPELINES, SMALL_PIPELINES, picture, small_call

from benchmarks.strategy_catalogue import ON_THE_CPU, TO_EXERCISE, components_of, impersonal
from pipefit.cost_models.workload import Component, Workload
from pipefit.errors import ApplyFailed
from pipefit.planner.apply import apply_options
from pipefit.planner.build import quietly
from pipefit.planner.rehearse import on_stage
from pipefit.planner.trace import trace
from pipefit.strategies import BUILT_IN, conflict_of, quality_of, strategy, traits_of
from pipefit.strategies.strategy import Conditional, Imitated, Option, Quality

NOT_ON_A_CPU: Mapping[str, str] = {
    "tf32": "it changes matrix products of NVIDIA GPUs alone",
    "cudnn_benchmark": "cuDNN runs on NVIDIA GPUs alone",
    "sharded_checkpoint": "it is for files, and these pipelines are loaded",
    "compile": "it needs a C++ compiler and minutes; what inductor makes for a GPU is other code",
}
"""Strategies whose pictures on a CPU say nothing -> why."""

SMALL: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "vae_tiling": ({"tile_px": 32},),
    "streaming": ({"resident_blocks": 1, "num_slots": 2, "max_block_bytes": 16 << 10},),
}
"""More parameters to exercise, of the size of the small pipelines: 32 px is half a picture's side,
16 KiB one of several blocks."""

PIPELINES = {**SMALL_PIPELINES, **FURTHER_PIPELINES}
"""What everything is tried on."""

STEPS = 4
"""Denoising steps of a call: enough for what one step leaves to the next to matter."""

WHOLE = ("pipeline_placement", "process")
"""Kinds of strategies that are asked for without a component."""


@dataclass(frozen=True)
class Subject:
    """A small pipeline that everything is tried on; whatever is applied has to be undone."""

    name: str
    pipe: Any
    changed: Mapping[str, Any]
    """What its call has beyond the small one."""
    components: Mapping[str, Component]
    workload: Workload
    expected: torch.Tensor
    """The picture before anything was applied."""

    def picture(self, **changed: Any) -> torch.Tensor:
        """Call the pipeline as it is now."""
        with quietly():
            return picture(self.pipe, self.name, **self.changed, **changed)

    def picture_with(self, options: Sequence[Option]) -> torch.Tensor:
        """Call the pipeline under *options*."""
        with quietly(), apply_options(self.pipe, options, "cpu"):
            return picture(self.pipe, self.name, **self.changed)


@functools.cache
def subject(name: str) -> Subject:
    """Build, trace and call the small pipeline *name*, once in a process."""
    torch.set_num_threads(
        1
    )  # faster than several for tensors of this size, and the same everywhere
    with quietly():
        pipe = PIPELINES[name]()
        pipe.set_progress_bar_config(disable=True)
        changed = {"num_inference_steps": STEPS}
        if "num_images_per_prompt" in inspect.signature(pipe.__call__).parameters:
            changed["num_images_per_prompt"] = 2
        call = {**small_call(name), **changed}
        return Subject(
            name=name,
            pipe=pipe,
            changed=changed,
            components=components_of(pipe),
            workload=trace(pipe, call, name=name, traits=traits_of),
            expected=picture(pipe, name, **changed),
        )


def forms(name: str, component: Component, workload: Workload) -> list[Mapping[str, Any]]:
    """Return the parameters to exercise the strategy *name* with on *component*; none: refused."""
    one = strategy(name)
    offered = list(one.options(component, workload, ON_THE_CPU))
    tried = [*TO_EXERCISE.get(name, ()), *SMALL.get(name, ()), *offered]
    found: list[Mapping[str, Any]] = []
    for parameters in tried or [{}]:
        is_unfit = (
            one.kind in WHOLE  # what a component is not fit for depends on the GPU
            and isinstance(one, Conditional)
            and one.unfit(component, parameters, workload, ON_THE_CPU)
        )
        if parameters not in found and not is_unfit and one.refusal(component, parameters) is None:
            found.append(parameters)
    return found


def label(name: str, parameters: Mapping[str, Any], components: Container[str] = ()) -> str:
    """Return a strategy as the command line has it, the same for all components.

    What lists a component's own modules is left out, and another component is not named.

    >>> label("streaming", {"resident_blocks": 1, "load_with": "unet"}, ("unet",))
    'streaming:resident_blocks=1,load_with=…'
    """
    shown = [
        f"{key}={'…' if value in components else str(value).lower()}"
        for key, value in parameters.items()
        if not isinstance(value, (list, tuple, Mapping))
    ]
    return f"{name}:{','.join(shown)}" if shown else name


def everywhere(name: str, about: Subject) -> dict[str, list[Option]]:
    """Return, by label, the strategy *name* on every component of a pipeline that takes it."""
    found: dict[str, list[Option]] = {}
    taking = 0
    for component in about.components.values():
        offered = forms(name, component, about.workload)
        taking += bool(offered)
        for parameters in offered:
            options = found.setdefault(label(name, parameters, about.components), [])
            option = Option(strategy=name, component=component.name, parameters=parameters)
            if not any(other.component == component.name for other in options):
                options.append(option)
    if strategy(name).kind not in WHOLE:
        return found
    if taking < len(about.components):
        return {}
    return {
        text: [Option(strategy=name, parameters=options[0].parameters)]
        for text, options in found.items()
    }


# -- quality


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """How far a picture under a strategy is from the untouched one."""

    strategy: str
    label: str
    quality: Quality
    pipeline: str
    largest: float
    """Largest difference of a pixel, which is 0 to 1."""
    psnr_db: float
    """Infinite for a picture that is the same in every bit."""
    fails: str = ""
    """What the call said instead of making a picture."""


def measure(name: str, pipeline: str) -> Iterator[Measured]:
    """Compare the pictures of one small pipeline under each form of the strategy *name*."""
    about = subject(pipeline)
    for text, options in ({} if unmeasured(name) else everywhere(name, about)).items():
        if not all(map(goes_on_loaded, options)):
            continue
        quality = max((quality_of(option) for option in options), key=lambda one: one.rank)
        try:
            largest, psnr_db, fails = *apart(about.picture_with(options), about.expected), ""
        except (ApplyFailed, RuntimeError, ValueError) as error:
            largest, psnr_db, fails = math.nan, math.nan, str(error).strip().split("\n")[0]
        yield Measured(
            strategy=name, label=text, quality=quality, pipeline=pipeline,
            largest=largest, psnr_db=psnr_db, fails=fails,
        )  # fmt: skip


def unmeasured(name: str) -> str:
    """Say why the pictures of the strategy *name* cannot be compared on a CPU; empty if they can.

    What has to be asked of a component is the components' matter: it makes no row.
    """
    return NOT_ON_A_CPU.get(name, "")


def apart(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Return the largest difference of two pictures of pixels from 0 to 1, and their PSNR in dB."""
    difference = (found.double() - expected.double()).abs()
    mean_square = float((difference**2).mean())
    return float(difference.max()), math.inf if mean_square == 0 else -10 * math.log10(mean_square)


# -- pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two strategies in the order of ``BUILT_IN``, and where on the small pipelines both go."""

    first: str
    second: str
    together: tuple[str, tuple[Option, Option]] | None
    """A pipeline and the two on it, on one component where there is one that takes both."""
    excluded: str
    """Why they do not go on one component; empty where they do, or where none takes both."""
    refused: tuple[str, tuple[Option, Option]] | None
    """A pipeline, and what to ask for to be told so."""

    @property
    def shares_component(self) -> bool:
        """Whether one component takes both."""
        if self.excluded or self.together is None:
            return False
        return len({option.component for option in self.together[1]} - {None}) < 2


BOTH_PLACE = "both place the weights: choose one."
"""What :func:`pipefit.planner.apply.apply_options` says of two placements."""


def is_placing(option: Option) -> bool:
    """Whether *option* decides where weights are."""
    return strategy(option.strategy).placement(option.parameters) is not None


def goes_on_loaded(option: Option) -> bool:
    """Whether a pipeline that is loaded already can be given *option*."""
    one = strategy(option.strategy)
    return not isinstance(one, Imitated) or one.goes_on_loaded(option.parameters)


def _packs(name: str) -> bool:
    """Whether others find weights under the strategy that are more than their parameters."""
    one = strategy(name)
    return isinstance(one, Imitated) and not one.is_rehearsed


@functools.cache
def pairs() -> tuple[Pair, ...]:
    """Return every pair of strategies."""
    names = [one.name for one in BUILT_IN]
    return tuple(pair(first, second) for first, second in itertools.combinations(names, 2))


def pair(first: str, second: str, names: Iterable[str] = tuple(PIPELINES)) -> Pair:
    """Look for one component that takes both, then for one each, in the pipelines *names*."""
    excluded, refused = "", None
    for name in names:
        for one, other, reason in _on_one_component(first, second, name):
            if not reason:
                both = name, (one, other)
                return Pair(first=first, second=second, together=both, excluded="", refused=None)
            if refused is None:
                excluded, refused = reason, (name, (one, other))
    apart_ = _on_two_components(first, second, names)
    return Pair(first=first, second=second, together=apart_, excluded=excluded, refused=refused)


def _on_one_component(first: str, second: str, name: str) -> Iterator[tuple[Option, Option, str]]:
    """Yield the forms that one component takes, and why it does not take both at once."""
    about = subject(name)
    for component, described in about.components.items():
        for one in _options(first, name, component):
            for other in _options(second, name, component):
                reason = conflict_of([one, other])
                if is_placing(one) and is_placing(other):
                    reason = BOTH_PLACE
                elif not reason and _packs(first):
                    loaded = _loaded(name, component, one)
                    reason = strategy(second).refusal(loaded, other.parameters)
                yield one, other, impersonal(reason or "", described.class_name)


def _on_two_components(
    first: str, second: str, names: Iterable[str]
) -> tuple[str, tuple[Option, Option]] | None:
    """Return a pipeline with a component for each of the two, the largest ones if possible."""
    if any(strategy(name).kind in WHOLE for name in (first, second)):
        return None
    for name in names:
        components = subject(name).components
        largest = sorted(components, key=lambda part: -components[part].weight_bytes)
        for part, rest in itertools.permutations(largest, 2):
            for one in _options(first, name, part):
                for other in _options(second, name, rest):
                    return name, (one, other)
    return None


@functools.cache
def _options(name: str, pipeline: str, component: str) -> tuple[Option, ...]:
    """Return the forms of a strategy on a component; of one for all, if all take it."""
    about = subject(pipeline)
    if strategy(name).kind in WHOLE:
        return tuple(option for found in everywhere(name, about).values() for option in found)
    return tuple(
        Option(strategy=name, component=component, parameters=parameters)
        for parameters in forms(name, about.components[component], about.workload)
    )


def spread(option: Option, pipeline: str) -> list[Option]:
    """Return *option* on every component that takes it, if it says how weights are stored.

    Of one component alone pipelines may not expect it: they hand on what the others make.
    """
    if strategy(option.strategy).kind != "load":
        return [option]
    about = subject(pipeline)
    text = label(option.strategy, option.parameters, about.components)
    return everywhere(option.strategy, about)[text]


def _loaded(name: str, component: str, option: Option) -> Component:
    """Return *component* as *option*, a load strategy, would have had it loaded."""
    one = strategy(option.strategy)
    assert isinstance(one, Imitated)
    with quietly(), on_stage(subject(name).pipe, ON_THE_CPU) as stage:
        one.imitate(stage.pipe, component, option.parameters)
        return components_of(stage.pipe)[component]
