"""Re-partitioning: the states of some servers become those of another number of them, and nothing is computed anew.

That is possible while all partitions contain the same batches: then any value of the weights may move to another server
with what belongs to it (its average, its moments, its part of an open sum), and finds the same counts there. It is so
at an epoch's end, and after a run was stopped in good order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.partitions import Partition
from psgd.core.server.state import ServerState
from psgd_workers.messages import Outcome

__all__ = ["disagreement", "repartition"]

EQUAL = ("epochs", "samples", "counted", "aggregator", "correction", "settings", "changes")
SETS = ("settled", "skipped")  # of batches
OF_ALL = ("weights", "aggregator")  # a value for each of the partition's; others, for each that is trained
LASTING = (Outcome.APPLIED.value, Outcome.DISCARDED.value)  # outcomes that change the state


def disagreement(states: Sequence[ServerState]) -> str | None:
    """Why these states cannot be cut anew; None: they can.

    Args:
        states: of all partitions of one checkpoint.
    """
    first = states[0]
    for state in states[1:]:
        if fault := _difference(first, state):
            parts = f"partitions {first.metadata['partition'][0]} and {state.metadata['partition'][0]}"
            return f"{parts} {fault}"
    return None


def _difference(one: ServerState, other: ServerState) -> str | None:
    if one.metadata["version"][1] != other.metadata["version"][1]:
        return f"made {one.metadata['version'][1]} and {other.metadata['version'][1]} updates"
    if one.metadata["epochs"] != other.metadata["epochs"] or not all(_same_sets(one, other, name) for name in SETS):
        return "do not contain the same batches"
    for name in EQUAL:
        if one.metadata[name] != other.metadata[name]:
            return f"differ in {name!r}"
    if any(one.metadata["pushes"].get(name, 0) != other.metadata["pushes"].get(name, 0) for name in LASTING):
        return "count their pushes differently"
    if one.arrays.keys() != other.arrays.keys():
        return f"differ in what they hold: {', '.join(sorted(one.arrays.keys() ^ other.arrays.keys()))}"
    counts = [name for name, array in one.arrays.items() if _counts(name, array)]
    unequal = [name for name in counts if not np.array_equal(one.arrays[name], other.arrays[name])]
    return f"differ in {', '.join(unequal)}" if unequal else None


def _same_sets(one: ServerState, other: ServerState, name: str) -> bool:
    """An epoch whose bitmap is missing has none of its batches in the set."""
    mine = _sets(one, name)
    theirs = _sets(other, name)
    return mine.keys() == theirs.keys() and all(np.array_equal(mine[epoch], theirs[epoch]) for epoch in mine)


def _sets(state: ServerState, name: str) -> dict[str, NDArray[Any]]:
    return {epoch: bitmap for epoch, bitmap in state.part(name).items() if bitmap.any()}


def _group(name: str) -> str:
    return name.partition(".")[0]


def _counts(name: str, array: NDArray[Any]) -> bool:
    """Whether an array counts something of the whole partition: what has a value for each weight is float32."""
    return _group(name) not in SETS and array.dtype != np.float32


def repartition(states: Sequence[ServerState], partition: Partition) -> ServerState:
    """The state of one partition, made of those of others.

    Its history is empty. What a worker read before, it read of partitions that are no more: no version of theirs names
    an ancestor of all of this one's weights. Nothing is lost, as no worker outlives its driver.

    Statistics that are not the same everywhere are those of the partition in which the new one begins.

    Args:
        states: of all partitions of one checkpoint; there is no `disagreement`.
        partition: the new one.

    Returns:
        Arrays may be views of the old ones.
    """
    states = sorted(states, key=lambda state: int(state.metadata["partition"][1]))
    begins = max((state for state in states if state.metadata["partition"][1] <= partition.start), key=_start)
    arrays = {}
    for name, array in begins.arrays.items():
        copied = _group(name) in SETS or _counts(name, array)
        arrays[name] = array if copied else _cut(name, states, partition)
    incarnation = max(state.metadata["version"][0] for state in states)
    metadata: Mapping[str, Any] = {
        **begins.metadata,
        "version": [incarnation, begins.metadata["version"][1]],
        "history": [],
        "partition": list(partition),
        "bytes": begins.metadata["bytes"] * (partition.stop - partition.start) // len(begins.arrays["weights"]),
    }
    return ServerState(arrays, metadata)


def _start(state: ServerState) -> int:
    start: int = state.metadata["partition"][1]
    return start


def _cut(name: str, states: Sequence[ServerState], partition: Partition) -> NDArray[Any]:
    """The values from the partition's first to its last, or to its last one that is trained."""
    stop = partition.stop if _group(name) in OF_ALL else partition.start + partition.num_trainable
    parts = []
    for state in states:
        start = _start(state)
        array = state.arrays[name]
        _, _, end, trainable = state.metadata["partition"]
        assert len(array) == (end - start if _group(name) in OF_ALL else trainable), (name, array.shape)
        parts.append(array[max(0, partition.start - start) : max(0, stop - start)])
    return np.concatenate(parts)
