"""Layouts of operators that decoders are made of, against real tensors of one and two images.

The CPU stands for CUDA where both share their kernel's choice of layout; where CUDA differs, a test
below says how.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pipefit.planner.virtual import Observer, VirtualMachine
from pipefit.planner.virtual_layouts import suggests_channels_last

F = torch.nn.functional
GPU = torch.device("cuda", 0)
LAST, LAST_3D = torch.channels_last, torch.channels_last_3d

Place = Callable[[torch.Tensor], torch.Tensor]
"""Puts an operand where the tensor under test is: on the virtual GPU, or nowhere."""


def seen_from_rows(x: torch.Tensor) -> torch.Tensor:
    """What attention returns: (N, HW, C) as (N, C, H, W), for N = 1 with an odd batch stride."""
    n, c, *sizes = x.shape
    return x.reshape(n, c, -1).transpose(1, 2).contiguous().transpose(1, 2).reshape(n, c, *sizes)


PICTURES: dict[str, Callable[[int], torch.Tensor]] = {
    "contiguous": lambda n: torch.ones(n, 8, 6, 10),
    "channels_last": lambda n: torch.ones(n, 8, 6, 10).to(memory_format=LAST),
    "rows": lambda n: seen_from_rows(torch.ones(n, 8, 6, 10)),
    "chunk": lambda n: torch.ones(n, 16, 6, 10).chunk(2, 1)[1],
    "chunk_last": lambda n: torch.ones(n, 16, 6, 10).to(memory_format=LAST).chunk(2, 1)[1],
    "tile": lambda n: torch.ones(n, 8, 12, 10)[:, :, 3:9],
    "tile_last": lambda n: torch.ones(n, 8, 12, 10).to(memory_format=LAST)[:, :, 3:9],
    "expanded": lambda n: torch.ones(n, 1, 6, 10).expand(n, 8, 6, 10),
}
VIDEOS: dict[str, Callable[[int], torch.Tensor]] = {
    "contiguous": lambda n: torch.ones(n, 8, 3, 6, 10),
    "channels_last": lambda n: torch.ones(n, 8, 3, 6, 10).to(memory_format=LAST_3D),
    "rows": lambda n: seen_from_rows(torch.ones(n, 8, 3, 6, 10)),
    "frames": lambda n: torch.ones(n, 8, 5, 6, 10)[:, :, 1:4],
    "last_frame": lambda n: torch.ones(n, 8, 5, 6, 10)[:, :, -1:],
    "from_frames": lambda n: torch.ones(n, 3, 8, 6, 10).permute(0, 2, 1, 3, 4),
}
ANY: dict[str, Callable[[torch.Tensor, Place], torch.Tensor]] = {
    "joined": lambda x, place: torch.cat([x, x], 1),
    "joined with another": lambda x, place: torch.cat([x, place(torch.ones(*x.shape))], 1),
    "joined to another": lambda x, place: torch.cat([place(torch.ones(*x.shape)), x], 1),
    "plus another": lambda x, place: x + place(torch.ones(*x.shape)),
    "minus its first": lambda x, place: x - x[:, :1],
    "where": lambda x, place: torch.where(x > 0, x, 0.0),
    "in place": lambda x, place: F.silu(x.clone(), inplace=True),
    "to half": lambda x, place: x.half(),
    "there and back": lambda x, place: x.half().float(),
    "flattened": lambda x, place: x.flatten(2),
    "normalised": lambda x, place: F.normalize(x, dim=1),
    "repeated": lambda x, place: x.repeat_interleave(2, 1),
    "softmax": lambda x, place: x.softmax(1),
    "layer norm": lambda x, place: F.layer_norm(x.movedim(1, -1), (x.shape[1],)),
    "noise": lambda x, place: torch.randn_like(x),
    "filled": lambda x, place: torch.full_like(x, 1),
    "flipped": lambda x, place: x.flip(2),
    "to channels_last": lambda x, place: x.to(memory_format=LAST if x.dim() == 4 else LAST_3D),
    "upsampled": lambda x, place: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    "tokens": lambda x, place: x.flatten(2).transpose(1, 2) * 2,
    "back from tokens": lambda x, place: (
        (x.flatten(2).transpose(1, 2) + 1).transpose(1, 2).reshape(x.shape) + x
    ),
}
OF_PICTURES: dict[str, Callable[[torch.Tensor, Place], torch.Tensor]] = {
    "convolved": lambda x, place: F.conv2d(x, place(torch.ones(4, 8, 3, 3))),
    "convolved in channels_last": lambda x, place: F.conv2d(
        x, place(torch.ones(4, 8, 3, 3).to(memory_format=LAST))
    ),
    "convolved by one": lambda x, place: F.conv2d(x, place(torch.ones(4, 8, 1, 1))),
    "transposed": lambda x, place: F.conv_transpose2d(x, place(torch.ones(8, 4, 2, 2)), stride=2),
    "padded": lambda x, place: F.pad(x, (0, 1, 0, 1)),
    "modulated": lambda x, place: x * place(torch.ones(1, 8, 1, 1)) + 1,
    "bilinear": lambda x, place: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "pooled": lambda x, place: F.avg_pool2d(x, 2),
}
OF_VIDEOS: dict[str, Callable[[torch.Tensor, Place], torch.Tensor]] = {
    "padded": lambda x, place: F.pad(x, (1, 1, 1, 1, 2, 0)),
    "after its cache": lambda x, place: torch.cat([place(torch.ones(*x.shape)), x], 2),
    "as frames": lambda x, place: x.permute(0, 2, 1, 3, 4).flatten(0, 1),
}


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(
    ("make", "operate"),
    [
        pytest.param(make, operate, id=f"{dims} dims {layout} {name}")
        for dims, layouts, special in ((4, PICTURES, OF_PICTURES), (5, VIDEOS, OF_VIDEOS))
        for layout, make in layouts.items()
        for name, operate in {**ANY, **special}.items()
    ],
)
def test_a_result_lies_as_a_real_one(
    make: Callable[[int], torch.Tensor],
    operate: Callable[[torch.Tensor, Place], torch.Tensor],
    images: int,
) -> None:
    real = make(images)
    wanted = operate(real, lambda tensor: tensor)
    with VirtualMachine(Observer()) as machine, torch.no_grad():

        def place(tensor: torch.Tensor) -> torch.Tensor:
            store = machine.empty((tensor.untyped_storage().nbytes(),), (1,), torch.uint8, GPU)
            return store.view(tensor.dtype).as_strided(
                tensor.size(), tensor.stride(), tensor.storage_offset()
            )

        got = operate(place(real), place)
        assert (got.size(), got.stride()) == (wanted.size(), wanted.stride())


@pytest.mark.parametrize("images", [1, 2])
def test_group_norm_goes_on_in_nchw(images: int) -> None:
    """Only the CPU keeps channels_last; CUDA copies the input and returns it contiguous."""
    with VirtualMachine(Observer()), torch.no_grad():
        x = torch.ones(images, 8, 6, 10, device=GPU).to(memory_format=LAST)
        assert F.group_norm(x, 4).is_contiguous()


def test_a_decoder_stays_in_channels_last_after_attention_for_more_than_one_image() -> None:
    """The residual stream of AutoencoderKL: what the batch stride of one image decides."""
    with VirtualMachine(Observer()), torch.no_grad():
        for images, stays in ((1, False), (4, True)):
            rows = torch.empty(images, 64, 16, device=GPU)
            attended = rows.transpose(1, 2).reshape(images, 16, 8, 8)
            stream = (attended + torch.empty(images, 16, 8, 8, device=GPU)) / 1.0
            assert suggests_channels_last(stream) == stays
            upsampled = F.interpolate(stream, scale_factor=2.0, mode="nearest")
            assert suggests_channels_last(upsampled) == stays


def test_a_pointwise_weight_is_converted_although_it_is_dense_in_both_layouts() -> None:
    real = torch.nn.Conv2d(4, 8, 1).to(memory_format=LAST).weight
    with VirtualMachine(Observer()) as machine, torch.no_grad():
        weight = machine.parameter(torch.ones(8, 4, 1, 1), GPU).to(memory_format=LAST)
        assert weight.stride() == real.stride() == (4, 1, 4, 4)
        assert suggests_channels_last(weight)
