from __future__ import annotations

import gc
import weakref
from functools import partial

import numpy as np
import pytest

from psgd.core.server.epoch_weights import KEPT_EPOCHS, EpochWeights
from psgd.errors import WeightsNotKeptError
from psgd_workers.messages import FloatArray


def weights_after(epochs: int) -> FloatArray:
    return np.full(3, epochs, np.float32)


def test_the_newest_ends_are_kept_and_older_ones_are_dropped() -> None:
    kept = EpochWeights()
    for epochs in range(1, 6):
        kept.keep(epochs, partial(weights_after, epochs))
        assert kept.newest == epochs
    for epochs in range(6 - KEPT_EPOCHS, 6):
        np.testing.assert_array_equal(kept.at(epochs), weights_after(epochs))
    with pytest.raises(WeightsNotKeptError, match=r"the weights after 3 epochs are not kept; epochs kept: 4, 5 \("):
        kept.at(5 - KEPT_EPOCHS)


def test_ends_may_be_skipped() -> None:
    """A batch may complete two epochs at once, if the later one was complete but for the earlier one."""
    kept = EpochWeights()
    for epochs in (1, 3):
        kept.keep(epochs, partial(weights_after, epochs))
    np.testing.assert_array_equal(kept.at(1), weights_after(1))
    with pytest.raises(WeightsNotKeptError, match="epochs kept: 1, 3"):
        kept.at(2)


def test_ends_before_the_server_began_are_not_kept() -> None:
    kept = EpochWeights(4)
    assert kept.newest == 4
    with pytest.raises(WeightsNotKeptError, match="epochs kept: none"):
        kept.at(4)


def test_what_is_returned_is_a_copy() -> None:
    kept = EpochWeights()
    kept.keep(1, partial(weights_after, 1))
    kept.at(1)[:] = 0
    np.testing.assert_array_equal(kept.at(1), weights_after(1))


def test_the_oldest_copy_is_dropped_before_another_is_made() -> None:
    kept = EpochWeights()
    copies: list[weakref.ref[FloatArray]] = []

    def copy() -> FloatArray:
        gc.collect()
        assert sum(one() is not None for one in copies) < KEPT_EPOCHS
        made = weights_after(len(copies))
        copies.append(weakref.ref(made))
        return made

    for epochs in range(1, 6):
        kept.keep(epochs, copy)
    assert len(copies) == 5
