"""Re-partitioning: cuts the states of some servers into the states of another number of servers.

This is possible if all partitions contain the same batches, as at an epoch's end and after a run was stopped by a
command. Then a value of the weights can move to another server together with its average, its moments and its part of
an open sum, because the counters there are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.applied import Bitmap
from psgd.core.server.partitions import Partition
from psgd.core.server.state import ServerState
from psgd_workers.messages import Outcome

__all__ = ["disagreement", "repartition"]

EQUAL = ("epochs", "samples", "counted", "aggregator", "correction", "settings", "changes")  # metadata
BITMAPS = ("settled", "skipped")  # arrays over the positions of an epoch
FULL_LENGTH = ("weights", "aggregator")  # arrays of the partition's length; the rest have one value per trained value
LASTING = (Outcome.APPLIED.value, Outcome.DISCARDED.value)  # outcomes that change the state


def disagreement(states: Sequence[ServerState]) -> str | None:
    """Return the reason why these states cannot be re-partitioned; None if they can.

    Args:
        states: states of all partitions of one checkpoint.
    """
    first = states[0]
    for state in states[1:]:
        if fault := _difference(first, state):
            parts = f"partitions {first.partition.number} and {state.partition.number}"
            return f"{parts} {fault}"
    return None


def _difference(one: ServerState, other: ServerState) -> str | None:
    if one.version.updates != other.version.updates:
        return f"made {one.version.updates} and {other.version.updates} updates"
    same_bitmaps = all(_same_bitmaps(one, other, name) for name in BITMAPS)
    if one.epochs != other.epochs or not same_bitmaps:
        return "do not contain the same batches"
    for name in EQUAL:
        if one.metadata[name] != other.metadata[name]:
            return f"differ in {name!r}"
    if any(one.metadata["pushes"].get(name, 0) != other.metadata["pushes"].get(name, 0) for name in LASTING):
        return "count their pushes differently"
    if one.arrays.keys() != other.arrays.keys():
        return f"differ in what they hold: {', '.join(sorted(one.arrays.keys() ^ other.arrays.keys()))}"
    counters = [name for name, array in one.arrays.items() if _is_counter(name, array)]
    unequal = [name for name in counters if not np.array_equal(one.arrays[name], other.arrays[name])]
    return f"differ in {', '.join(unequal)}" if unequal else None


def _same_bitmaps(one: ServerState, other: ServerState, name: str) -> bool:
    """Return True if both states have the same bitmaps; a missing bitmap counts as an empty one."""
    ours = _bitmaps(one, name)
    theirs = _bitmaps(other, name)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[epoch], theirs[epoch]) for epoch in ours)


def _bitmaps(state: ServerState, name: str) -> dict[int, Bitmap]:
    """Return epoch -> bitmap, for the bitmaps that are not empty."""
    return {epoch: bitmap for epoch, bitmap in state.bitmaps(name).items() if bitmap.any()}


def _group(name: str) -> str:
    return name.partition(".")[0]


def _is_counter(name: str, array: NDArray[Any]) -> bool:
    """Return True if an array counts something of the whole partition; arrays with a value per weight are float32."""
    return _group(name) not in BITMAPS and array.dtype != np.float32


def repartition(states: Sequence[ServerState], partition: Partition) -> ServerState:
    """Return the state of a new partition, cut from the states of the old ones.

    Its history is empty, because no version of an old partition describes all weights of the new one. No gradient is
    lost by that: workers end with their driver, so no push of an old version can arrive. Statistics that differ between
    partitions are taken from the old partition in which the new one begins.

    Args:
        states: states of all partitions of one checkpoint, without `disagreement`.
        partition: the new partition.

    Returns:
        A state whose arrays may be views of the old ones.
    """
    states = sorted(states, key=_start)
    first = max((state for state in states if _start(state) <= partition.start), key=_start)
    arrays = {}
    for name, array in first.arrays.items():
        uncut = _group(name) in BITMAPS or _is_counter(name, array)
        arrays[name] = array if uncut else _cut(name, states, partition)
    incarnation = max(state.version.incarnation for state in states)
    metadata: Mapping[str, Any] = {
        **first.metadata,
        "version": [incarnation, first.version.updates],
        "history": [],
        "partition": list(partition),
        "bytes": first.metadata["bytes"] * (partition.stop - partition.start) // len(first.arrays["weights"]),
    }
    return ServerState(arrays, metadata)


def _start(state: ServerState) -> int:
    return state.partition.start


def _cut(name: str, states: Sequence[ServerState], partition: Partition) -> NDArray[Any]:
    """Join the parts of an array that belong to the values of the partition, or to its trained values."""
    stop = partition.stop if _group(name) in FULL_LENGTH else partition.start + partition.num_trainable
    parts = []
    for state in states:
        start = _start(state)
        array = state.arrays[name]
        _, _, end, trainable = state.partition
        assert len(array) == (end - start if _group(name) in FULL_LENGTH else trainable), (name, array.shape)
        parts.append(array[max(0, partition.start - start) : max(0, stop - start)])
    return np.concatenate(parts)
