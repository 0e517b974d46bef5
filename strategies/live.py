"""What a live module carries besides its values: devices, tensor identities, hooks, processors.

Each ``*_restorer`` remembers one of these now and returns the function that puts it back, so that a
strategy's undo is a stack of them. This is also the only place that names what diffusers and
accelerate keep private about hooks; ``tests/strategies/test_live.py`` fails, naming the versions,
when they move. A reader would expect removing a hook to restore ``forward``. Both libraries leave
the old ``forward`` behind as an instance attribute, which then shadows the class for ever.
"""

from __future__ import annotations

import dis
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType, SimpleNamespace
from typing import Any

from pipefit.cost_models.workload import Launcher
from pipefit.errors import UnsupportedPipeline

Restore = Callable[[], None]

ACCELERATE_HOOK = "_hf_hook"
"""Attribute in which accelerate 1.15 keeps a module's hook (``add_hook_to_module`` in hooks.py)."""

DIFFUSERS_HOOKS = "_diffusers_hook"
"""Attribute in which diffusers 0.42 keeps a module's ``HookRegistry`` (hooks/hooks.py)."""

ENTRY_METHODS = ("encode", "decode", "generate", "get_text_features", "get_image_features")
"""Methods besides ``forward`` by which pipelines enter a component."""

DISPATCH_ATTRIBUTES = ("hf_device_map", "to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron")
"""What accelerate's ``dispatch_model`` leaves on a module (big_modeling.py, accelerate 1.15)."""

HOOK_ATTRIBUTES = ("forward", "_old_forward", ACCELERATE_HOOK, DIFFUSERS_HOOKS)
"""Instance attributes that attaching a hook writes."""

OFFLOAD_ATTRIBUTES = ("_all_hooks", "_offload_gpu_id", "_offload_device")
"""What ``enable_model_cpu_offload`` and its sequential sister leave on the pipeline.

``_offload_gpu_id`` outlives the hooks, and a later ``gpu_id=0`` does not replace it
(``gpu_id or ...`` in pipelines/pipeline_utils.py, diffusers 0.42.1).
"""

GROUP_OFFLOADING_HOOKS = (
    "group_offloading",
    "layer_execution_tracker",
    "lazy_prefetch_group_offloading",
)
"""Names under which diffusers 0.42 registers group offloading (hooks/group_offloading.py)."""

PROGRESS_BAR = "_progress_bar_config"
"""Where ``set_progress_bar_config`` of a pipeline keeps what it is given."""

COMPILED = "_compiled_call_impl"
"""Attribute in which torch 2.13 keeps what ``Module.compile`` makes of a module."""

COMPILE_MODE = "_pipefit_compile_mode"
"""Attribute in which the strategy ``compile`` notes its mode, which torch keeps out of sight."""

CAPTURING_MODES = ("reduce-overhead", "max-autotune")
"""Modes of ``torch.compile`` that replay CUDA graphs (``list_mode_options`` in
torch/_inductor/__init__.py, 2.13)."""

TRYING_MODES = ("max-autotune", "max-autotune-no-cudagraphs")
"""Those in which inductor tries several kernels for each product and convolution (same place)."""

LAYERWISE_CASTING_HOOK = "layerwise_casting"
"""The same for layerwise casting (hooks/layerwise_casting.py)."""

DEFAULTED = "_use_default_values"
"""Key under which a configuration of diffusers 0.42 lists the arguments that nobody gave, in an
order that differs between processes (``register_to_config`` in configuration_utils.py)."""

CHUNKING_ATTRIBUTES = ("_chunk_size", "_chunk_dim")
"""Where a block of diffusers 0.42 keeps in what parts, and by which dimension, its feed-forward
layers work (``set_chunk_feed_forward`` in models/attention.py)."""


