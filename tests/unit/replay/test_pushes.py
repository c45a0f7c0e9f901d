from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.journal import OUTCOMES, RECORD, RecordKind
from psgd.replay.pushes import NONE, Pushes
from psgd_workers.messages import Outcome, Version


def journal(*records: dict[str, Any]) -> NDArray[np.void]:
    """Records of incarnation 1, applied pushes unless they say otherwise."""
    made = np.zeros(len(records), RECORD)
    for row, fields in zip(made, records, strict=True):
        plain = {"kind": RecordKind.PUSH, "outcome": OUTCOMES[Outcome.APPLIED], "incarnation": 1, "read_incarnation": 1}
        for name, value in (plain | fields).items():
            row[name] = value
    return made


def pushed(worker: str, index: int, read: int = 0, updates: int = 0, **fields: Any) -> dict[str, Any]:
    return {"worker": worker, "index": index, "read_updates": read, "updates": updates, **fields}


def test_a_push_has_one_number_in_every_journal() -> None:
    join = {"kind": RecordKind.JOIN, "worker": "a"}
    pushes = Pushes(
        [
            journal(join, pushed("a", 0, read=4, loss=0.5), pushed("b", 1, read=5, loss=0.25)),
            journal(pushed("b", 1, read=6, loss=0.25), pushed("a", 0, read=7, loss=0.5)),
        ]
    )
    assert len(pushes) == 2
    assert pushes.number(0, 0) == NONE
    assert [pushes.number(0, place) for place in (1, 2)] == [pushes.number(1, place) for place in (1, 0)]
    assert pushes.reads(pushes.number(0, 1)) == (Version(1, 4), Version(1, 7))


def test_the_same_batch_again_by_the_same_worker_is_another_push() -> None:
    """The first reached one server only; the second is refused there."""
    duplicate = OUTCOMES[Outcome.DUPLICATE]
    pushes = Pushes(
        [
            journal(pushed("a", 0, read=1, loss=0.5), pushed("a", 0, read=3, loss=0.4, outcome=duplicate)),
            journal(pushed("a", 0, read=2, loss=0.4)),
        ]
    )
    first = pushes.number(0, 0)
    second = pushes.number(0, 1)
    assert pushes.number(1, 0) == second
    assert pushes.reads(first) == (Version(1, 1), None)
    assert pushes.reads(second) == (Version(1, 3), Version(1, 2))
    assert (pushes.outcome(1, first), pushes.outcome(0, second)) == (None, Outcome.DUPLICATE)


def test_pushes_alike_in_everything_keep_their_order_and_a_nan_is_itself() -> None:
    both = [pushed("a", 0, read=1, loss=np.nan), pushed("a", 0, read=2, loss=np.nan)]
    pushes = Pushes([journal(*both), journal(*both)])
    assert len(pushes) == 2
    assert [pushes.number(1, place) for place in (0, 1)] == [pushes.number(0, place) for place in (0, 1)]


def test_what_was_read_is_no_older_than_the_answer_to_the_push_before_from_the_same_slot() -> None:
    join = {"kind": RecordKind.JOIN, "worker": "a", "updates": 5}
    told = journal(*(pushed("a", index, loss=index + 1) for index in range(4)))
    other = journal(join, pushed("b", 9, updates=6), *(pushed("a", i, loss=i + 1, updates=10 + i) for i in range(3)))
    pushes = Pushes([told, other])
    torn = pushes.number(0, 3)
    assert pushes.reads(torn) == (Version(1, 0), None)
    assert pushes.oldest_read(1, torn, teller=0, pipeline=0) == Version(1, 12)
    assert pushes.oldest_read(1, torn, teller=0, pipeline=1) == Version(1, 11)
    alone = Pushes([told[:1], other[:2]])
    assert alone.oldest_read(1, alone.number(0, 0), teller=0, pipeline=0) == Version(1, 5)


def test_no_push_at_all() -> None:
    assert len(Pushes([journal(), journal()])) == 0
