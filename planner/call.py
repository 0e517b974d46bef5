"""The arguments of a call: what the user left out, and what the pipeline makes of it.

A plan is for one call, ``pipe(**call)``. Whoever plans says what differs from the pipeline's
defaults; here that is completed to a call that runs: a prompt, and pictures or embeddings where
the pipeline cannot do without. What is needed is read off the signature of the pipeline's
``__call__`` and off its components, so that it holds for pipelines nobody has listed.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from pipefit.errors import InvalidRequest, UnknownName

DEFAULT_PROMPT = "an astronaut riding a horse on mars"

DEFAULT_PICTURE_PX = 1024
"""Side of the output picture where neither the call nor any component says it."""

DEFAULT_NUM_FRAMES = 16
"""Frames of an input video whose length the call does not say; a motion module's usual window."""

LATENTS_OF_PICTURE = 4
"""Side of a picture over side of the latents that Paella's VQGAN decodes.

Source: ``up_down_scale_factor`` 2 and two levels in PaellaVQModel, diffusers 0.42.1.
"""

FAIL_WITHOUT_NEGATIVE_PROMPT = ("KolorsPipeline", "KolorsImg2ImgPipeline")
"""Pipelines whose call fails with guidance but no negative prompt; their documentation gives "".

Source: https://github.com/huggingface/diffusers/issues/13612, "Issue 4"; so in diffusers 0.42.1.
"""

EDIT_A_PICTURE = ("QwenImageLayeredPipeline", "FluxKontextPipeline")
"""Pipelines made for a picture though ``None`` is its default and nothing else tells.

Without one the first fails, the second draws from text alone.
"""

SHOWN_ARGUMENTS = (
    "height", "width", "resolution", "layers", "num_frames", "video_length", "audio_length_in_s",
    "audio_end_in_s", "num_inference_steps", "strength", "guidance_scale", "min_guidance_scale",
    "max_guidance_scale", "true_cfg_scale", "max_sequence_length", "num_images_per_prompt",
    "num_videos_per_prompt", "num_waveforms_per_prompt", "output_type",
)  # fmt: skip
"""Arguments that decide what a call needs, in the order in which people read them."""


