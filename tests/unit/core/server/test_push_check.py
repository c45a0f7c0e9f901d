from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd.errors import PushRefusedError
from psgd_workers.messages import BatchId, Encoded, Gradient, Version
from tests.support.jobs import GRID, START, job, push

V0 = Version(1, 0)
FIRST = BatchId(0, 0, 0)
WHOLE = Partition(0, 0, len(START), len(START))
GOOD = push(FIRST, V0)
FOREIGN: dict[str, Gradient] = {
    "an epoch too far ahead": GOOD._replace(batch=BatchId(2, 0, 0)),
    "a shard that does not exist": GOOD._replace(batch=BatchId(0, 2, 0)),
    "a batch before the first": GOOD._replace(batch=BatchId(0, 0, -1)),
    "no examples": GOOD._replace(examples=0),
    "a negative norm": GOOD._replace(norm=-1.0),
    "an endless computation": GOOD._replace(compute_s=float("inf")),
    "too many values": GOOD._replace(values=np.ones(len(START) + 1, np.float32)),
    "values of another type": GOOD._replace(values=np.ones(len(START))),  # type: ignore[arg-type]
    "an encoding that does not exist": GOOD._replace(values=Encoded("zip", len(START), ())),
    "an encoding that does not fit": GOOD._replace(values=Encoded("fp16", len(START), (np.ones(2, np.float16),))),
}


def server(**sections: Any) -> ParameterServer:
    return ParameterServer(job(**sections), WHOLE, START, GRID, V0)


@pytest.mark.parametrize("gradient", FOREIGN.values(), ids=FOREIGN)
def test_a_push_that_is_not_of_this_partition_is_refused_and_changes_nothing(gradient: Gradient) -> None:
    target = server()
    untouched = server()
    target.check(GOOD)
    with pytest.raises(PushRefusedError):
        target.check(gradient)
    assert target.report() == untouched.report()
    before = untouched.state()
    after = target.state()
    assert before.metadata == after.metadata
    assert all(np.array_equal(array, after.arrays[name]) for name, array in before.arrays.items())


@pytest.mark.parametrize(
    ("strange", "reason"),
    [
        ({"number": 0}, "number 0 of slot 0"),
        ({"number": 1 << 64}, "number 18446744073709551616"),
        ({"slot": 256}, "slot 256"),
        ({"slot": -1}, "slot -1"),
        ({"carries": 1}, "carries on 1"),
        ({"carries": -1}, "carries on -1"),
        ({"read": Version(1, -1)}, "expected the versions of 2 partitions"),
        ({"read": Version(1 << 32, 0)}, "expected the versions of 2 partitions"),
        ({"others": ()}, "expected the versions of 2 partitions"),
        ({"others": (V0, V0)}, "expected the versions of 2 partitions"),
        ({"others": (Version(1, 1 << 64),)}, "expected the versions of 2 partitions"),
    ],
    ids=str,
)
def test_a_push_that_the_journal_cannot_hold_is_refused_and_changes_nothing(strange: Any, reason: str) -> None:
    target = server(scaling={"servers": 2})
    gradient = GOOD._replace(others=(V0,))
    target.check(gradient)
    with pytest.raises(PushRefusedError, match=reason):
        target.check(gradient._replace(**strange))
    assert len(target.journal) == 0
