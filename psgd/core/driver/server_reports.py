"""The servers as the coordinator knows them: what each reported last, what it is asked, and which is being restored."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from psgd.core.driver.events import Action, AskReport, Reported, StartServer
from psgd.core.driver.status import ServerPhase, ServerStatus
from psgd.core.server.report import Report

__all__ = ["ServerReports"]


class ServerReports:
    """One for each partition.

    Args:
        partitions: how many.
        stamp: gives the next stamp of the ledger's order of asking and closing.

    Attributes:
        reports: the newest of each; that of a server which is down is its predecessor's.
        pushes: heard by the partition that heard most, over this process, restored servers included.
    """

    def __init__(self, partitions: int, stamp: Callable[[], int]) -> None:
        self._partitions = range(partitions)
        self._stamp = stamp
        self.reports: dict[int, Report] = {}
        self._down: dict[int, float] = {}  # since when
        self._asked = dict.fromkeys(self._partitions, 0)  # newest stamp asked
        self._asking = dict.fromkeys(self._partitions, 0)  # stamp of one in flight
        self._polls: dict[int, int] = {}  # stamp of the report that waits for news
        self._heard = dict.fromkeys(self._partitions, 0)
        self._reported_at = dict.fromkeys(self._partitions, -inf)

    @property
    def ready(self) -> bool:
        """Whether every partition has a server that has reported."""
        return len(self.reports) == len(self._partitions) and not self._down

    @property
    def epochs(self) -> int:
        """Epochs that every partition contains."""
        return min((report.epochs for report in self.reports.values()), default=0)

    @property
    def updates(self) -> int:
        """Steps taken, by the partition that is least far."""
        return min((report.version.updates for report in self.reports.values()), default=0)

    @property
    def reported_at(self) -> float:
        """Since when every partition has reported; before, whoever showed life may not have been heard of."""
        return min(self._reported_at.values())

    @property
    def pushes(self) -> int:
        return max(self._heard.values())

    def start(self, partition: int) -> list[Action]:
        """Start a server, the first or the next of its partition, and ask it what it contains."""
        self._polls.pop(partition, None)
        self._asking[partition] = self._ask_now(partition)
        return [StartServer(partition), AskReport(partition, self._asking[partition], wait=False)]

    def lost(self, partition: int, now: float) -> None:
        """A server is gone; perhaps before it had reported."""
        self._down.setdefault(partition, now)

    def take(self, event: Reported, now: float) -> tuple[Report, float | None] | None:
        """Note a report.

        Returns:
            The newest that is known, as answers may overtake each other, and for how many seconds there was no server
            if this is a restored one's first. None: it came from one that is lost, and tells nothing any more.
        """
        report = event.report
        partition = report.partition
        known = self.reports.get(partition)
        if known and partition in self._down and known.version.incarnation >= report.version.incarnation:
            return None
        self._reported_at[partition] = now
        if self._polls.get(partition) == event.asked:
            del self._polls[partition]
        if self._asking[partition] == event.asked:
            self._asking[partition] = 0
        if known and known.moment > report.moment:
            return known, None
        if known and known.version.incarnation == report.version.incarnation:
            self._heard[partition] += sum(report.pushes.values()) - sum(known.pushes.values())
        self.reports[partition] = report
        since = self._down.pop(partition, None)
        return report, None if since is None else now - since

    def ask(self, newest_doubt: int, hurry: bool) -> list[Action]:
        """Keep one report waiting for news; in a hurry, ask at once about what is in doubt, one question at a time."""
        actions: list[Action] = []
        for partition in self.reports:
            if partition in self._down:
                continue
            if hurry and not self._asking[partition] and newest_doubt > self._asked[partition]:
                self._asking[partition] = self._ask_now(partition)
                actions.append(AskReport(partition, self._asking[partition], wait=False))
            if partition not in self._polls:
                self._polls[partition] = self._ask_now(partition)
                actions.append(AskReport(partition, self._polls[partition], wait=True))
        return actions

    def status(self, now: float) -> tuple[ServerStatus, ...]:
        """Describe the server of every partition."""
        return tuple(self._status(partition, now) for partition in self._partitions)

    def _status(self, partition: int, now: float) -> ServerStatus:
        report = self.reports.get(partition)
        if report is None:
            return ServerStatus(partition, "starting", incarnation=0, updates=0, silent_s=None)
        phase: ServerPhase = "restoring" if partition in self._down else "up"
        silent_s = now - self._reported_at[partition]
        return ServerStatus(partition, phase, report.version.incarnation, report.version.updates, silent_s)

    def _ask_now(self, partition: int) -> int:
        self._asked[partition] = self._stamp()
        return self._asked[partition]
