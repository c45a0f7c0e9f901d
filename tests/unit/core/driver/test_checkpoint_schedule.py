from __future__ import annotations

from typing import Any

import pytest

from psgd.core.driver.checkpoint_schedule import CheckpointSchedule
from psgd.core.driver.events import Commit, Committed, Save, Saved, SaveFailed
from psgd.spec import CheckpointConfig
from tests.support.in_process import InProcess
from tests.support.jobs import GRID, START, job, quadratic

NEVER = float("inf")


def checkpoint_schedule(
    partitions: int = 1, number: int = 0, saved: int | None = None, **config: Any
) -> CheckpointSchedule:
    return CheckpointSchedule(CheckpointConfig.model_validate(config), partitions, number, saved)


def test_a_checkpoint_is_due_by_time_counted_from_the_last_ones_end() -> None:
    by_time = checkpoint_schedule(every_s=10.0)
    by_time.closed_at = 5.0
    assert not by_time.due(updates=1, now=14.9)
    assert by_time.due(updates=1, now=15.0)
    assert by_time.begin(updates=1) == Save(0)
    by_time.take(Saved(0, 0, updates=1, epochs=0), now=16.0)
    by_time.take(Committed(0), now=17.0)
    assert not by_time.due(updates=2, now=26.9)
    assert by_time.due(updates=2, now=27.0)


@pytest.mark.parametrize(("saved", "updates", "due"), [(None, 99, False), (None, 100, True), (50, 149, False)])
def test_a_checkpoint_is_due_by_updates(saved: int | None, updates: int, due: bool) -> None:
    assert checkpoint_schedule(every_s=None, every_updates=100, saved=saved).due(updates, now=1e9) is due


def test_nothing_new_is_never_due() -> None:
    idle = checkpoint_schedule(every_s=10.0, saved=7)
    assert not idle.lacks(7)
    assert not idle.due(updates=7, now=1e9)
    assert idle.deadline(updates=7) == NEVER  # a deadline would wake the host again and again for nothing
    assert idle.deadline(updates=8) == 10


def test_a_run_that_saved_nothing_lacks_even_its_first_weights() -> None:
    assert checkpoint_schedule().lacks(0)


def test_one_at_a_time() -> None:
    busy = checkpoint_schedule(every_s=10.0, every_updates=1)
    busy.begin(updates=4)
    assert busy.busy
    assert not busy.due(updates=5, now=1e9)
    assert busy.deadline(updates=5) == NEVER


def test_it_is_committed_once_every_part_is_written_as_far_as_the_least_one() -> None:
    two = checkpoint_schedule(partitions=2, number=4)
    two.begin(updates=6)
    assert two.take(Saved(1, 4, updates=9, epochs=2), now=1.0) is None
    assert two.take(Saved(0, 4, updates=7, epochs=1), now=2.0) == Commit(4, updates=7, epochs=1)
    assert two.lacks(7)
    two.take(Committed(4), now=3.0)
    assert (two.saved_updates, two.busy) == (7, False)
    assert two.begin(updates=9) == Save(5)


def test_a_failed_one_gives_its_number_away_and_its_late_parts_are_ignored() -> None:
    two = checkpoint_schedule(partitions=2, every_s=10.0)
    two.begin(updates=6)
    two.take(SaveFailed(0, "the disk is full"), now=3.0)
    assert (two.busy, two.saved_updates, two.deadline(updates=1)) == (False, None, 13)
    assert two.take(Saved(1, 0, updates=9, epochs=2), now=4.0) is None
    assert two.begin(updates=9) == Save(1)
    assert two.take(Saved(0, 0, updates=9, epochs=2), now=4.0) is None
    assert two.take(Saved(1, 0, updates=9, epochs=2), now=4.0) is None
    assert two.busy


def test_one_that_failed_is_not_tried_again_at_once() -> None:
    by_updates = checkpoint_schedule(every_s=None, every_updates=10)
    by_updates.begin(updates=10)
    by_updates.take(SaveFailed(0, "the disk is full"), now=1.0)
    assert not by_updates.due(updates=19, now=2.0)
    assert by_updates.due(updates=20, now=2.0)


def test_it_tells_what_storage_holds_and_why_it_holds_no_more() -> None:
    checkpoint_schedule = CheckpointSchedule(CheckpointConfig(), 1, number=1, saved_updates=None)
    assert (checkpoint_schedule.status.text, checkpoint_schedule.fault) == ("nothing is saved", None)
    checkpoint_schedule.begin(5)
    checkpoint_schedule.take(Saved(0, 1, 5, 2), 0.0)
    checkpoint_schedule.take(Committed(1), 0.0)
    assert checkpoint_schedule.status.text == "the newest checkpoint contains 5 updates and 2 complete epochs"
    checkpoint_schedule.begin(9)
    checkpoint_schedule.take(SaveFailed(2, "read-only"), 0.0)
    assert (checkpoint_schedule.saved_updates, checkpoint_schedule.fault) == (5, "read-only")
    checkpoint_schedule.begin(9)
    checkpoint_schedule.take(Saved(0, 3, 9, 2), 0.0)
    checkpoint_schedule.take(Committed(3), 0.0)
    assert checkpoint_schedule.fault is None


def test_a_run_whose_end_cannot_be_written_is_unsaved_and_says_what_is() -> None:
    spec = job(run={"epochs": 1}, checkpoint={"every_s": None, "every_updates": 4})
    # After the first checkpoint nothing can be written any more; training continues to its end.
    host = InProcess(spec, GRID, START, quadratic, failing_saves=range(1, 100)).run()
    assert host.finish is not None
    assert host.finish.status == "unsaved"
    assert host.status.epochs == 1
    assert [checkpoint.updates for checkpoint in host.checkpoints] == [host.status.checkpoint.updates]
    assert host.finish.error == (
        f"training reached {GRID.num_batches} updates and 1 complete epoch, but the last checkpoint could not be "
        f"written: the disk is full; {host.status.checkpoint.text}. Repair the storage; --resume then "
        "continues from the newest checkpoint, or from the beginning if there is none"
    )


def test_a_lost_server_takes_its_part_of_the_one_under_way_with_it() -> None:
    two = checkpoint_schedule(partitions=2, every_s=None, every_updates=10)
    two.begin(updates=20)
    two.take(Saved(0, 0, updates=20, epochs=0), now=1.0)
    two.abandon(now=2.0)
    assert not two.busy
    assert two.take(Saved(1, 0, updates=20, epochs=0), now=3.0) is None
    assert not two.concerns(SaveFailed(0, "the server died"))
    assert two.due(updates=20, now=4.0)  # without a pause: the storage did not fail


def test_whether_it_was_the_last_one_is_known_when_it_fails() -> None:
    first = checkpoint_schedule()
    first.begin(updates=1)
    assert not first.last
    first.take(SaveFailed(0, "the disk is full"), now=1.0)
    first.begin(updates=2, last=True)
    assert first.last