def default_inputs(
    pipe: Any, entry: Mapping[str, Any] | None, call: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return *call* completed to arguments with which ``pipe(**arguments)`` runs.

    ``height`` and ``width`` may be given to a pipeline that takes its size from a picture or
    an embedding: they are then the size of the stand-in for it. What a catalogue *entry* lists as
    its call's ``inputs`` completes the call before anything is guessed.

    Raises:
        UnknownName: if *call* names something that the pipeline does not take.
        InvalidRequest: if a size is not a positive whole number.
    """
    parameters = _parameters(pipe)
    given = {**((entry or {}).get("call", {}).get("inputs", {})), **(call or {})}
    needed = _needed(pipe, parameters, given)
    sizes = {} if not needed else {"height", "width"} - parameters.keys()
    for name in given:
        if name not in parameters and name not in sizes:
            raise UnknownName("call argument", name, parameters)
    for name in ("height", "width", "num_frames", "num_inference_steps"):
        _check_count(name, given.get(name))
    arguments = {name: value for name, value in given.items() if name in parameters}
    if "prompt" in parameters and not {"prompt", "prompt_embeds"} & arguments.keys():
        arguments["prompt"] = DEFAULT_PROMPT
    if type(pipe).__name__ in FAIL_WITHOUT_NEGATIVE_PROMPT:
        arguments.setdefault("negative_prompt", "")
    for name in needed:
        arguments[name] = STAND_INS[name](pipe, given)
    return arguments


def resolve_call_defaults(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the effective value of every argument of ``pipe(**call)`` that decides its cost.

    The pipeline's own code says what it makes of ``None``: its ``__call__`` is run up to the first
    of its methods that it calls, and its local variables are read there.
    """
    parameters = _parameters(pipe)
    values = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    values.update(call)
    found = _locals_at_start(pipe, call)
    unsaid = [name for name in SHOWN_ARGUMENTS if name in values and values[name] is None]
    values.update({name: found.get(name) for name in unsaid})
    picture = next((v for v in call.values() if isinstance(v, Image.Image)), None)
    for side, px in zip(
        ("width", "height"), picture.size if picture else (None, None), strict=True
    ):
        if side in parameters and values[side] is None:
            values[side] = px or _side_px(pipe, call, side)
    return {name: values[name] for name in SHOWN_ARGUMENTS if values.get(name) is not None}


def _parameters(pipe: Any) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(type(pipe).__call__).parameters
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {n: p for n, p in list(parameters.items())[1:] if p.kind not in variable}


def _check_count(name: str, value: Any) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InvalidRequest(f"{name} is {value!r}: give a whole number above 0.")


# -- what a pipeline cannot do without


def _needed(
    pipe: Any, parameters: Mapping[str, inspect.Parameter], given: Mapping[str, Any]
) -> list[str]:
    """Return the arguments to make up: without a default, or without which the call is empty.

    diffusers gives ``None`` as the default of most pictures, needed or not. They are needed by
    pipelines that have a ``controlnet`` or an ``adapter``, and by those that start from a picture,
    which is what a ``strength`` is for; unless there is a choice of conditions, all of them
    optional.
    """
    has_strength = "strength" in parameters and "conditions" not in parameters
    has_controlnet = getattr(pipe, "controlnet", None) is not None
    has_control = has_controlnet or getattr(pipe, "adapter", None) is not None
    starts_from_it = has_strength or type(pipe).__name__ in EDIT_A_PICTURE
    wanted = {
        "image": starts_from_it or (has_control and "control_image" not in parameters),
        "video": has_strength and "image" not in parameters,
        "control_image": True,
        "control_video": True,
        "conditioning_frames": has_controlnet,
        "mask_image": True,
    }
    return [
        name
        for name, parameter in parameters.items()
        if name in STAND_INS
        and given.get(name) is None
        and (parameter.default is parameter.empty or wanted.get(name, False))
    ]


def _picture(pipe: Any, given: Mapping[str, Any]) -> Image.Image:
    size = (_side_px(pipe, given, "width"), _side_px(pipe, given, "height"))
    return Image.new(_picture_mode(pipe), size)


def _picture_mode(pipe: Any) -> str:
    """Return Pillow's name for the channels of a picture: adapters take edges in one channel, the
    VAE of layered pictures takes their transparency as well."""
    adapter, vae = getattr(pipe, "adapter", None), getattr(pipe, "vae", None)
    if adapter is not None and adapter.config.in_channels == 1:
        return "L"
    return "RGBA" if vae is not None and getattr(vae.config, "input_channels", 3) == 4 else "RGB"


def _mask(pipe: Any, given: Mapping[str, Any]) -> Image.Image:
    picture = _picture(pipe, given)
    return Image.new("L", picture.size, 255)


def _frames(pipe: Any, given: Mapping[str, Any]) -> list[Image.Image]:
    parameter = _parameters(pipe).get("num_frames")
    default = None if parameter is None else parameter.default
    return [_picture(pipe, given)] * (given.get("num_frames") or default or DEFAULT_NUM_FRAMES)


def _side_px(pipe: Any, given: Mapping[str, Any], side: str) -> int:
    """Return the height or width of the call's output."""
    if given.get(side):
        return int(given[side])
    parameter = _parameters(pipe).get(side)
    if parameter is not None and isinstance(parameter.default, int):
        return parameter.default
    latents = getattr(pipe, "default_sample_size", None)
    latents = latents or getattr(_denoiser(pipe).config, "sample_size", None)
    if isinstance(latents, (list, tuple)):
        latents = latents[0 if side == "height" else -1]
    scale = getattr(pipe, "vae_scale_factor", None)
    return int(latents * scale) if latents and scale else DEFAULT_PICTURE_PX


def _denoiser(pipe: Any) -> Any:
    names = ("transformer", "unet", "decoder", "prior")
    return next(c for n in names if (c := getattr(pipe, n, None)) is not None)


def _image_embedding(pipe: Any, given: Mapping[str, Any]) -> torch.Tensor:
    """One embedding of a picture, as a prior makes it."""
    denoiser = _denoiser(pipe)
    return torch.zeros(1, denoiser.config.encoder_hid_dim, dtype=denoiser.dtype)


def _image_latents(pipe: Any, given: Mapping[str, Any]) -> torch.Tensor:
    """The small latents that Stable Cascade's prior makes: ``latent_dim_scale`` times below."""
    denoiser = _denoiser(pipe)
    below = pipe.config.latent_dim_scale * LATENTS_OF_PICTURE
    sides = [math.ceil(_side_px(pipe, given, side) / below) for side in ("height", "width")]
    return torch.zeros(1, denoiser.config.effnet_in_channels, *sides, dtype=denoiser.dtype)


STAND_INS: Mapping[str, Callable[[Any, Mapping[str, Any]], Any]] = {
    "image": _picture,
    "control_image": _picture,
    "mask_image": _mask,
    "video": _frames,
    "control_video": _frames,
    "conditioning_frames": _frames,
    "image_embeds": _image_embedding,
    "negative_image_embeds": _image_embedding,
    "image_embeddings": _image_latents,
}
"""Argument -> how to make one of the size of the call."""


# -- what the pipeline makes of its arguments


class _Stopped(BaseException):
    """Raised where a pipeline's ``__call__`` leaves its own code for the first time.

    Not an ``Exception``, so that no handler of the pipeline takes it.
    """


def _locals_at_start(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the local variables of ``__call__`` once it has filled in its defaults."""

    def stop(*_: Any, **__: Any) -> None:
        raise _Stopped

    twin = copy.copy(pipe)
    for name, value in vars(pipe).items():
        if isinstance(value, DiffusionPipeline):  # what it is combined of
            twin.__dict__[name] = stop
    own_classes = type(pipe).__mro__[: type(pipe).__mro__.index(DiffusionPipeline)]
    for cls in own_classes:
        for name, member in vars(cls).items():
            if inspect.isfunction(member) and not name.startswith("__"):
                twin.__dict__[name] = stop
    twin.__dict__["check_inputs"] = lambda *_, **__: None  # it comes before the defaults or after
    code = inspect.unwrap(type(pipe).__call__).__code__
    try:
        twin(**call)
    except _Stopped as stopped:
        trace = stopped.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code is code:
                return dict(trace.tb_frame.f_locals)
            trace = trace.tb_next
    except (TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError):
        return {}  # a call that does not run is reported when it is executed
    return {}
