"""What a pipeline returned, written and read back."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from diffusers.pipelines.pipeline_utils import AudioPipelineOutput
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from PIL import Image

from pipefit.errors import InvalidRequest
from pipefit.planner.output import default_suffix, write_output

PICTURE = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))


def test_one_picture_is_one_file(tmp_path: Path) -> None:
    output = FluxPipelineOutput(images=[PICTURE])
    [file] = write_output(output, tmp_path / "out.png")
    with Image.open(file) as read:
        assert np.array_equal(np.asarray(read), np.asarray(PICTURE))
    assert default_suffix(output) == ".png"


def test_several_pictures_are_numbered(tmp_path: Path) -> None:
    files = write_output(FluxPipelineOutput(images=[PICTURE, PICTURE]), tmp_path / "out.png")
    assert [file.name for file in files] == ["out-0.png", "out-1.png"]
    assert all(file.exists() for file in files)


def test_a_batch_of_tensors_becomes_pictures(tmp_path: Path) -> None:
    [file] = write_output(FluxPipelineOutput(images=torch.ones(1, 3, 4, 6)), tmp_path / "out.png")
    with Image.open(file) as read:
        assert read.size == (6, 4)
        assert np.asarray(read).min() == 255


def test_frames_become_a_gif(tmp_path: Path) -> None:
    frames = np.linspace(0, 1, 1 * 5 * 8 * 8 * 3).reshape(1, 5, 8, 8, 3)
    [file] = write_output(WanPipelineOutput(frames=frames), tmp_path / "out.gif")
    with Image.open(file) as read:
        assert read.n_frames == 5


def test_sound_becomes_a_wav_at_its_rate(tmp_path: Path) -> None:
    sound = np.stack([np.linspace(-1, 1, 100), np.zeros(100)])[None]
    output = AudioPipelineOutput(audios=sound)
    [file] = write_output(output, tmp_path / "out.wav", sample_hz=44_100)
    with wave.open(str(file)) as read:
        assert (read.getnchannels(), read.getframerate(), read.getnframes()) == (2, 44_100, 100)


def test_arrays_take_anything(tmp_path: Path) -> None:
    output = WanPipelineOutput(frames=torch.ones(2, 3, dtype=torch.bfloat16))
    [file] = write_output(output, tmp_path / "out.npz")
    assert np.array_equal(np.load(file)["frames"], np.ones((2, 3)))


@pytest.mark.parametrize("name", ["out", "out.txt", "out.wav"])
def test_a_file_that_cannot_hold_the_result_is_refused(name, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="file"):
        write_output(FluxPipelineOutput(images=[PICTURE]), tmp_path / name)
    assert not list(tmp_path.iterdir())
