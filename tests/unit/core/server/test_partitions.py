from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psgd.core.server.partitions import Partition, partition_weights
from psgd.errors import SpecError


@given(st.data(), st.integers(1, 64))
def test_slices_cover_the_weights_in_order_and_are_alike_in_size(data: st.DataObject, servers: int) -> None:
    size = data.draw(st.one_of(st.integers(servers, 20 * servers), st.integers(servers, 10**9)))
    trainable = data.draw(st.integers(0, size))
    parts = partition_weights(size, trainable, servers)
    assert [part.number for part in parts] == list(range(servers))
    assert (parts[0].start, parts[-1].stop) == (0, size)
    assert all(left.stop == right.start for left, right in pairwise(parts))
    sizes = [part.stop - part.start for part in parts]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= (16 if size >= 16 * servers else 1)
    if size >= 16 * servers:
        assert all(part.start % 16 == 0 for part in parts)
    assert sum(part.num_trainable for part in parts) == trainable
    for part in parts:
        values = range(part.start, part.stop)
        assert part.num_trainable == len(range(values.start, min(max(values.start, trainable), values.stop)))


def test_one_server_holds_everything() -> None:
    assert partition_weights(235_146, 235_000, 1) == (Partition(0, 0, 235_146, 235_000),)


def test_each_server_needs_a_value() -> None:
    assert [part.start for part in partition_weights(3, 3, 3)] == [0, 1, 2]
    with pytest.raises(SpecError, match=r"servers is 4, but the model has 3 parameters.* to 3 or less"):
        partition_weights(3, 3, 4)
