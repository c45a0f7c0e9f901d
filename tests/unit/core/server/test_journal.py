from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from psgd.core.server.journal import OUTCOMES, RECORD, Journal, RecordKind, plain, record_type
from psgd_workers.messages import BatchId, Outcome, Version
from tests.support.jobs import push

FIRST = BatchId(0, 0, 0)
V0 = Version(1, 0)


def test_a_push_is_recorded_whole() -> None:
    journal = Journal()
    gradient = push(BatchId(3, 2, 1), Version(1, 40), worker="worker-4095", examples=32, loss=0.5, number=7)
    gradient = gradient._replace(slot=2, carries=6)
    journal.push(12.5, gradient, Outcome.REQUEUED, Version(2, 41))
    record = journal.take()[0]
    assert record["kind"] == RecordKind.PUSH
    assert list(Outcome)[record["outcome"]] is Outcome.REQUEUED
    assert record["worker"] == b"worker-4095"
    assert [record[name] for name in ("epoch", "shard", "index", "examples")] == [3, 2, 1, 32]
    assert [record[name] for name in ("read_incarnation", "read_updates")] == [1, 40]
    assert [record[name] for name in ("incarnation", "updates")] == [2, 41]
    assert [record["now"], record["loss"]] == [12.5, 0.5]
    assert record["compute_s"] == np.float32(0.01)
    assert [record[name] for name in ("slot", "number", "carries")] == [2, 7, 6]


@pytest.mark.parametrize("partitions", [1, 2, 5])
def test_a_record_holds_the_versions_of_the_other_partitions(partitions: int) -> None:
    journal = Journal(partitions)
    others = tuple(Version(number + 1, 10 * number) for number in range(partitions - 1))
    journal.member(RecordKind.JOIN, 0.0, "w", Version(1, 0))
    for loss in (0.5, 1e300, -1e300):
        journal.push(1.0, push(FIRST, V0, loss=loss)._replace(others=others), Outcome.APPLIED, Version(1, 1))
    records = journal.take()
    assert records.dtype == journal.type == record_type(partitions)
    assert records["loss"].tolist() == [0.0, 0.5, np.inf, -np.inf]
    if partitions > 1:
        assert records["others"].tolist() == [[(0, 0)] * (partitions - 1), *([list(others)] * 3)]


def test_one_partition_pays_nothing_for_others() -> None:
    assert Journal().type == RECORD
    assert [record_type(n).itemsize - RECORD.itemsize for n in (1, 2, 9)] == [0, 12, 96]


@pytest.mark.parametrize("partitions", [1, 3])
def test_the_fields_of_all_journals_can_be_read_alike(partitions: int) -> None:
    journal = Journal(partitions)
    journal.push(
        1.0, push(FIRST, V0, number=4)._replace(others=(V0,) * (partitions - 1)), Outcome.APPLIED, Version(1, 1)
    )
    (record,) = plain(journal.take())
    assert record.dtype == RECORD
    assert [record[name] for name in ("number", "updates", "compute_s")] == [4, 1, np.float32(0.01)]


@pytest.mark.parametrize("strange", [np.arange(3), np.zeros(2, [("kind", "u1")])], ids=["numbers", "a field"])
def test_other_arrays_are_no_records(strange: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="expected the fields of"):
        plain(strange)


def test_members_and_forks_are_recorded() -> None:
    journal = Journal()
    journal.fork(1.0, Version(1, 9), Version(2, 9))
    journal.member(RecordKind.JOIN, 2.0, "worker-7", Version(2, 9))
    journal.member(RecordKind.LEAVE, 3.0, "worker-7", Version(2, 10))
    records = journal.take()
    assert records["kind"].tolist() == [RecordKind.FORK, RecordKind.JOIN, RecordKind.LEAVE]
    assert records["worker"].tolist() == [b"", b"worker-7", b"worker-7"]
    assert records["read_incarnation"].tolist() == [1, 0, 0]
    assert records["read_updates"].tolist() == [9, 0, 0]
    assert records["updates"].tolist() == [9, 9, 10]
    assert records["now"].tolist() == [1, 2, 3]


def test_it_holds_any_number_of_records_and_is_emptied_by_taking() -> None:
    journal = Journal()
    for updates in range(5000):
        journal.member(RecordKind.JOIN, 0.0, "w", Version(1, updates))
    assert len(journal) == 5000
    taken = journal.take()
    journal.member(RecordKind.JOIN, 0.0, "w", Version(1, 7))
    assert taken["updates"].tolist() == list(range(5000))
    assert journal.take()["updates"].tolist() == [7]
    assert len(journal) == 0


@pytest.mark.parametrize("outcome", Outcome)
def test_every_outcome_has_a_number(outcome: Outcome) -> None:
    assert list(Outcome)[OUTCOMES[outcome]] is outcome
