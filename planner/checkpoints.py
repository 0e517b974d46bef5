"""What components are read from, and what shards of it would change about RAM and disk.

``sharded_checkpoint`` is for RAM while the weights are read, of which the search knows nothing: so
it is no candidate, but asked for by a plan as a whole, where a budget of RAM, or what is available,
cannot be kept otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from pipefit.cost_models.host_memory import (
    LOADING_PROCESS_BYTES,
    Checkpoint,
    host_peak,
    unmapped_bytes,
)
from pipefit.cost_models.machine import Host
from pipefit.cost_models.units import format_bytes, format_seconds
from pipefit.cost_models.workload import Workload
from pipefit.planner.policy import Policy
from pipefit.planner.trace_cache import checkpoints_folder
from pipefit.strategies.sharded_checkpoint import checkpoint_of, shard_bytes
from pipefit.strategies.strategy import Option

SHARDED_CHECKPOINT = "sharded_checkpoint"


def shards_option(workload: Workload, policy: Policy, host: Host | None) -> Option | None:
    """Return the option where it is asked for, or where the RAM cannot do without it.

    Without a budget that is what is available on *host*; None: as much as it takes.
    """
    asked = next((o for o in policy.required if o.strategy == SHARDED_CHECKPOINT), None)
    option = asked or Option(strategy=SHARDED_CHECKPOINT)
    if asked is None and not _is_needed(workload, option, _room_bytes(policy, host)):
        return None
    return replace(option, reason=_reason(workload, option))


def checkpoints(workload: Workload, options: Sequence[Option]) -> dict[str, Checkpoint]:
    """Return what components are read from, as far as it is known, under *options*."""
    found = {c.name: checkpoint for c in workload.components if (checkpoint := checkpoint_of(c))}
    for most_bytes in _shard_sizes(options):
        for name in sharded(workload, most_bytes):
            found[name] = found[name].in_shards(most_bytes)
    return found


def rewriting_bytes(workload: Workload, options: Sequence[Option]) -> int:
    """Return the most that rewriting checkpoints takes: a shard, or a file that is read whole."""
    needed_bytes = 0
    for most_bytes in _shard_sizes(options):
        for checkpoint in sharded(workload, most_bytes).values():
            # Beside the pages that are read, the bytes of what is being written: part of one file.
            needed_bytes = max(needed_bytes, 2 * min(most_bytes, max(checkpoint.file_bytes)))
            if checkpoint.is_read_whole:
                whole_bytes = max(checkpoint.file_bytes)
                needed_bytes = max(needed_bytes, whole_bytes + min(most_bytes, whole_bytes))
    return needed_bytes


def rewritten_bytes(workload: Workload, options: Sequence[Option]) -> int:
    """Return the size of the checkpoints that are rewritten in shards."""
    return sum(
        sum(checkpoint.file_bytes)
        for most_bytes in _shard_sizes(options)
        for checkpoint in sharded(workload, most_bytes).values()
    )


def rewriting_notes(
    workload: Workload, options: Sequence[Option], disk_bytes_per_s: float
) -> tuple[str, ...]:
    """Return what a reader of a plan should know of the shards that are written."""
    num_bytes = rewritten_bytes(workload, options)
    if not num_bytes:
        return ()
    return (
        f"{format_bytes(num_bytes)} of weights are rewritten in shards before they are loaded, "
        f"about {format_seconds(2 * num_bytes / disk_bytes_per_s)} of reading and writing unless "
        f"an earlier load did it; they stay in {checkpoints_folder()} for the next load, also "
        "after undo(), until `pipefit cache --clear`.",
    )


def sharded(workload: Workload, most_bytes: int) -> dict[str, Checkpoint]:
    """Return what components are read from that take less RAM from shards of *most_bytes*."""
    return {
        c.name: checkpoint
        for c in workload.components
        if (checkpoint := checkpoint_of(c)) and checkpoint.gains_from(most_bytes, c.library)
    }


def _shard_sizes(options: Sequence[Option]) -> list[int]:
    return [shard_bytes(o.parameters) for o in options if o.strategy == SHARDED_CHECKPOINT]


def _room_bytes(policy: Policy, host: Host | None) -> float:
    """Return what loading may take beside the process."""
    if policy.ram_bytes is not None:
        total_bytes = math.inf if host is None else host.total_bytes
        return min(policy.ram_bytes, total_bytes) - LOADING_PROCESS_BYTES
    # What is available has the process taken off already.
    return math.inf if host is None else host.available_bytes


def _is_needed(workload: Workload, option: Option, room_bytes: float) -> bool:
    """Whether loading exceeds the room by files that are read whole, and shards keep it."""
    before, after = (
        unmapped_bytes(workload.components, checkpoints(workload, options))
        for options in ([], [option])
    )
    after = max(after, rewriting_bytes(workload, [option]))
    return after <= room_bytes < before


def _reason(workload: Workload, option: Option) -> str:
    """Say what loading takes without shards and with them."""
    (before, kept_before), (after, kept_after) = (
        (
            host_peak(
                workload.components,
                {},
                (),
                checkpoints=checkpoints(workload, options),
                rewriting_bytes=rewriting_bytes(workload, options),
            ).load_bytes
            - LOADING_PROCESS_BYTES,
            unmapped_bytes(workload.components, checkpoints(workload, options)),
        )
        for options in ([], [option])
    )
    return (
        f"Reading the weights takes {format_bytes(after)} of RAM instead of {format_bytes(before)},"
        f" of which {format_bytes(kept_after)} and not {format_bytes(kept_before)} are no pages of "
        "files."
    )
