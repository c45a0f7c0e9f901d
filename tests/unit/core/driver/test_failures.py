from __future__ import annotations

from psgd.core.driver.failures import Incident, Incidents


def test_what_is_nobodys_fault_is_counted_and_not_charged() -> None:
    incidents = Incidents()
    for kind in ("worker_lost", "preempted", "server_lost", "save_failed", "poison"):
        incidents.count(kind)
    assert sum(incidents.failures.values()) == 5
    assert incidents.charged == 2


def test_goodput_is_the_share_of_computed_batches_that_came_into_the_weights() -> None:
    incidents = Incidents()
    assert incidents.goodput(pushes=0) is None
    incidents.begin(done=100)
    incidents.progressed(done=108)
    incidents.died(4, "worker-0", now=1.0, suspicious=True)  # with a batch in hand
    assert incidents.goodput(pushes=9) == 0.8


def test_an_incident_is_open_until_its_lease_is_settled() -> None:
    incidents = Incidents()
    incidents.died(4, "worker-0", now=1.0, suspicious=True)
    assert incidents.settled(5) is None
    assert incidents.settled(4) == Incident("worker-0", 1.0, True)
    assert incidents.settled(4) is None
