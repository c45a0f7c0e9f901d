from __future__ import annotations

from psgd.core.driver.failures import FailureCounts, WorkerDeath


def test_what_is_nobodys_fault_is_counted_and_not_charged() -> None:
    failure_counts = FailureCounts()
    for kind in ("worker_lost", "preempted", "server_lost", "save_failed", "poison"):
        failure_counts.count(kind)
    assert sum(failure_counts.failures.values()) == 5
    assert failure_counts.charged == 2


def test_goodput_is_the_share_of_computed_batches_that_came_into_the_weights() -> None:
    failure_counts = FailureCounts()
    assert failure_counts.goodput(pushes=0) is None
    failure_counts.begin(done=100)
    failure_counts.progressed(done=108)
    failure_counts.died(4, "worker-0", now=1.0, suspicious=True)  # with a batch in hand
    assert failure_counts.goodput(pushes=9) == 0.8


def test_an_incident_is_open_until_its_lease_is_settled() -> None:
    failure_counts = FailureCounts()
    failure_counts.died(4, "worker-0", now=1.0, suspicious=True)
    assert failure_counts.settled(5) is None
    assert failure_counts.settled(4) == WorkerDeath("worker-0", 1.0, True)
    assert failure_counts.settled(4) is None