def module_components(pipe: Any) -> dict[str, Any]:
    """Return the pipeline's components that are modules, by attribute name."""
    from torch import nn

    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def tensor_slots(module: Any, *, recurse: bool = True) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (dictionary, key) of every parameter and buffer; a tied tensor comes once per place."""
    for part in module.modules() if recurse else (module,):
        for slots in (part._parameters, part._buffers):
            for key, tensor in slots.items():
                if tensor is not None:
                    yield slots, key


def device_restorer(module: Any) -> Restore:
    """Remember where each tensor of *module* lies; the result moves back what has moved."""
    from torch.nn import Parameter
    from torch.utils import swap_tensors
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    places = [(slots, key, slots[key].device) for slots, key in tensor_slots(module)]

    def restore() -> None:
        for slots, key, device in places:
            tensor = slots[key]
            if tensor.device == device:
                continue
            moved = tensor.data.to(device)
            # Either keeps the parameter object, and with it ties and references.
            if is_traceable_wrapper_subclass(tensor):
                # `.data` would leave behind the tensors that a quantised weight is made of.
                swap_tensors(tensor, Parameter(moved, requires_grad=tensor.requires_grad))
            else:
                tensor.data = moved

    return restore


def identity_restorer(module: Any) -> Restore:
    """Remember which tensor objects *module* holds; the result puts these objects back."""
    tensors = [(slots, key, slots[key]) for slots, key in tensor_slots(module)]

    def restore() -> None:
        for slots, key, tensor in tensors:
            slots[key] = tensor

    return restore


def attribute_restorer(owner: Any, names: Sequence[str]) -> Restore:
    """Remember the instance attributes *names* of *owner*; the result sets or deletes them."""
    before = {name: vars(owner)[name] for name in names if name in vars(owner)}
    absent = tuple(name for name in names if name not in before)

    def restore() -> None:
        vars(owner).update(before)
        for name in absent:
            vars(owner).pop(name, None)

    return restore


def wrap_method(owner: Any, name: str, wrapper: Callable[..., Any]) -> Restore:
    """Call ``wrapper(method, ...)`` in place of *owner*'s method *name*; the result takes it off.

    Hooks that come later go around it. A copy of *owner* gets a wrapper of its own: a partial is
    copied with the bound method in it.
    """
    method = getattr(owner, name)
    wrapped = functools.update_wrapper(functools.partial(wrapper, method), method)
    restore = attribute_restorer(owner, (name,))
    vars(owner)[name] = wrapped  # a module's own setattr looks for parameters first
    return restore


def without_progress_bar(pipe: Any) -> Restore:
    """Let *pipe* show no progress; the result sets what was set before.

    diffusers 0.42 has a method that sets it, and keeps it in a private attribute.
    """
    restore = attribute_restorer(pipe, (PROGRESS_BAR,))
    vars(pipe)[PROGRESS_BAR] = {"disable": True}
    return restore


def hook_restorer(module: Any) -> Restore:
    """Remember every submodule's hook attributes; call the result once the hooks are removed."""
    restores = [attribute_restorer(part, HOOK_ATTRIBUTES) for part in module.modules()]

    def restore() -> None:
        for one in restores:
            one()

    return restore


def processor_restorer(module: Any) -> Restore:
    """Remember each attention processor and the backend it names; the result puts both back."""
    before = [
        (part, part.processor, attribute_restorer(part.processor, ("_attention_backend",)))
        for part in module.modules()
        if getattr(part, "processor", None) is not None
    ]

    def restore() -> None:
        for part, processor, restore_backend in before:
            if part.processor is not processor:
                part.set_processor(processor)
            restore_backend()

    return restore


