"""Whole runs of the coordinator: servers that are lost and restored."""

from __future__ import annotations

import pytest

from psgd.core.driver.events import AskReport, Change, Finish, Reported, Save, ServerLost, StartServer, StopWorker
from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd.simulation.problem import Timing
from psgd_workers.messages import Version
from tests.support.coordinator_runs import GRID, SIZE, notes, run, run_killing, start
from tests.support.jobs import START, job


@pytest.mark.parametrize("mode", ["async", "bsp", "ssp"])
@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("every", [None, 10])
def test_a_lost_server_is_restored_and_what_it_lacks_is_done_again(mode: str, servers: int, every: int | None) -> None:
    consistency = {"mode": mode} | ({"s": 1} if mode == "ssp" else {})
    checkpoint = {"every_s": None, "every_updates": every}
    scaling = {"servers": servers}
    host = run_killing([(2.0, servers - 1)], consistency=consistency, scaling=scaling, checkpoint=checkpoint)
    assert host.finish == Finish("finished")
    for partition, server in host.servers.items():
        report = server.report()
        assert (report.epochs, report.pushes["applied"]) == (1, SIZE)
        assert server.version.incarnation == 1 + (partition == servers - 1)
    (restored,) = notes(host, "server_restored")
    assert restored["partition"] == servers - 1
    assert restored["seconds"] >= Timing().restore_s
    assert restored["batches_lost"] > 0 or every
    assert host.status.failures == {"server_lost": 1}
    assert host.did(StopWorker) == []
    goodput = host.status.goodput
    assert goodput is not None
    assert 0 < goodput < 1 or (every and goodput == 1)


def test_the_partitions_that_live_refuse_what_the_restored_one_lacks() -> None:
    host = run_killing([(2.0, 1)], scaling={"servers": 2})
    alive, restored = (host.servers[partition].report().pushes for partition in range(2))
    assert alive["duplicate"] > 10
    assert restored["duplicate"] == 0


def test_a_server_that_dies_while_it_is_restored_is_restored_again() -> None:
    host = run_killing([(2.0, 0), (2.3, 0), (2.9, 0)])
    assert host.finish == Finish("finished")
    assert host.status.failures == {"server_lost": 3}
    assert host.servers[0].report().pushes["applied"] == SIZE
    assert host.servers[0].version.incarnation == 3  # a server lost while it is restored has none yet


def test_a_server_lost_after_the_last_batch_takes_the_run_back_to_training() -> None:
    ends = run().did(Save)[-1][0]
    host = run_killing([(ends - 0.0005, 0)])
    assert host.finish == Finish("finished")
    assert host.servers[0].report().pushes["applied"] == SIZE
    assert host.checkpoints[-1].updates == SIZE


def test_waiting_for_a_server_wakes_nobody_though_a_checkpoint_is_due() -> None:
    host = run_killing([(2.0, 0)], timing=Timing(restore_s=30.0), checkpoint={"every_s": 0.5})
    assert host.finish == Finish("finished")
    assert len(host.actions) < 2000


def test_a_restored_server_is_told_the_settings_that_the_run_was_changed_to() -> None:
    settings = job("async", optimizer={"lr": 0.02}).settings
    host = run_killing([(2.0, 0)], events=[(1.5, Change(settings))])
    assert host.finish == Finish("finished")
    assert host.servers[0].settings == settings


def test_a_report_of_a_lost_server_does_not_bring_it_back() -> None:
    coordinator, (_, ask, *_) = start()
    assert isinstance(ask, AskReport)
    server = ParameterServer(job(), Partition(0, 0, 6, 6), START, GRID, Version(1, 0))
    coordinator.handle(Reported(server.report(), ask.asked), 0.5)
    coordinator.handle(ServerLost(0, "killed"), 1.0)
    coordinator.handle(Reported(server.report(), ask.asked), 1.1)
    assert coordinator.status(1.1).servers[0].phase == "restoring"


def test_a_server_that_cannot_be_started_fails_the_run() -> None:
    coordinator, _ = start()
    (finish,) = coordinator.handle(ServerLost(0, "no memory", died=False), 1.0)
    assert isinstance(finish, Finish)
    assert "could not be started: no memory" in str(finish.error)


def test_a_server_that_dies_before_its_first_report_is_started_again() -> None:
    coordinator, _ = start()
    actions = coordinator.handle(ServerLost(0, "killed"), 1.0)
    assert [type(action) for action in actions] == [StartServer, AskReport]
    ask = actions[1]
    assert isinstance(ask, AskReport)
    server = ParameterServer(job(), Partition(0, 0, 6, 6), START, GRID, Version(2, 0))
    coordinator.handle(Reported(server.report(), ask.asked), 2.0)
    status = coordinator.status(2.0)
    assert (status.servers[0].phase, status.charged_failures) == ("up", 1)


def test_more_lost_servers_than_allowed_fail_the_run_and_name_the_remedy() -> None:
    host = run_killing([(2.0, 0)], failure={"max_failures": 0})
    assert host.finish
    assert host.finish.status == "failed"
    assert "--resume" in str(host.finish.error)
