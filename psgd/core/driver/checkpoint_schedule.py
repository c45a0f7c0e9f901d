"""The times at which checkpoints are due, and the progress of the one that is being written."""

from __future__ import annotations

from psgd.core.driver.events import Commit, Committed, Save, Saved, SaveFailed
from psgd.core.driver.status import CheckpointStatus
from psgd.spec import CheckpointConfig

__all__ = ["CheckpointSchedule"]

PAUSES_S = (1.0, 2.0, 4.0, 8.0)  # seconds before each new attempt at the run's last checkpoint


class CheckpointSchedule:
    """Decides when to write checkpoints, at most one at a time.

    The *last* checkpoint is always the one that the run ends with. The most recent one is called the newest.

    Args:
        config: the job's `checkpoint` section.
        partitions: number of partitions; each writes one part of a checkpoint.
        number: number of the next checkpoint.
        saved_updates: updates in the newest committed checkpoint; None if there is none.
        saved_epochs: complete epochs in the newest committed checkpoint.

    Attributes:
        saved_updates: as the argument.
        saved_epochs: as the argument. It does not follow from `saved_updates`: a skipped batch can complete an epoch
            without an update.
        fault: cause, if the newest attempt failed.
        last: True if the newest attempt is for the checkpoint that the run ends with.
        retry_at: time at which the last checkpoint is tried again; infinity if it is not.
        closed_at: time at which the newest attempt ended, or training began.
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
        self._parts: dict[int, Saved] | None = (
            None  # partition -> its written part; None: no checkpoint is being written
        )
        self._begun_updates = saved_updates or 0  # updates when the newest attempt began; the attempt may have failed
        self.saved_updates = saved_updates
        self.saved_epochs = saved_epochs
        self.fault: str | None = None
        self.last = False
        self.retry_at = float("inf")
        self._pauses_s = list(PAUSES_S)  # pauses that are left
        self.closed_at = 0.0

    @property
    def busy(self) -> bool:
        """Return True while a checkpoint is being written."""
        return self._parts is not None

    def lacks(self, updates: int) -> bool:
        """Return True if no committed checkpoint contains that many updates."""
        return self.saved_updates is None or self.saved_updates < updates

    def due(self, updates: int, now: float) -> bool:
        """Return True if a checkpoint should begin now."""
        if self.busy or not self.lacks(updates):
            return False
        by_updates = self._config.every_updates
        new_updates = updates - self._begun_updates  # a failed attempt is not repeated immediately
        return now >= self.deadline(updates) or (by_updates is not None and new_updates >= by_updates)

    def deadline(self, updates: int) -> float:
        """Return the time at which the next checkpoint is due; infinity while there is nothing new to save."""
        if self.busy or not self.lacks(updates) or self._config.every_s is None:
            return float("inf")
        return self.closed_at + self._config.every_s

    def begin(self, updates: int, last: bool = False) -> Save:
        """Begin a checkpoint. Return the action that saves it.

        Args:
            updates: number of updates in the partition with the fewest.
            last: True for the checkpoint that the run ends with.
        """
        self._parts = {}
        self.last = last
        self.retry_at = float("inf")
        self._begun_updates = updates
        return Save(self._number)

    def paused(self, now: float) -> bool:
        """Return True if the last checkpoint failed and it is too early to try again."""
        return now < self.retry_at < float("inf")

    def hurry(self) -> None:
        """Drop the pauses. The last checkpoint is tried immediately, and is not tried again if that fails."""
        self._pauses_s = []
        self.retry_at = float("inf")

    def concerns(self, event: Saved | SaveFailed | Committed) -> bool:
        """Return True if the event belongs to the checkpoint that is being written."""
        return self._parts is not None and event.checkpoint == self._number

    def take(self, event: Saved | SaveFailed | Committed, now: float) -> Commit | None:
        """Note the outcome of a part or of a commit. Return the action to commit once all parts are written."""
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
        """Return the state of the saved checkpoints and of the newest attempt."""
        return CheckpointStatus(
            self.saved_updates,
            self.saved_epochs,
            writing=self.busy,
            last=self.last,
            retries=self.retry_at < float("inf"),
            fault=self.fault,
        )

    def abandon(self, now: float) -> None:
        """Give up the current attempt, and a planned repetition of the last checkpoint, because a server was lost."""
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
