"""Partitions: the slices of the weights, one for each server."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from psgd.errors import SpecError
from psgd_workers.counting import counted

__all__ = ["Partition", "partition_weights"]

LINE = 16  # float32 values in a cache line of 64 bytes: two servers on one node must not write to the same line


class Partition(NamedTuple):
    """The slice of the weights that one server holds."""

    number: int  # from 0
    start: int  # first value of the slice, as an index into the flat weights
    stop: int  # one past the last value
    num_trainable: int  # values of the slice before the first buffer


def partition_weights(num_parameters: int, num_trainable: int, servers: int) -> tuple[Partition, ...]:
    """Cut the weights into contiguous slices of about the same number of bytes.

    Sizes differ by at most 16 values. Inner boundaries are multiples of 16 if every server gets at least 16 values.

    Args:
        num_parameters: length of the flat weights.
        num_trainable: number of values before the first buffer.
        servers: number of slices.

    Raises:
        SpecError: the model has fewer values than there are servers.

    Example:
        >>> [(part.start, part.stop) for part in partition_weights(100, 100, servers=3)]
        [(0, 32), (32, 64), (64, 100)]
    """
    if num_parameters < servers:
        raise SpecError(
            f"scaling.servers is {servers}, but the model has {counted(num_parameters, 'parameter')}, and every "
            f"server needs at least one: set scaling.servers to {num_parameters} or less"
        )
    unit = LINE if num_parameters >= LINE * servers else 1
    units, more = divmod(num_parameters // unit, servers)  # the first `more` slices get a unit more
    inner = [unit * (number * units + min(number, more)) for number in range(servers)]
    bounds = pairwise([*inner, num_parameters])
    return tuple(
        Partition(number, start, stop, max(0, min(stop, num_trainable) - start))
        for number, (start, stop) in enumerate(bounds)
    )
