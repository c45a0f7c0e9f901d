from __future__ import annotations

from dataclasses import replace
from itertools import count

import pytest

from psgd.core.driver.events import AskReport, Reported, StartServer
from psgd.core.driver.server_reports import ServerReports
from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd.core.server.report import Report
from psgd_workers.messages import Version
from tests.support.jobs import GRID, START, job


def report(partition: int = 0, incarnation: int = 1, duplicates: int = 0, epochs: int = 0) -> Report:
    empty = ParameterServer(job(), Partition(partition, 0, 6, 6), START, GRID, Version(incarnation, 0)).report()
    return replace(empty, pushes={**empty.pushes, "duplicate": duplicates}, epochs=epochs)


@pytest.fixture
def servers() -> ServerReports:
    """Return two servers that were started and have reported."""
    stamps = count(1)
    servers = ServerReports(2, lambda: next(stamps))
    for partition in range(2):
        _, ask = servers.start(partition)
        assert isinstance(ask, AskReport)
        servers.take(Reported(report(partition), ask.asked), now=1.0)
    return servers


def test_a_server_is_started_and_asked_at_once() -> None:
    start, ask = ServerReports(1, lambda: 7).start(0)
    assert (start, ask) == (StartServer(0), AskReport(0, 7, wait=False))


def test_all_are_ready_once_each_has_reported(servers: ServerReports) -> None:
    ready = [servers.ready]
    servers.lost(1, now=2.0)
    ready.append(servers.ready)
    servers.take(Reported(report(1, incarnation=2), 99), now=5.0)
    assert [*ready, servers.ready] == [True, False, True]


def test_a_restored_servers_first_report_tells_how_long_there_was_none(servers: ServerReports) -> None:
    servers.lost(1, now=2.0)
    servers.lost(1, now=3.0)  # it died while it was restored
    taken = servers.take(Reported(report(1, incarnation=3), 99), now=5.0)
    assert taken
    assert taken[1] == 3
    taken = servers.take(Reported(report(1, incarnation=3), 99), now=6.0)
    assert taken
    assert taken[1] is None


def test_what_a_lost_server_said_last_tells_nothing(servers: ServerReports) -> None:
    servers.lost(1, now=2.0)
    assert servers.take(Reported(report(1, duplicates=9), 99), now=2.1) is None
    assert not servers.ready
    assert servers.reports[1].pushes["duplicate"] == 0


def test_nothing_is_asked_of_a_server_that_is_not_there(servers: ServerReports) -> None:
    servers.lost(1, now=2.0)
    assert {ask.partition for ask in servers.ask(0, hurry=True) if isinstance(ask, AskReport)} == {0}


def test_in_a_hurry_one_question_at_a_time_is_asked_about_what_is_in_doubt(servers: ServerReports) -> None:
    servers.ask(0, hurry=False)
    doubt = 50
    asked = [ask for ask in servers.ask(doubt, hurry=True) if isinstance(ask, AskReport)]
    assert [(ask.partition, ask.wait) for ask in asked] == [(0, False), (1, False)]
    assert servers.ask(doubt, hurry=True) == []


def test_pushes_are_counted_over_a_restoration(servers: ServerReports) -> None:
    servers.take(Reported(report(0, duplicates=6), 50), now=2.0)
    servers.lost(0, now=3.0)
    servers.take(Reported(report(0, incarnation=2, duplicates=2), 51), now=4.0)  # the count in its checkpoint
    servers.take(Reported(report(0, incarnation=2, duplicates=5), 52), now=5.0)
    assert servers.pushes == 9


def test_an_older_report_takes_nothing_back_though_no_push_came_between(servers: ServerReports) -> None:
    """A skipped batch adds no push, so the count of pushes alone does not order reports."""
    servers.take(Reported(report(0, epochs=1), 50), now=2.0)
    servers.take(Reported(report(0, epochs=0), 49), now=2.1)
    assert servers.reports[0].epochs == 1
