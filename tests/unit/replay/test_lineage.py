from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from psgd.core.server.journal import RecordKind
from psgd.errors import JournalError
from psgd.replay.lineage import IncarnationJournal, Record, read_lineage
from psgd.store.checkpoints import Checkpoints
from psgd.store.run_directory import RunDirectory
from psgd_workers.messages import Outcome
from tests.support.recorded_run import digits, record, run_directory

FIRST = "journal/000000-1-server-0.npy"  # a segment without a checksum, because its checkpoint was deleted


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run of two incarnations, each with several checkpoints."""
    run = run_directory(tmp_path)
    record(run, digits(run={"epochs": 1}))
    record(run, digits(run={"epochs": 2}))
    return run


@pytest.fixture
def torn(tmp_path: Path) -> RunDirectory:
    """A run on two servers. The first one died after writing its part of checkpoint 1, before the commit."""
    run = run_directory(tmp_path)
    record(run, digits(scaling={"workers": 3, "servers": 2}), dying=[(1, 0)])
    return run


def lineage(run: RunDirectory, partition: int = 0, branches: bool = False) -> tuple[IncarnationJournal, ...]:
    newest = Checkpoints(run.storage).committed()[-1]
    return read_lineage(run, Checkpoints(run.storage).manifest(newest), partition, branches)


def records(journal: IncarnationJournal) -> list[Record]:
    return [record for segment in journal.segments for record in Record.of(segment.records)]


def newest_segment(run: RunDirectory) -> str:
    return f"journal/{run.storage.names('journal')[-1]}"


def rewrite(run: RunDirectory, name: str, change: Callable[[NDArray[np.void]], NDArray[Any]]) -> None:
    path = Path(run.storage.url) / name
    np.save(path, change(np.load(path)))


def with_field(name: str, value: int) -> Callable[[NDArray[np.void]], NDArray[np.void]]:
    def change(records: NDArray[np.void]) -> NDArray[np.void]:
        records[name][0] = value
        return records

    return change


def test_each_incarnation_has_a_journal_and_the_second_begins_with_a_fork(run: RunDirectory) -> None:
    first, second = lineage(run)
    assert (first.incarnation, second.incarnation) == (1, 2)
    assert (first.workers, second.workers) == (3, 3)
    assert (first.session, second.session) == (1, 2)
    fork = records(second)[0]
    assert (fork.kind, fork.read, fork.version) == (RecordKind.FORK, (1, 30), (2, 30))
    pushes = [record for record in [*records(first), *records(second)] if record.kind == RecordKind.PUSH]
    assert [record.updates for record in pushes] == [*range(1, 61)]
    assert {record.outcome for record in pushes} == {Outcome.APPLIED}


def test_every_server_has_records_of_its_own(tmp_path: Path) -> None:
    run = run_directory(tmp_path)
    record(run, digits(scaling={"workers": 3, "servers": 2}), skew_s=0.1)
    first, second = (lineage(run, partition) for partition in (0, 1))
    pushes = [[r.batch for r in records(journal) if r.kind == RecordKind.PUSH] for (journal,) in (first, second)]
    assert pushes[0] != pushes[1]
    assert sorted(pushes[0]) == sorted(pushes[1])
    run.storage.delete("journal/000000-1-server-1.npy")
    assert lineage(run, 0)
    with pytest.raises(JournalError, match=r"/journal lacks 000000-1-server-1\.npy"):
        lineage(run, 1)


def test_segments_after_the_checkpoint_that_was_resumed_from_are_left_out(run: RunDirectory) -> None:
    run.storage.write("journal/000009-1-server-0.npy", b"of a checkpoint that was never committed")
    run.storage.write("journal/notes.txt", b"not a segment")
    assert [sum(len(segment.records) for segment in journal.segments) for journal in lineage(run)] == [
        sum(
            len(np.load(path)) for path in Path(run.storage.url, "journal").glob(f"00000?-{n}-*") if path.name[5] != "9"
        )
        for n in (1, 2)
    ]


@pytest.mark.parametrize("name", [FIRST, "the newest"])
def test_a_missing_segment_is_named(run: RunDirectory, name: str) -> None:
    name = newest_segment(run) if name == "the newest" else name
    run.storage.delete(name)
    with pytest.raises(JournalError, match=rf"/journal lacks {name.removeprefix('journal/')}: .* Restore"):
        lineage(run)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (with_field("incarnation", 7), "has records of incarnation 7, not of 1: it belongs to another run"),
        (with_field("kind", 9), "records that this version of psgd does not know"),
        (with_field("outcome", 99), "records that this version of psgd does not know"),
        (lambda records: records["updates"], "records that this version of psgd does not know"),
        (with_field("kind", RecordKind.FORK), r"continued from the initial weights, but its .* have forks at \[0\]"),
    ],
    ids=["another incarnation", "kind", "outcome", "dtype", "fork"],
)
def test_strange_records_are_refused(run: RunDirectory, change: Any, fault: str) -> None:
    rewrite(run, FIRST, change)
    with pytest.raises(JournalError, match=fault):
        lineage(run)


def test_a_truncated_segment_is_damaged(run: RunDirectory) -> None:
    run.storage.write(FIRST, run.storage.read(FIRST)[:-5])
    with pytest.raises(JournalError, match=r"000000-1-server-0\.npy is damaged"):
        lineage(run)


def test_a_segment_that_was_changed_or_is_another_runs_fails_its_checksum(run: RunDirectory, tmp_path: Path) -> None:
    other = run_directory(tmp_path, "other")
    record(other, digits(seed=1, run={"epochs": 1}))
    record(other, digits(seed=1, run={"epochs": 2}))
    name = newest_segment(run)
    assert name == newest_segment(other)
    run.storage.write(name, other.storage.read(name))
    with pytest.raises(JournalError, match=r"not the file that was committed with its checkpoint: .* another run"):
        lineage(run)


def test_a_start_that_nobody_wrote_down_is_asked_for(run: RunDirectory) -> None:
    lines = [line for line in run.read_lines("events.jsonl") if line.get("incarnation") != 1]
    run.storage.write("events.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    with pytest.raises(JournalError, match="lacks the start of incarnation 1, which wrote"):
        lineage(run)


# A server restored alone


def test_a_server_that_lived_has_one_journal_whose_checkpoints_name_two_incarnations(torn: RunDirectory) -> None:
    (alone,) = lineage(torn, partition=1)
    assert (alone.session, alone.incarnation, alone.origin) == (1, 1, None)
    assert {segment.checkpoint[-2:] for segment in alone.segments} == {"-1", "-2"}
    assert [record.updates for record in records(alone) if record.outcome is Outcome.APPLIED][-1] == 2 * 30


def test_the_branch_that_a_lost_server_gave_up_is_read_if_it_is_asked_for(torn: RunDirectory) -> None:
    first, second = lineage(torn)
    assert (first.incarnation, second.incarnation, second.session, second.origin) == (1, 2, 1, "000000-1")
    assert [segment.checkpoint for segment in first.segments] == ["000000-1"]
    whole, same = lineage(torn, branches=True)
    assert [(segment.checkpoint, segment.in_lineage) for segment in whole.segments] == [
        ("000000-1", True),
        ("000001-1", False),
    ]
    assert whole.segments[1].records["updates"][0] >= first.segments[0].records["updates"][-1]
    assert [segment.checkpoint for segment in same.segments] == [segment.checkpoint for segment in second.segments]


def test_an_incarnation_that_was_given_up_as_a_whole_is_read_if_it_is_asked_for(tmp_path: Path) -> None:
    """It continued from checkpoint 0 and died before the commit of its own first checkpoint."""
    run = run_directory(tmp_path)
    record(run, digits(scaling={"workers": 3, "servers": 2}), dying=[(1, 0), (2, 0)])
    assert [journal.incarnation for journal in lineage(run)] == [1, 3]
    whole = lineage(run, branches=True)
    assert [(journal.incarnation, journal.origin, journal.in_lineage) for journal in whole] == [
        (1, None, True),
        (2, "000000-1", False),
        (3, "000000-1", True),
    ]


@pytest.mark.parametrize("harm", ["missing", "damaged"])
def test_a_branch_is_known_up_to_the_first_segment_that_cannot_be_read(torn: RunDirectory, harm: str) -> None:
    name = "journal/000001-1-server-0.npy"
    if harm == "missing":
        torn.storage.delete(name)
    else:
        torn.storage.write(name, torn.storage.read(name)[:-5])
    assert [segment.checkpoint for segment in lineage(torn, branches=True)[0].segments] == ["000000-1"]
    torn.storage.delete("journal/000001-1-server-1.npy")
    (alone,) = lineage(torn, partition=1)
    assert len(records(alone)) > 0, "that checkpoint was not committed, and so no segment of it is required"


def test_a_branch_is_known_up_to_its_first_change(torn: RunDirectory) -> None:
    """No checkpoint of the lineage holds the settings of that change."""

    def change(records: NDArray[np.void]) -> NDArray[np.void]:
        records["kind"][3] = RecordKind.CHANGE
        return records

    rewrite(torn, "journal/000001-1-server-0.npy", change)
    assert [len(segment.records) for segment in lineage(torn, branches=True)[0].segments][1:] == [3]
