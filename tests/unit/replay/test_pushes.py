from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from psgd.core.server.journal import OUTCOMES, RecordKind, record_type
from psgd.errors import JournalError
from psgd.replay.lineage import IncarnationJournal, Segment
from psgd.replay.pushes import NO_PUSH, Pushes
from psgd_workers.messages import Outcome, Version


def journal(*records: dict[str, Any], partitions: int = 2) -> NDArray[np.void]:
    """Return records of incarnation 1. They are applied pushes unless their fields say otherwise."""
    made = np.zeros(len(records), record_type(partitions))
    for row, fields in zip(made, records, strict=True):
        plain = {"kind": RecordKind.PUSH, "outcome": OUTCOMES[Outcome.APPLIED], "incarnation": 1, "read_incarnation": 1}
        for name, value in (plain | fields).items():
            row[name] = value
    return made


def pushed(worker: str, number: int, read: int, *others: int, **fields: Any) -> dict[str, Any]:
    """Return the fields of a push.

    Args:
        worker: name of the worker.
        number: number of the push in its slot.
        read: number of updates of the server that the gradient was computed from.
        others: the same for the other servers.
        fields: further fields.
    """
    push = {"worker": worker, "number": number, "read_updates": read, **fields}
    return push | ({"others": [(1, updates) for updates in others]} if others else {})


def incarnation(records: NDArray[np.void], session: int = 1) -> IncarnationJournal:
    return IncarnationJournal(session, session, None, None, (Segment(f"000000-{session}", True, records),))


def pushes(*journals: NDArray[np.void]) -> Pushes:
    return Pushes([[incarnation(records)] for records in journals])


def test_a_push_has_one_number_in_every_journal_and_the_versions_of_all_partitions() -> None:
    join = {"kind": RecordKind.JOIN, "worker": "a"}
    made = pushes(
        journal(join, pushed("a", 1, 4, 7), pushed("b", 1, 5, 6)),
        journal(pushed("b", 1, 6, 5), pushed("a", 1, 7, 4)),
    )
    assert len(made) == 2
    assert made.push_of(0, 0) == NO_PUSH
    assert [made.push_of(0, place) for place in (1, 2)] == [made.push_of(1, place) for place in (1, 0)]
    assert made.reads(made.push_of(0, 1)) == (Version(1, 4), Version(1, 7))


def test_a_push_in_one_journal_alone_tells_what_it_read_of_all_partitions() -> None:
    alone = [journal(pushed("a", n, 10 * n, 1, 2), partitions=3) for n in (1, 2, 3)]
    made = pushes(*alone)
    reads = [[version.updates for version in made.reads(made.push_of(partition, 0))] for partition in range(3)]
    assert reads == [[10, 1, 2], [1, 20, 2], [1, 2, 30]]


def test_slot_number_and_session_tell_pushes_of_one_batch_apart() -> None:
    records = journal(pushed("a", 1, 3), pushed("a", 2, 3), pushed("a", 1, 3, slot=1), partitions=1)
    made = Pushes([[incarnation(records), incarnation(records[:1], session=2)]])
    assert len({made.push_of(0, place) for place in range(4)}) == 4


def test_only_what_was_taken_has_a_number() -> None:
    """A push that one server refused may have been used by the other one."""
    refused = [OUTCOMES[outcome] for outcome in Outcome if outcome not in (Outcome.APPLIED, Outcome.BUFFERED)]
    made = pushes(
        journal(*(pushed("a", n, 1, 1, outcome=code) for n, code in enumerate(refused)), pushed("a", 9, 1, 1)),
        journal(pushed("a", 0, 1, 1)),
    )
    assert len(made) == 2
    assert [made.push_of(0, place) for place in range(len(refused))] == [NO_PUSH] * 4
    assert made.push_of(0, 4) != made.push_of(1, 0)


def test_a_push_is_done_with_its_last_record() -> None:
    made = pushes(journal(pushed("a", 1, 4, 7)), journal(pushed("a", 1, 7, 4)))
    assert [made.count_off(made.push_of(0, 0)), made.count_off(made.push_of(1, 0))] == [False, True]


@pytest.mark.parametrize(
    "other", [pushed("a", 1, 7, 5), pushed("a", 1, 8, 4), pushed("a", 1, 7, 4, index=3), pushed("a", 1, 7, 4, epoch=1)]
)
def test_journals_that_contradict_each_other_are_refused(other: dict[str, Any]) -> None:
    pushes(journal(pushed("a", 1, 4, 7)), journal(pushed("a", 1, 7, 4)))
    with pytest.raises(
        JournalError, match=r"contradict each other about one push: one says batch .* another run: restore it"
    ):
        pushes(journal(pushed("a", 1, 4, 7)), journal(other))


def test_no_push_at_all() -> None:
    assert len(pushes(journal(), journal())) == 0
