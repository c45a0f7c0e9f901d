"""The newest report of each server, the requests for the next one, and the servers that are being restored."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from psgd.core.driver.events import Action, AskReport, Reported, StartServer
from psgd.core.driver.status import ServerPhase, ServerStatus
from psgd.core.server.report import Report

__all__ = ["ServerReports"]


class ServerReports:
    """The reports of all servers, one server for each partition.

    A partition has at most two requests open: a *poll*, which its server answers when an epoch completes or some time
    has passed, and an *urgent* one, which it answers immediately.

    Args:
        partitions: number of partitions.
        stamp: function that returns a new stamp, the number of a request (see `Ledger.next_stamp`).

    Attributes:
        reports: partition -> newest report; while a server is being restored, the last report of the lost server.
    """

    def __init__(self, partitions: int, stamp: Callable[[], int]) -> None:
        self._partitions = range(partitions)
        self._stamp = stamp
        self.reports: dict[int, Report] = {}
        self._down: dict[int, float] = {}  # partition without a server -> time of the loss, in seconds
        self._asked = dict.fromkeys(self._partitions, 0)  # partition -> stamp of its newest request
        self._urgent = dict.fromkeys(self._partitions, 0)  # partition -> stamp of its urgent request; 0 if none is open
        self._polls: dict[int, int] = {}  # partition -> stamp of its poll, while one is open
        self._pushes = dict.fromkeys(self._partitions, 0)  # partition -> pushes to it in this process
        self._reported_at = dict.fromkeys(self._partitions, -inf)  # partition -> time of its newest report

    @property
    def ready(self) -> bool:
        """Return True if every partition has a server that has reported."""
        return len(self.reports) == len(self._partitions) and not self._down

    @property
    def epochs(self) -> int:
        """Return the number of epochs that are complete in every partition."""
        return min((report.epochs for report in self.reports.values()), default=0)

    @property
    def updates(self) -> int:
        """Return the number of steps taken by the partition with the fewest."""
        return min((report.version.updates for report in self.reports.values()), default=0)

    @property
    def reported_at(self) -> float:
        """Return the time of the oldest among the newest reports. Signs of life after it may be missing."""
        return min(self._reported_at.values())

    @property
    def pushes(self) -> int:
        """Return the largest number of pushes that a partition has received since this process started.

        Pushes to all servers that held the partition count.
        """
        return max(self._pushes.values())

    def start(self, partition: int) -> list[Action]:
        """Return the orders to start a partition's first or next server, and to request its report."""
        self._polls.pop(partition, None)
        self._urgent[partition] = self._stamp_request(partition)
        return [StartServer(partition), AskReport(partition, self._urgent[partition], wait=False)]

    def lost(self, partition: int, now: float) -> None:
        """Note that a server is lost, even if it never reported."""
        self._down.setdefault(partition, now)

    def take(self, event: Reported, now: float) -> tuple[Report, float | None] | None:
        """Note a report.

        Args:
            event: the report and the stamp of its request.
            now: time of the host's clock, in seconds.

        Returns:
            (report, seconds), or None if a lost server sent the report. `report` is the partition's newest, which may
            be an earlier one, as answers may overtake each other. `seconds` is the time without a server if this is the
            first report of a restored server, else None.
        """
        report = event.report
        partition = report.partition
        known = self.reports.get(partition)
        if known and partition in self._down and known.version.incarnation >= report.version.incarnation:
            return None
        self._reported_at[partition] = now
        if self._polls.get(partition) == event.asked:
            del self._polls[partition]
        if self._urgent[partition] == event.asked:
            self._urgent[partition] = 0
        if known and known.moment > report.moment:
            return known, None
        if known and known.version.incarnation == report.version.incarnation:
            self._pushes[partition] += report.num_pushes - known.num_pushes
        self.reports[partition] = report
        since = self._down.pop(partition, None)
        return report, None if since is None else now - since

    def ask(self, newest_doubt: int, hurry: bool) -> list[Action]:
        """Return the requests to send now: a poll where no poll is open, and urgent requests about batches in doubt.

        Args:
            newest_doubt: stamp of the newest closing of a lease that is in doubt; 0 if no batch is in doubt.
            hurry: True to request urgent reports, at most one of each partition at a time.
        """
        actions: list[Action] = []
        for partition in self.reports:
            if partition in self._down:
                continue
            if hurry and not self._urgent[partition] and newest_doubt > self._asked[partition]:
                self._urgent[partition] = self._stamp_request(partition)
                actions.append(AskReport(partition, self._urgent[partition], wait=False))
            if partition not in self._polls:
                self._polls[partition] = self._stamp_request(partition)
                actions.append(AskReport(partition, self._polls[partition], wait=True))
        return actions

    def status(self, now: float) -> tuple[ServerStatus, ...]:
        """Return the status of every partition's server."""
        return tuple(self._status(partition, now) for partition in self._partitions)

    def _status(self, partition: int, now: float) -> ServerStatus:
        report = self.reports.get(partition)
        if report is None:
            return ServerStatus(partition, "starting", incarnation=0, updates=0, silent_s=None)
        phase: ServerPhase = "restoring" if partition in self._down else "up"
        silent_s = now - self._reported_at[partition]
        return ServerStatus(partition, phase, report.version.incarnation, report.version.updates, silent_s)

    def _stamp_request(self, partition: int) -> int:
        """Return a new stamp, noted as the one of the partition's newest request."""
        self._asked[partition] = self._stamp()
        return self._asked[partition]
