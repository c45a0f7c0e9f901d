"""How the weights are cut into partitions, one for each server."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from psgd.errors import SpecError

__all__ = ["Partition", "partition_weights"]

LINE = 16  # values in a cache line of 64 bytes, which no two servers of a node should write to


class Partition(NamedTuple):
    """Which slice of the weights a server holds."""

    number: int
    start: int
    stop: int
    num_trainable: int  # values of the slice before the first buffer


def partition_weights(num_parameters: int, num_trainable: int, servers: int) -> tuple[Partition, ...]:
    """Cut the weights into contiguous slices of about the same number of bytes.

    Sizes differ by at most 16 values. Inner boundaries are multiples of 16, where every server gets as many.

    Args:
        num_parameters: length of the flat weights.
        num_trainable: of these, how many lie before the first buffer.
        servers: how many slices.

    Raises:
        SpecError: there are fewer values than servers.

    Example:
        >>> [(part.start, part.stop) for part in split(100, 100, servers=3)]
        [(0, 32), (32, 64), (64, 100)]
    """
    if num_parameters < servers:
        raise SpecError(
            f"scaling.servers is {servers}, but the model has {num_parameters} parameters, and no server may be left "
            f"without one: set it to {num_parameters} at most"
        )
    unit = LINE if num_parameters >= LINE * servers else 1
    units, more = divmod(num_parameters // unit, servers)  # the first `more` slices get a unit more
    inner = [unit * (number * units + min(number, more)) for number in range(servers)]
    bounds = pairwise([*inner, num_parameters])
    return tuple(
        Partition(number, start, stop, max(0, min(stop, num_trainable) - start))
        for number, (start, stop) in enumerate(bounds)
    )
