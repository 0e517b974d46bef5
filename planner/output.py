"""Writes what a pipeline returned to files: pictures, video, sound, or the bare arrays.

diffusers' outputs are dataclasses whose first field names what they hold; the suffix of the file
decides between the formats that the content allows, and ``.npz`` takes anything.
"""

from __future__ import annotations

import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers.utils
import numpy as np
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from pipefit.errors import InvalidRequest

DEFAULT_FPS = 10
"""Frames per second of a written video: the default of diffusers' own ``export_to_video``."""

DEFAULT_SAMPLE_HZ = 16_000
"""Sampling rate of a sound whose pipeline does not state one: AudioLDM2's
(https://huggingface.co/cvssp/audioldm2, vocoder/config.json, ``sampling_rate``)."""

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_SUFFIXES = (".gif", ".mp4")


def default_suffix(output: Any) -> str:
    """Return the suffix of the format that fits what the pipeline returned."""
    kind = _kind(output)
    return {"images": ".png", "frames": ".gif", "audios": ".wav"}.get(kind, ".npz")


def check_suffix(path: Path) -> None:
    """Refuse a file name whose format cannot be written, before anything runs.

    Raises:
        InvalidRequest: if it cannot.
    """
    known = (*PICTURE_SUFFIXES, *VIDEO_SUFFIXES, ".wav", ".npz")
    if path.suffix.lower() not in known:
        raise InvalidRequest(
            f"The file name {str(path)!r} does not say a format: end it in {', '.join(known)}."
        )
    utils = diffusers.utils.import_utils
    if path.suffix.lower() == ".mp4" and not (
        utils.is_opencv_available() or utils.is_imageio_available()
    ):
        raise InvalidRequest(
            "Writing .mp4 needs a video encoder: pip install imageio imageio-ffmpeg, "
            "or name a .gif or .npz file."
        )


def write_output(output: Any, path: Path, *, sample_hz: int | None = None) -> list[Path]:
    """Write what a pipeline returned and return the files; several results are numbered.

    Raises:
        InvalidRequest: if the content cannot be written in the format that the suffix names.
    """
    check_suffix(path)
    suffix, kind = path.suffix.lower(), _kind(output)
    if suffix == ".npz":
        np.savez(path, **{name: _array(value) for name, value in output.items()})
        return [path]
    if kind == "images" and suffix in PICTURE_SUFFIXES:
        return _each(_pictures(output.images), path, lambda picture, file: picture.save(file))
    if kind == "frames" and suffix in VIDEO_SUFFIXES:
        videos = [_pictures(video) for video in output.frames]
        return _each(videos, path, _write_video)
    if kind == "audios" and suffix == ".wav":
        rate_hz = sample_hz or DEFAULT_SAMPLE_HZ
        sounds = list(_array(output.audios))
        return _each(sounds, path, lambda sound, file: _write_sound(sound, file, rate_hz))
    fitting = default_suffix(output)
    raise InvalidRequest(
        f"The pipeline returned {kind}, which a {suffix} file cannot hold: "
        f"name a {fitting}{'' if fitting == '.npz' else ' or .npz'} file."
    )


def _kind(output: Any) -> str:
    return str(next(iter(output.keys())))


def _each(results: Sequence[Any], path: Path, write: Callable[[Any, Path], Any]) -> list[Path]:
    files = [path]
    if len(results) > 1:
        files = [path.with_stem(f"{path.stem}-{number}") for number in range(len(results))]
    for result, file in zip(results, files, strict=True):
        write(result, file)
    return files


def _pictures(images: Any) -> list[Image.Image]:
    """Return PIL pictures of one batch, whatever ``output_type`` was asked for."""
    if isinstance(images, Sequence) and all(isinstance(i, Image.Image) for i in images):
        return list(images)
    array = _array(images)
    if array.shape[-1] not in (1, 3, 4):
        array = np.moveaxis(array, -3, -1)
    return list(VaeImageProcessor.numpy_to_pil(array))


def _write_video(frames: Sequence[Image.Image], file: Path) -> None:
    if file.suffix.lower() == ".gif":
        diffusers.utils.export_to_gif(list(frames), str(file), fps=DEFAULT_FPS)
    else:
        diffusers.utils.export_to_video(list(frames), str(file), fps=DEFAULT_FPS)


def _write_sound(samples: np.ndarray, file: Path, sample_hz: int) -> None:
    """Write one sound, (samples,) or (channels, samples) in -1 … 1, as 16-bit PCM."""
    channels = np.atleast_2d(samples)
    pcm = (np.clip(channels.T, -1, 1) * np.iinfo(np.int16).max).astype("<i2")
    with wave.open(str(file), "wb") as sound:
        sound.setnchannels(len(channels))
        sound.setsampwidth(pcm.itemsize)
        sound.setframerate(sample_hz)
        sound.writeframes(pcm.tobytes())


def _array(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        return np.asarray(value.detach().float().cpu())
    if isinstance(value, (list, tuple)):
        return np.stack([_array(item) for item in value])
    return np.asarray(value)
