"""The inbox of a run that trains: takes the commands of `psgd stop`, `set` and `scale`, and answers each."""

from __future__ import annotations

from dataclasses import asdict
from math import inf

from psgd.core.driver.events import Change, Scale, Stop
from psgd.errors import SpecError
from psgd.spec import JobSpec
from psgd.spec.changes import change_settings, change_workers
from psgd.store.commands import MOST_REASON, Command, Refusal
from psgd.store.run_directory import RunDirectory

__all__ = ["POLL_S", "CommandInbox"]

POLL_S = 0.5  # seconds between two looks into the directory


class CommandInbox:
    """Commands that other processes leave in a run's directory.

    Each command is accepted or refused, and the answer is recorded in `events.jsonl`.

    Args:
        run: directory of the run, owned by this driver.
        spec: the job with its present settings.

    Attributes:
        spec: the job with the settings that the accepted commands gave it.
    """

    def __init__(self, run: RunDirectory, spec: JobSpec) -> None:
        self._run = run
        self.spec = spec
        self._next_poll_at = -inf

    def poll(self, now: float) -> list[Stop | Change | Scale]:
        """Take the commands that have arrived out of the directory, and answer them, once every `POLL_S`.

        Args:
            now: monotonic time, seconds.

        Returns:
            The events that the accepted commands stand for, oldest first.
        """
        if now < self._next_poll_at:
            return []
        self._next_poll_at = now + POLL_S
        events = [self._answer(command) for command in self._run.take_commands()]
        return [event for event in events if event is not None]

    def _answer(self, command: Command | Refusal) -> Stop | Change | Scale | None:
        """Accept or refuse a command, and record which. No command, whatever its content, ends the run."""
        if isinstance(command, Refusal):
            self._run.event("command", **asdict(command), accepted=False)
            return None
        try:
            event = self._to_event(command)
        except Exception as error:  # noqa: BLE001 - any process may have written the settings
            kind = "" if isinstance(error, SpecError) else f"{type(error).__name__}: "
            self._run.event("command", **command.model_dump(), accepted=False, reason=f"{kind}{error}"[:MOST_REASON])
            return None
        self._run.event("command", **command.model_dump(), accepted=True)
        return event

    def _to_event(self, command: Command) -> Stop | Change | Scale:
        match command.command:
            case "stop":
                return Stop("stopped")
            case "scale":
                workers = change_workers(self.spec, *command.settings[:1] or [""]).scaling.most_workers
                return Scale(workers)
            case "set":
                self.spec = change_settings(self.spec, command.settings)
                return Change(self.spec.settings)
