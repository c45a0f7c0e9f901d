"""Saving: when a checkpoint is due, and how far the one under way has come."""

from __future__ import annotations

from psgd.core.driver.events import Commit, Committed, Save, Saved, SaveFailed
from psgd.core.driver.status import CheckpointStatus
from psgd.spec import CheckpointConfig

__all__ = ["CheckpointSchedule"]

PAUSES_S = (1.0, 2.0, 4.0, 8.0)  # before the run's last checkpoint is tried again


class CheckpointSchedule:
    """At most one checkpoint at a time.

    Args:
        config: how often.
        partitions: how many parts a checkpoint has.
        number: of the next checkpoint.
        saved_updates: the version that storage holds; None: nothing.
        saved_epochs: the complete epochs that storage holds.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        partitions: int,
        number: int,
        saved_updates: int | None,
        saved_epochs: int = 0,
    ) -> None:
        self._config = config
        self._partitions = partitions
        self._number = number
        self._parts: dict[int, Saved] | None = None
        self._begun_updates = saved_updates or 0  # also of one that failed: it is not tried again at once
        self.saved_updates = saved_updates
        self.saved_epochs = saved_epochs  # an epoch may be completed by what is done without, and no update
        self.fault: str | None = None  # why the newest one could not be written
        self.last = False  # whether the newest is the one the run ends with
        self.retry_at = float("inf")  # when the last one is tried again; infinite: never
        self._pauses_s = list(PAUSES_S)  # still to come
        self.closed_at = 0.0  # when the last one ended, or training began

    @property
    def busy(self) -> bool:
        return self._parts is not None

    def lacks(self, updates: int) -> bool:
        """Whether storage is behind that version."""
        return self.saved_updates is None or self.saved_updates < updates

    def due(self, updates: int, now: float) -> bool:
        """Whether a checkpoint should begin now."""
        if self.busy or not self.lacks(updates):
            return False
        by_updates = self._config.every_updates
        made = updates - self._begun_updates
        return now >= self.deadline(updates) or (by_updates is not None and made >= by_updates)

    def deadline(self, updates: int) -> float:
        """When the next checkpoint is due by time; never, while there is nothing new to save."""
        if self.busy or not self.lacks(updates) or self._config.every_s is None:
            return float("inf")
        return self.closed_at + self._config.every_s

    def begin(self, updates: int, last: bool = False) -> Save:
        self._parts = {}
        self.last = last
        self.retry_at = float("inf")
        self._begun_updates = updates
        return Save(self._number)

    def pauses(self, now: float) -> bool:
        """Whether the last one failed, and it is too early to try again."""
        return now < self.retry_at < float("inf")

    def hurry(self) -> None:
        """Pause no more: the last one is tried at once, and once."""
        self._pauses_s = []
        self.retry_at = float("inf")

    def concerns(self, event: Saved | SaveFailed | Committed) -> bool:
        """Whether it is about the checkpoint under way."""
        return self._parts is not None and event.checkpoint == self._number

    def take(self, event: Saved | SaveFailed | Committed, now: float) -> Commit | None:
        """Note how a part or the whole fared; once every part is written, the checkpoint can be committed."""
        if self._parts is None or not self.concerns(event):
            return None
        match event:
            case Saved():
                self._parts[event.partition] = event
                if len(self._parts) == self._partitions:
                    return Commit(self._number, self._updates(), min(part.epochs for part in self._parts.values()))
            case Committed():
                self.fault = None
                self.saved_updates = self._updates()
                self.saved_epochs = min(part.epochs for part in self._parts.values())
                self._close(now)
            case SaveFailed():
                self.fault = event.cause
                self._close(now)
                if self.last and self._pauses_s:
                    self.retry_at = now + self._pauses_s.pop(0)
        return None

    @property
    def status(self) -> CheckpointStatus:
        """What storage holds, and how the newest attempt went."""
        return CheckpointStatus(
            self.saved_updates,
            self.saved_epochs,
            writing=self.busy,
            last=self.last,
            retries=self.retry_at < float("inf"),
            fault=self.fault,
        )

    def abandon(self, now: float) -> None:
        """A server is gone, and with it its part of the checkpoint under way, or what was to be tried again."""
        self.retry_at = float("inf")
        if self.busy:
            self._begun_updates = self.saved_updates or 0
            self._close(now)

    def _updates(self) -> int:
        assert self._parts
        return min(part.updates for part in self._parts.values())

    def _close(self, now: float) -> None:
        self._parts = None
        self._number += 1
        self.closed_at = now