def _accelerate_hooks(part: Any) -> tuple[Any, ...]:
    hook = getattr(part, ACCELERATE_HOOK, None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def set_execution_device(module: Any, device: Any) -> None:
    """Tell accelerate's hooks on *module* and below to compute on *device*."""
    for part in module.modules():
        for hook in _accelerate_hooks(part):
            if getattr(hook, "execution_device", None) is not None:
                hook.execution_device = device


def execution_device(pipe: Any) -> Any:
    """Return where *pipe* computes, as diffusers 0.42 tells it by its components and their hooks.

    The property is private and pipelines themselves make their tensors there.
    """
    return pipe._execution_device


def hooks_of(module: Any) -> dict[str, tuple[str, ...]]:
    """Return the hooks on each submodule by path: accelerate's by class, diffusers' by name.

    Pipelines create empty diffusers registries in an ordinary call; those are no hooks.
    """
    found = {}
    for path, part in module.named_modules():
        names = [type(hook).__name__ for hook in _accelerate_hooks(part)]
        registry = getattr(part, DIFFUSERS_HOOKS, None)
        names += [] if registry is None else list(registry.hooks)
        if names:
            found[path] = tuple(names)
    return found


def have_weights_brought(module: Any) -> bool:
    """Whether hooks bring weights of *module* to where it computes.

    Those of group offloading do, and accelerate's, unless they say that they do not.
    """
    return any(
        any(getattr(hook, "brings_weights", True) for hook in _accelerate_hooks(part))
        or any(diffusers_hook(part, name) for name in GROUP_OFFLOADING_HOOKS)
        for part in module.modules()
    )


def diffusers_hook(part: Any, name: str) -> Any:
    """Return the hook that diffusers registered as *name* on *part* itself; None without one."""
    registry = getattr(part, DIFFUSERS_HOOKS, None)
    return None if registry is None else registry.get_hook(name)


def remove_group_offloading(module: Any) -> None:
    """Take diffusers' group offloading hooks off *module* and everything below it."""
    from diffusers.hooks import HookRegistry

    registry = HookRegistry.check_if_exists_or_initialize(module)
    for name in GROUP_OFFLOADING_HOOKS:
        registry.remove_hook(name, recurse=True)


def read_back_groups(module: Any) -> None:
    """Read weights that group offloading keeps on disk, all of them, back into host memory."""
    from safetensors.torch import load_file

    for part in module.modules():
        hook = diffusers_hook(part, GROUP_OFFLOADING_HOOKS[0])
        if hook is not None and hook.group._is_offloaded_to_disk:
            weights = load_file(hook.group.safetensors_file_path)
            for key, tensor in hook.group.key_to_tensor.items():
                tensor.data = weights[key]


def launcher_of(module: Any) -> Launcher:
    """Return who launches the kernels of a call of *module*: Python, or a graph made of it."""
    own = vars(module)
    if own.get(COMPILED) is not None:
        return "captured" if own.get(COMPILE_MODE) in CAPTURING_MODES else "compiled"
    return "traced" if getattr(own.get("forward"), "is_jit_trace", False) else "eager"


def tries_kernels(module: Any) -> bool:
    """Whether compiling *module* has inductor try kernels out."""
    own = vars(module)
    return own.get(COMPILED) is not None and own.get(COMPILE_MODE) in TRYING_MODES


def repeated_blocks(module: Any) -> list[Any]:
    """Return the parts of *module* that ``compile_repeated_blocks`` of diffusers 0.42 compiles."""
    names = getattr(module, "_repeated_blocks", None) or ()
    return [part for part in module.modules() if type(part).__name__ in names]


STEP_CACHE_ATTRIBUTES = ("_cache_config",)
"""What ``CacheMixin.enable_cache`` writes besides hooks (models/cache_utils.py, diffusers 0.42)."""


def reset_step_cache(module: Any) -> None:
    """Let the step cache on *module* forget the steps that it has seen."""
    module._reset_stateful_cache()


def taylorseer_layers(module: Any, *, lite: bool) -> int:
    """Return how many outputs below *module* diffusers' TaylorSeer cache would extrapolate."""
    from diffusers.hooks import taylorseer_cache

    patterns = (
        taylorseer_cache._PROJ_OUT_IDENTIFIERS
        if lite
        else taylorseer_cache._TRANSFORMER_BLOCK_IDENTIFIERS
    )
    paths = [path for path, _ in module.named_modules()]
    return sum(any(re.fullmatch(pattern, path) for pattern in patterns) for path in paths)


def enters_cache_context(pipeline_class: type) -> bool:
    """Return whether a pipeline names its calls for caches: ``model.cache_context(...)``."""
    return any(
        "cache_context" in code.co_names
        for base in pipeline_class.__mro__
        for function in vars(base).values()
        for code in _codes(function)
    )


def wanted_in_float32(module: Any) -> tuple[str, ...]:
    """Return the names of submodules that the class of *module* keeps in float32 when loaded."""
    return tuple(getattr(module, "_keep_in_fp32_modules", None) or ())


def attention_registry() -> Any:
    """Return diffusers' process-wide attention backend registry.

    Raises:
        UnsupportedPipeline: this diffusers keeps it elsewhere.
    """
    try:
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry
    except ImportError as error:
        import diffusers

        raise UnsupportedPipeline(
            f"diffusers {diffusers.__version__} keeps its attention backends where pipefit does "
            "not know them: use diffusers 0.42, or leave the attention strategy out."
        ) from error
    return Registry


def balanced_components(
    sizes: Mapping[str, int], room_bytes: Mapping[int, int]
) -> dict[str, int | str]:
    """Return where ``device_map="balanced"`` puts components of these *sizes*: a GPU or ``"cpu"``.

    Largest first, GPUs with most room first, back and forth; *room_bytes* is by GPU. Components may
    be missing: of those that do not fit where their turn is, the library remembers only the last.

    Raises:
        UnsupportedPipeline: this diffusers has no such function.
    """
    try:
        from diffusers.pipelines.pipeline_loading_utils import _assign_components_to_devices
    except ImportError as error:
        import diffusers

        raise UnsupportedPipeline(
            f"diffusers {diffusers.__version__} balances components in a way that pipefit does not "
            "know: use diffusers 0.42, or name the GPUs with device_map:device=1@vae."
        ) from error

    def by_size(table: Mapping[Any, int]) -> dict[Any, int]:
        return dict(sorted(table.items(), key=lambda item: item[1], reverse=True))

    found = _assign_components_to_devices(by_size(sizes), by_size(room_bytes))
    return {name: place for place, names in found.items() for name in names}


PROBED_DTYPES = ("float32", "float16", "bfloat16")
PROBED_HEAD_SIZES = tuple(range(8, 520, 8))
"""What diffusers' checks are asked about; head sizes of real models are multiples of 8."""


def attention_backends() -> dict[str, dict[str, Any]]:
    """Return what diffusers' registry says of each attention backend, by its name, as JSON values.

    ``missing``: why it cannot be used in this environment; empty where it can. ``takes_mask``.
    ``dtypes`` and ``head_sizes``: which of the probed pass its own checks, which diffusers itself
    makes only under ``DIFFUSERS_ATTN_CHECKS``; None for all sizes. ``capability``: the least that
    they ask of the GPU, or None.
    """
    registry = attention_registry()  # first: says it where this diffusers keeps them elsewhere
    from diffusers.models.attention_dispatch import _check_attention_backend_requirements

    found = {}
    for backend, function in registry._backends.items():
        missing = ""
        try:
            _check_attention_backend_requirements(backend)
        except RuntimeError as error:
            missing = str(error)
        capability, checks = None, []
        for check in registry._constraints[backend]:
            # This one asks the device of a tensor; what it was made with says it for any.
            bound = inspect.getclosurevars(check).nonlocals
            if "major" in bound:
                capability = [bound["major"], bound["minor"]]
            else:
                checks.append(check)
        sizes = [h for h in PROBED_HEAD_SIZES if _passes(checks, "bfloat16", h)]
        found[backend.value] = {
            "missing": missing,
            "takes_mask": not any(
                "attn_mask" in const and "not supported" in const
                for code in _codes(function)
                for const in code.co_consts
                if isinstance(const, str)
            ),
            "dtypes": [d for d in PROBED_DTYPES if _passes(checks, d, 64)],
            "head_sizes": None if len(sizes) == len(PROBED_HEAD_SIZES) else sizes,
            "capability": capability,
        }
    return found


def _passes(checks: Sequence[Callable[..., None]], dtype: str, head_size: int) -> bool:
    """Whether diffusers' *checks* of an attention call pass, asked with what describes a tensor."""
    import torch

    like = SimpleNamespace(
        dtype=getattr(torch, dtype),
        shape=(1, 128, 1, head_size),
        ndim=4,
        device=SimpleNamespace(type="cuda"),
    )
    try:
        for check in checks:
            check(query=like, key=like, value=like, attn_mask=None, is_causal=False)
    except ValueError:
        return False
    return True


@functools.cache
def reads_flag(cls: type, flag: str) -> bool:
    """Return whether a method of *cls* looks at ``self.<flag>``; some have a flag and never do."""
    return any(
        instruction.opname == "LOAD_ATTR" and instruction.argval == flag
        for base in cls.__mro__
        for function in vars(base).values()
        for code in _codes(function)
        for instruction in dis.get_instructions(code)
    )


def _codes(function: Any) -> Iterator[CodeType]:
    """Yield the code of a function, and of those that it decorates."""
    while function is not None:
        code = getattr(function, "__code__", None)
        if isinstance(code, CodeType):
            yield code
            yield from (const for const in code.co_consts if isinstance(const, CodeType))
        function = getattr(function, "__wrapped__", None)
