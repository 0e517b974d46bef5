"""One strategy a file, listed here; imported as ``pipefit.strategies``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipefit.errors import UnknownName
from pipefit.strategies.attention import Attention
from pipefit.strategies.channels_last import ChannelsLast
from pipefit.strategies.compile import Compile
from pipefit.strategies.cudnn_benchmark import CudnnBenchmark
from pipefit.strategies.decode_chunks import DecodeChunks
from pipefit.strategies.device_map import DeviceMap
from pipefit.strategies.feed_forward_chunking import FeedForwardChunking
from pipefit.strategies.fused_qkv import FusedQkv
from pipefit.strategies.group_offload import GroupOffload
from pipefit.strategies.guidance_split import GuidanceSplit
from pipefit.strategies.jit_trace import JitTrace
from pipefit.strategies.latent_output import LatentOutput
from pipefit.strategies.layerwise_casting import LayerwiseCasting
from pipefit.strategies.model_offload import ModelOffload
from pipefit.strategies.precision import Precision
from pipefit.strategies.prompt_first import PromptFirst
from pipefit.strategies.quantization import Quantization
from pipefit.strategies.resident import Resident
from pipefit.strategies.sequential_offload import SequentialOffload
from pipefit.strategies.sharded_checkpoint import ShardedCheckpoint
from pipefit.strategies.step_cache import StepCache
from pipefit.strategies.strategy import Choosy, Option, Quality, Strategy
from pipefit.strategies.streaming import Streaming
from pipefit.strategies.text_encoder_on_cpu import TextEncoderOnCpu
from pipefit.strategies.tf32 import Tf32
from pipefit.strategies.vae_slicing import VaeSlicing
from pipefit.strategies.vae_tiling import VaeTiling

BUILT_IN: tuple[Strategy, ...] = (
    Tf32(),
    CudnnBenchmark(),
    ShardedCheckpoint(),
    PromptFirst(),
    LatentOutput(),
    Precision(),
    FusedQkv(),
    Quantization(),
    LayerwiseCasting(),
    StepCache(),
    ChannelsLast(),
    Attention(),
    FeedForwardChunking(),
    GuidanceSplit(),
    VaeSlicing(),
    VaeTiling(),
    DecodeChunks(),
    JitTrace(),
    DeviceMap(),
    GroupOffload(),
    TextEncoderOnCpu(),
    Resident(),
    Streaming(),
    ModelOffload(),
    SequentialOffload(),
    Compile(),
)
"""In the order in which they are applied: what changes tensors first, what hooks onto them last.

The device map comes before what places weights, which goes by its hooks; group offload and what is
left to the CPU before resident, so that weights leave the GPU before others arrive. To add a
strategy: a file here, a line in this tuple, a row in tests/strategies/test_contract.py, and
docs/strategies.md written anew.
"""


def strategy(name: str) -> Strategy:
    """Return the built-in strategy called *name*.

    Raises:
        UnknownName: if there is none.
    """
    for one in BUILT_IN:
        if one.name == name:
            return one
    raise UnknownName("strategy", name, (one.name for one in BUILT_IN))


def quality_of(option: Option) -> Quality:
    """Return the best level at which *option* may be used; some depend on their parameters."""
    one = strategy(option.strategy)
    if isinstance(one, (Attention, DecodeChunks, Quantization)):
        return one.quality_of(option.parameters)
    return one.quality


def conflict_of(options: Sequence[Option]) -> str | None:
    """Say which two of *options*, all on one component, rule each other out; None where none do."""
    for option in options:
        one = strategy(option.strategy)
        for other in options if isinstance(one, Choosy) else ():
            reason = one.conflict(option.parameters, other)
            if reason:
                return f"{option.strategy} cannot be used with {other.strategy}: {reason}"
    return None


def traits_of(module: Any) -> dict[str, Any]:
    """Return what all strategies together ask a live module, for ``Component.traits``."""
    return {key: value for one in BUILT_IN for key, value in one.traits(module).items()}


__all__ = ["BUILT_IN", "conflict_of", "quality_of", "strategy", "traits_of"]
