"""Tests of the bare server and its workers."""

from __future__ import annotations

import numpy as np
import pytest

from psgd_workers.transport.lane import LaneKind
from tests.benchmarks.bare import VALUE, BareServer, BareWorker, Mark


def test_a_difference_of_marks_has_a_rate_and_a_cost() -> None:
    done = Mark(12.0, 3.5, 5000).since(Mark(10.0, 3.0, 1000))
    assert done == Mark(2.0, 0.5, 4000)
    assert (done.rate, done.cpu_us) == (2000, 125)


@pytest.mark.parametrize("kind", ["shm", "tcp"])
def test_every_push_is_applied_and_answered_with_the_weights(kind: LaneKind) -> None:
    with BareServer(1000, workers=2) as server:
        workers = [BareWorker(kind, rank, 1000, server.address) for rank in range(2)]
        for _ in range(5):
            for worker in workers:
                worker.push()
        done = server.mark()
        for worker in workers:
            worker.close()
    assert done.applied == 10
    np.testing.assert_allclose(workers[1].slot.weights, -10 * 0.1 * VALUE, rtol=1e-5)
