from __future__ import annotations

import numpy as np
import pytest

from psgd.core.server.journal import OUTCOMES, Journal, RecordKind
from psgd_workers.messages import BatchId, Outcome, Version
from tests.support.jobs import push


def test_a_push_is_recorded_whole() -> None:
    journal = Journal()
    gradient = push(BatchId(3, 2, 1), Version(1, 40), worker="worker-4095", examples=32, loss=0.5)
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


def test_it_grows_and_is_emptied_by_taking() -> None:
    journal = Journal()
    for updates in range(1000):
        journal.member(RecordKind.JOIN, 0.0, "w", Version(1, updates))
    assert len(journal) == 1000
    taken = journal.take()
    journal.member(RecordKind.JOIN, 0.0, "w", Version(1, 7))
    assert taken["updates"].tolist() == list(range(1000))
    assert journal.take()["updates"].tolist() == [7]
    assert len(journal) == 0


@pytest.mark.parametrize("outcome", Outcome)
def test_every_outcome_has_a_number(outcome: Outcome) -> None:
    assert list(Outcome)[OUTCOMES[outcome]] is outcome
