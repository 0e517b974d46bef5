"""The allocator model against a naive one, its invariants, and counters measured on real GPUs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipefit.cost_models.allocator import Block, CachingAllocator, allocated_bytes, block_bytes
from pipefit.cost_models.units import GIB, MIB

SIZES = st.one_of(
    st.integers(0, 5000),
    st.integers(MIB - 2000, MIB + 2000),
    st.integers(1, 40 * MIB),
    st.integers(10 * MIB - 2000, 10 * MIB + 2000),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), SIZES, st.integers(0, 1)),
        st.tuples(st.just("free"), st.integers(0, 10**6), st.just(0)),
        st.tuples(st.just("empty"), st.just(0), st.just(0)),
    ),
    max_size=120,
)


@dataclass
class Piece:
    """A range of a segment in the naive model."""

    address: int
    num_bytes: int
    is_free: bool = True


class NaiveAllocator:
    """The rules written the slow way: lists of pieces, scanned from the front."""

    def __init__(self, capacity_bytes: int | None) -> None:
        self.capacity_bytes = capacity_bytes
        self.segments: list[tuple[int, bool, list[Piece]]] = []
        self.next_address = 0

    def allocate(self, num_bytes: int, stream: int) -> Piece:
        needed = block_bytes(num_bytes)
        if needed == 0:
            return Piece(-1, 0, False)
        small = needed <= MIB
        candidates = [
            (p.num_bytes, p.address, p, pieces)
            for s, is_small, pieces in self.segments
            if (s, is_small) == (stream, small)
            for p in pieces
            if p.is_free and p.num_bytes >= needed
        ]
        if candidates:
            _, _, piece, pieces = min(candidates, key=lambda c: c[:2])
        else:
            if small:
                size = 2 * MIB
            elif needed < 10 * MIB:
                size = 20 * MIB
            else:
                size = -(-needed // (2 * MIB)) * 2 * MIB
            capacity_bytes = self.capacity_bytes
            if capacity_bytes is not None and self.reserved_bytes + size > capacity_bytes:
                self.empty_cache()
            piece, pieces = Piece(self.next_address, size), []
            pieces.append(piece)
            self.next_address += size
            self.segments.append((stream, small, pieces))
        rest = piece.num_bytes - needed
        if (rest >= 512) if small else (rest > MIB):
            pieces.insert(pieces.index(piece) + 1, Piece(piece.address + needed, rest))
            piece.num_bytes = needed
        piece.is_free = False
        return piece

    def free(self, piece: Piece) -> None:
        piece.is_free = True
        for _, _, pieces in self.segments:
            place = 0
            while place + 1 < len(pieces):
                if pieces[place].is_free and pieces[place + 1].is_free:
                    pieces[place].num_bytes += pieces.pop(place + 1).num_bytes
                else:
                    place += 1

    def empty_cache(self) -> None:
        self.segments = [s for s in self.segments if not (len(s[2]) == 1 and s[2][0].is_free)]

    @property
    def allocated_bytes(self) -> int:
        return sum(p.num_bytes for _, _, ps in self.segments for p in ps if not p.is_free)

    @property
    def reserved_bytes(self) -> int:
        return sum(p.num_bytes for _, _, ps in self.segments for p in ps)


@settings(max_examples=150, deadline=None)
@given(STEPS, st.one_of(st.none(), st.integers(1, 200 * MIB)))
def test_it_equals_the_naive_model_after_every_step(
    steps: list[tuple[str, int, int]], capacity_bytes: int | None
) -> None:
    fast, naive = CachingAllocator(capacity_bytes), NaiveAllocator(capacity_bytes)
    live: list[tuple[Block, Piece]] = []
    for action, number, stream in steps:
        if action == "allocate":
            live.append((fast.allocate(number, stream), naive.allocate(number, stream)))
            assert live[-1][0].address == live[-1][1].address
        elif action == "free" and live:
            block, piece = live.pop(number % len(live))
            fast.free(block)
            naive.free(piece)
        elif action == "empty":
            fast.empty_cache()
            naive.empty_cache()
        assert fast.allocated_bytes == naive.allocated_bytes
        assert fast.reserved_bytes == naive.reserved_bytes


@settings(max_examples=100, deadline=None)
@given(STEPS)
def test_counters_keep_their_order_and_return_to_zero(steps: list[tuple[str, int, int]]) -> None:
    allocator = CachingAllocator()
    live: list[Block] = []
    for action, number, stream in steps:
        if action == "allocate":
            live.append(allocator.allocate(number, stream))
        elif action == "free" and live:
            allocator.free(live.pop(number % len(live)))
        elif action == "empty":
            allocator.empty_cache()
        assert allocator.requested_bytes <= allocator.allocated_bytes <= allocator.reserved_bytes
        assert allocator.allocated_bytes <= allocator.peak_allocated_bytes
        assert allocator.peak_allocated_bytes <= allocator.peak_reserved_bytes
    for block in live:
        allocator.free(block)
    assert allocator.allocated_bytes == allocator.requested_bytes == 0
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


def test_streams_do_not_share_cached_blocks() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(64 * MIB, stream=1))
    allocator.allocate(64 * MIB, stream=0)
    assert allocator.reserved_bytes == 128 * MIB


def test_a_rest_up_to_one_mebibyte_stays_with_its_block() -> None:
    allocator = CachingAllocator()
    allocator.allocate(19 * MIB)
    assert (allocator.requested_bytes, allocator.allocated_bytes) == (19 * MIB, 20 * MIB)


def test_cached_segments_are_given_back_before_the_capacity_is_exceeded() -> None:
    allocator = CachingAllocator(capacity_bytes=100 * MIB)
    allocator.free(allocator.allocate(60 * MIB))
    allocator.allocate(80 * MIB)
    assert allocator.reserved_bytes == 80 * MIB
    allocator.allocate(30 * MIB)
    assert allocator.reserved_bytes == 110 * MIB


def test_reset_peak_starts_from_what_is_held() -> None:
    allocator = CachingAllocator()
    held = allocator.allocate(30 * MIB)
    allocator.free(allocator.allocate(50 * MIB))
    allocator.reset_peak()
    assert allocator.peak_allocated_bytes == 30 * MIB
    assert allocator.peak_reserved_bytes == allocator.reserved_bytes == 80 * MIB
    allocator.free(held)


def test_freeing_twice_is_noticed() -> None:
    allocator = CachingAllocator()
    block = allocator.allocate(1000)
    allocator.free(block)
    with pytest.raises(ValueError, match="freed twice"):
        allocator.free(block)


def test_allocated_bytes_of_nothing_is_nothing() -> None:
    assert allocated_bytes([]) == allocated_bytes([0, 0]) == 0


@pytest.mark.slow
def test_flux_weights_reserve_what_was_measured() -> None:
    """31.438 GiB allocated and 31.447 reserved after loading FLUX.1-dev in bfloat16."""
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    t5 = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        modules = [
            AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=16,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            CLIPTextModel(clip),
            T5EncoderModel(t5),
            FluxTransformer2DModel(guidance_embeds=True),
        ]
    allocator = CachingAllocator()
    for module in modules:
        for tensor in module.to(torch.bfloat16).parameters():
            allocator.allocate(tensor.numel() * tensor.element_size())
    assert allocator.allocated_bytes / GIB == pytest.approx(31.438, abs=0.002)
    assert allocator.reserved_bytes / GIB == pytest.approx(31.447, abs=0.004)


@pytest.mark.slow
def test_sdxl_weights_take_more_blocks_than_bytes() -> None:
    """6.461 GiB of SDXL's bfloat16 weights become 6.572 allocated and 6.85 reserved."""
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    clip = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    big_clip = CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
    )
    with torch.device("meta"):
        modules = [
            AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=4,
            ),
            CLIPTextModel(clip),
            CLIPTextModelWithProjection(big_clip),
            UNet2DConditionModel(
                block_out_channels=(320, 640, 1280),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=[1, 2, 10],
                attention_head_dim=[5, 10, 20],
                cross_attention_dim=2048,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
                use_linear_projection=True,
            ),
        ]
    allocator = CachingAllocator()
    for module in modules:
        for tensor in module.to(torch.bfloat16).parameters():
            allocator.allocate(tensor.numel() * tensor.element_size())
    assert allocator.requested_bytes / GIB == pytest.approx(6.461, abs=0.002)
    assert allocator.allocated_bytes / GIB == pytest.approx(6.572, abs=0.003)
    assert allocator.reserved_bytes / GIB == pytest.approx(6.85, abs=0.01)
