"""The run directory: everything a run leaves behind, under fixed names.

spec.yaml          the job as it was given      resolved.json   ... with every default
env.json           versions of what ran it      owner           the driver that may commit
metrics.jsonl      numbers over time            events.jsonl    what happened, and why
checkpoints/       see psgd.store.checkpoints         journal/        one record per push
commands/          what `psgd stop` asked for   result.json     how it ended
"""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any
from uuid import uuid4

import yaml

from psgd.errors import OwnershipError, ResumeError, RunNotFoundError, StorageError
from psgd.result import Result
from psgd.spec import JobSpec
from psgd.store.event_log import Log
from psgd.store.storage import Storage

__all__ = ["Owner", "RunDirectory"]

PACKAGES = ("psgd", "ray", "numpy", "pydantic", "safetensors", "fsspec")


@dataclass(frozen=True, slots=True)
class Owner:
    """The driver that a run belongs to."""

    driver: str  # random
    incarnation: int  # of the server it started last: one more than any before
    host: str
    pid: int
    started: float  # Unix time, seconds


class RunDirectory:
    """One run's directory.

    Args:
        storage: the folder; it need not exist.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._owner: Owner | None = None
        self.is_ours = True  # as far as we know
        self._log = Log(storage)
        self._taken: set[str] = set()  # commands that may still be in the directory

    @property
    def incarnation(self) -> int:
        """Of the server that was started last."""
        assert self._owner is not None
        return self._owner.incarnation

    @property
    def exists(self) -> bool:
        return self.storage.exists("resolved.json")

    def begin(self, spec: JobSpec) -> None:
        """Describe the run; a resumed one keeps its first description, but for the path to its data."""
        if self.exists:
            self._note_path(spec)
            return
        tree = spec.model_dump(mode="json", exclude_unset=True)
        packages = {name: version(name) for name in PACKAGES}
        env = {"python": platform.python_version(), "platform": platform.platform(), "packages": packages}
        self.storage.write("spec.yaml", yaml.safe_dump(tree, sort_keys=False).encode())
        self.storage.write("env.json", _json(env))
        self.storage.write("resolved.json", _json(spec.model_dump(mode="json")))

    def _note_path(self, spec: JobSpec) -> None:
        """Let `psgd replay` find the data where it lies now."""
        before = json.loads(self.storage.read("resolved.json"))
        now = before | {"data": spec.model_dump(mode="json")["data"]}
        if now != before:
            self.storage.write("resolved.json", _json(now))

    def check_identity(self, spec: JobSpec) -> None:
        """Refuse to resume a run as another job.

        Raises:
            ResumeError: naming the fields that differ.
        """
        before = JobSpec.model_validate_json(self.storage.read("resolved.json")).identity()
        changed = sorted(_differences("", before, spec.identity()))
        if changed:
            raise ResumeError(
                f"{self.storage.url} is a run of another job; these fields may not change on resuming: "
                f"{'; '.join(changed)}. Give the new job another --name"
            )

    def own(self) -> Owner:
        """Take the run over: whoever owned it before stops at its next commit."""
        before = self._read_owner()["incarnation"] if self.storage.exists("owner") else 0
        self._owner = Owner(uuid4().hex, before + 1, socket.gethostname(), os.getpid(), time.time())
        self.storage.write("owner", _json(asdict(self._owner)))
        return self._owner

    def check_owner(self) -> None:
        """Make sure that no other driver took the run over.

        Raises:
            OwnershipError: one did.
            StorageError: nobody knows.
        """
        found = self._read_owner()
        if self._owner is None or found["driver"] != self._owner.driver:
            self.is_ours = False
            raise OwnershipError(
                f"the run in {self.storage.url} was taken over by process {found['pid']} on {found['host']}; "
                "this driver stops and commits nothing"
            )
        if found["incarnation"] < self._owner.incarnation:  # it could not be written when it was taken
            self.storage.write("owner", _json(asdict(self._owner)))

    def _read_owner(self) -> dict[str, Any]:
        try:
            found = json.loads(self.storage.read("owner"))
            found["driver"], found["incarnation"], found["pid"], found["host"]
        except (ValueError, TypeError, KeyError) as error:
            raise StorageError(
                f"{self.storage.url}/owner is damaged ({error}): restore it, or start a new --name"
            ) from error
        else:
            return dict(found)

    def next_incarnation(self) -> int:
        """For one more server of this driver's: one more than any before.

        It is noted before anything is committed, if it cannot be noted now.

        Raises:
            OwnershipError: another driver took the run over.
        """
        assert self._owner is not None
        self._owner = replace(self._owner, incarnation=self._owner.incarnation + 1)
        self._log.attempt(self.check_owner, last=True)
        return self._owner.incarnation

    def bear_faults(self, tell: Callable[[str], None]) -> None:
        """From now on storage that fails does not stop the run: what it lacks is written later, if it can be.

        Args:
            tell: is given the first fault.
        """
        self._log.bear_faults(tell)

    def event(self, kind: str, **fields: Any) -> None:
        """Add a line to `events.jsonl`."""
        self._log.add("events.jsonl", _line({"time": time.time(), "event": kind, **fields}))

    def metrics(self, values: dict[str, float | None]) -> None:
        """Add a line to `metrics.jsonl`."""
        self._log.add("metrics.jsonl", _line({"time": time.time(), **values}))

    def finish(self, result: Result) -> None:
        """Write `result.json`, and what could not be written before."""
        self._log.close()
        self._log.attempt(lambda: self._log.storage.write("result.json", _json(result.to_dict())), last=True)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the run; None if it is not there (yet)."""
        self.check_exists()
        return json.loads(self.storage.read(name)) if self.storage.exists(name) else None

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """The records of a JSON-lines file of the run; a line that a crash cut short is left out."""
        self.check_exists()
        text = self.storage.read(name).decode(errors="replace") if self.storage.exists(name) else ""
        return [record for line in text.splitlines() if (record := _parse_line(line)) is not None]

    def check_exists(self) -> None:
        if not self.exists:
            raise RunNotFoundError(f"there is no run in {self.storage.url}; name it as in `--name`, and its --storage")

    def command(self, kind: str, settings: Sequence[str] = ()) -> str:
        """Ask the run's driver for something; its answer in `events.jsonl` names the id that is returned."""
        self.check_exists()
        identifier = f"{time.time_ns()}-{uuid4().hex[:8]}"
        self.storage.write(
            f"commands/{identifier}.json", _json({"id": identifier, "command": kind, "settings": [*settings]})
        )
        return identifier

    def take_commands(self) -> list[dict[str, Any]]:
        """Commands that came since the last call, oldest first; they are gone from the directory then."""
        taken: list[dict[str, Any]] = []
        self._log.attempt(lambda: self._take_commands(taken))
        return taken

    def _take_commands(self, taken: list[dict[str, Any]]) -> None:
        storage = self._log.storage
        names = [name for name in storage.names("commands") if name.endswith(".json")]  # else it is being written
        for name in names:
            if name not in self._taken:
                taken.append(_command(name, storage.read(f"commands/{name}")))
                self._taken.add(name)
        for name in names:
            storage.delete(f"commands/{name}")
            self._taken.discard(name)


def _command(name: str, text: bytes) -> dict[str, Any]:
    """A command file's content; what is no command at all is answered like an unknown one, not with a crash."""
    try:
        tree = json.loads(text)
    except ValueError:
        tree = None
    fields = tree if isinstance(tree, dict) else {}
    settings = fields.get("settings")
    known = isinstance(settings, list) and all(isinstance(setting, str) for setting in settings)
    return {"id": name.removesuffix(".json"), "command": fields.get("command"), "settings": settings if known else []}


def _parse_line(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _line(value: Any) -> bytes:
    return (json.dumps(value) + "\n").encode()


def _differences(path: str, before: Any, now: Any) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = before.keys() | now.keys()
        return [
            difference
            for key in keys
            for difference in _differences(f"{path}.{key}".lstrip("."), before.get(key), now.get(key))
        ]
    return [] if before == now else [f"{path} was {before!r} and is {now!r}"]
