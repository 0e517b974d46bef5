"""Run a denoiser as TorchScript: the recipe of 2022, with ``torch.jit.trace`` on its first call.

A script has no modules' Python, so that a host which was behind the GPU catches up, and fuses
chains of pointwise operators. It belongs to the shapes that it was traced with, and to the numbers
that were given beside tensors: other ones are traced again, a few times, and then run eagerly.

What one would get wrong: tensors in dictionaries and lists (SDXL's ``added_cond_kwargs``) need no
wrapper written by hand, because arguments and result are flattened. And a script looks at the same
parameters as the module, so that moving the whole module moves it too; hooks within it do not run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

from pipefit.cost_models.machine import Gpu
from pipefit.cost_models.workload import Component, Workload
from pipefit.errors import InvalidRequest
from pipefit.strategies.compile import FIRST_TRITON_CAPABILITY, LEAST_CALLS
from pipefit.strategies.live import attribute_restorer
from pipefit.strategies.parameters import unknown_parameter
from pipefit.strategies.strategy import Kind, Option, Quality, Undo, hooks_within

MAX_SCRIPTS = 4
"""Shapes for which a component is traced; our choice, as many as anybody alternates between."""

MOST_DIFFERENCE = 0.02
"""By what share of its largest value a script's result may differ from the module's; our choice,
above what fusing in 16 bits rounds. What a module writes by way of ``.data`` is lost on the tracer:
CogVideoX's position table stays zero, and its video is another one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JitTrace:
    """``torch.jit.trace`` of ``forward``."""

    name: str = "jit_trace"
    kind: Kind = "compute"
    quality: Quality = Quality.HIGH
    consent: Literal["compile"] = "compile"

    def traits(self, module: Any) -> dict[str, Any]:
        """Whether pipelines enter it by another method than ``forward``."""
        return {"is_entered_by_decode": hasattr(module, "decode")}

    def options(
        self, component: Component, workload: Workload, gpu: Gpu
    ) -> Sequence[Mapping[str, Any]]:
        """One option, on GPUs that are too old for ``compile``, which is better elsewhere."""
        if gpu.compute_capability is None or gpu.compute_capability >= FIRST_TRITON_CAPABILITY:
            return ()
        calls = (p.num_calls for p in workload.phases if p.component == component.name)
        return ({},) if max(calls, default=0) >= LEAST_CALLS else ()

    def refusal(self, component: Component, parameters: Mapping[str, Any]) -> str | None:
        """Autoencoders, and what diffusers did not write."""
        if component.traits.get("is_entered_by_decode"):
            return f"pipelines call encode and decode of {component.class_name}, not its forward."
        if component.library != "diffusers":
            return f"{component.class_name} is no denoiser of diffusers."
        return unknown_parameter(self.name, parameters, ())

    def conflict(self, parameters: Mapping[str, Any], other: Option) -> str | None:
        """Whatever hooks onto modules within, weights that are no plain tensors, a second one."""
        if hooks_within(other):
            return "a script does not run the hooks of modules within it."
        if other.strategy == "quantization":
            return "a script needs plain weights."
        if other.strategy == "compile":
            return "one of them makes the component's graph."
        return None

    def placement(self, parameters: Mapping[str, Any]) -> None:
        """Weights stay where they are."""

    def apply(
        self, pipe: Any, component: str | None, parameters: Mapping[str, Any], device: Any
    ) -> Undo:
        """Put the script in the place of ``forward``; its first call traces. Undo puts it back."""
        module = getattr(pipe, str(component))
        with ExitStack() as undo:
            undo.callback(attribute_restorer(module, ("forward",)))
            vars(module)["forward"] = _Traced(module)
            return undo.pop_all().close


class _Traced:
    """A module's ``forward``, as a script for each signature of its arguments."""

    is_jit_trace = True

    def __init__(self, module: Any) -> None:
        self.module = module
        self.forward = module.forward
        self.scripts: dict[Any, Callable[..., Any]] = {}
        self.__wrapped__ = self.forward  # what inspect.signature follows

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        import torch
        from torch.utils import _pytree as tree

        leaves, structure = tree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if any(type(tensor) not in (torch.Tensor, torch.nn.Parameter) for tensor in tensors):
            return self.forward(*args, **kwargs)  # virtual ones: nothing that a script could run on
        key = (str(structure), *map(_described, leaves))
        if key not in self.scripts:
            if len(self.scripts) == MAX_SCRIPTS:
                return self.forward(*args, **kwargs)
            self.scripts[key] = self._traced(leaves, structure)
        return self.scripts[key](*tensors)

    def _traced(self, leaves: Sequence[Any], structure: Any) -> Callable[..., Any]:
        import torch
        from torch.utils import _pytree as tree

        is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        found: list[Any] = []
        forward = self.forward

        class Flat(torch.nn.Module):
            def __init__(self, module: Any) -> None:
                super().__init__()
                self.module = module

            def forward(self, *tensors: Any) -> tuple[Any, ...]:
                given = iter(tensors)
                filled = [
                    next(given) if is_one else leaf
                    for leaf, is_one in zip(leaves, is_tensor, strict=True)
                ]
                args, kwargs = tree.tree_unflatten(filled, structure)
                results, returned = tree.tree_flatten(forward(*args, **kwargs))
                found[:] = [returned, [result.detach().clone() for result in results]]
                return tuple(results)

        own = vars(self.module).pop("forward")  # a script is made of what the class defines
        flat = Flat(self.module).train(self.module.training)
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # that values become constants is the point
                script = torch.jit.trace(flat, tensors, check_trace=False, strict=False)
        except Exception as error:  # whatever the tracer or the model says
            said = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InvalidRequest(
                f"{type(self.module).__name__} cannot be traced ({said}): leave jit_trace out."
            ) from error
        finally:
            vars(self.module)["forward"] = own
        returned, expected = found
        with torch.no_grad():
            differing = _difference(script(*tensors), expected)
        if differing > MOST_DIFFERENCE:
            raise InvalidRequest(
                f"{type(self.module).__name__} cannot be traced (its script's result differs from "
                f"its own by {differing:.0%}): leave jit_trace out."
            )
        return lambda *tensors: tree.tree_unflatten(list(script(*tensors)), returned)


def _difference(results: Sequence[Any], expected: Sequence[Any]) -> float:
    """Return the largest difference, as a share of the largest value."""
    shares = (
        ((result - one).abs().max() / one.abs().max().clamp_min(1e-12)).item()
        for result, one in zip(results, expected, strict=True)
        if one.is_floating_point() and one.numel()
    )
    return max(shares, default=0.0)


def _described(leaf: Any) -> Any:
    """Return what a script depends on of an argument: a tensor's geometry, anything else itself."""
    import torch

    if isinstance(leaf, torch.Tensor):
        return (tuple(leaf.shape), leaf.dtype, str(leaf.device))
    return repr(leaf)
