"""The run directory: the files of a run, under fixed names.

spec.yaml        the job as it was given
resolved.json    the job with every default
env.json         versions of Python and of the packages that the run uses
owner            the driver that may commit
events.jsonl     events of the run, with their causes
metrics.jsonl    metrics over time
heartbeat        the driver's newest sign of life while it logs nothing
result.json      how the run ended
checkpoints/     see `psgd.store.checkpoints`
journal/         one record per push
commands/        commands of `psgd stop`, `set` and `scale` that the driver has not taken yet
refused/         entries of commands/ that were not regular files
"""

from __future__ import annotations

import os
import platform
import pwd
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from typing import Any
from uuid import uuid4

import yaml

from psgd.errors import (
    DamagedFileError,
    OwnershipError,
    ResumeError,
    RunExistsError,
    RunNotFoundError,
    RunNotRunningError,
    StorageError,
)
from psgd.jsontext import MOST_BYTES as MOST_JSON_BYTES
from psgd.jsontext import to_json
from psgd.result import Result
from psgd.spec import JobSpec
from psgd.spec.reader import parse_spec
from psgd.store.commands import MOST_BYTES, MOST_TAKEN, Command, CommandKind, Refusal, make_command, read_command
from psgd.store.event_log import RETRY_S, EventLog
from psgd.store.liveness import HEARTBEAT_S, Liveness, judge_liveness
from psgd.store.owner import Owner
from psgd.store.records import parse_document, parse_lines
from psgd.store.storage import Storage
from psgd_workers.redaction import redact

__all__ = ["RunDirectory"]

MOST_LOG_BYTES = 2**28  # largest size of a file of JSON lines that is read
PACKAGES = ("psgd", "ray", "numpy", "pydantic", "safetensors", "fsspec")


class RunDirectory:
    """The directory of one run.

    Args:
        storage: the folder, which need not exist.

    Attributes:
        storage: the folder.
        is_ours: False once this driver has seen that another driver took over the run.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._owner: Owner | None = None
        self.is_ours = True
        self._log = EventLog(storage, self._check_log_owner)
        self._first_incarnation = 0
        self._last_sign_at = float("-inf")  # monotonic time of the newest sign of life
        self._retry_commands_at = float("-inf")  # monotonic time; after a fault, commands/ is not read before it
        self._commands_fault = ""  # the last fault of reading commands/, or empty
        self._taken: set[str] = set()  # files of commands/ that were taken, but could not be deleted

    @property
    def incarnation(self) -> int:
        """Incarnation of the server that was started last."""
        assert self._owner is not None
        return self._owner.incarnation

    @property
    def exists(self) -> bool:
        """True if there is a run in this directory."""
        return self.storage.exists("resolved.json")

    def begin(self, spec: JobSpec) -> None:
        """Write the files that describe the run. A resumed run keeps them, except for the path to its data.

        Raises:
            OwnershipError: another driver has taken over the run.
        """
        self._check_log_owner()
        if self.exists:
            self._update_data_path(spec)
            return
        tree = spec.model_dump(mode="json", exclude_unset=True)
        packages = {name: version(name) for name in PACKAGES}
        env = {"python": platform.python_version(), "platform": platform.platform(), "packages": packages}
        self.storage.write("spec.yaml", yaml.safe_dump(tree, sort_keys=False).encode())
        self.storage.write("env.json", _json(env))
        self.storage.write("resolved.json", _json(spec.model_dump(mode="json")))

    def _update_data_path(self, spec: JobSpec) -> None:
        """Update the path to the data, for `psgd replay`."""
        before = self._read_document("resolved.json")
        now = before | {"data": spec.model_dump(mode="json")["data"]}
        if now != before:
            self.storage.write("resolved.json", _json(now))

    def check_identity(self, spec: JobSpec) -> None:
        """Refuse to resume the run as another job.

        Raises:
            ResumeError: the jobs differ. The message names the fields.
        """
        before = self.read_spec().identity()
        changed = sorted(_differences("", before, spec.identity()))
        if changed:
            raise ResumeError(
                f"{self.storage.url} is a run of another job. These fields must not change when a run is resumed: "
                f"{'; '.join(changed)}. Give the new job another --name"
            )

    def read_spec(self) -> JobSpec:
        """Return the job that `resolved.json` describes.

        Raises:
            RunNotFoundError: there is no run in this directory.
            DamagedFileError: the file is not a JSON object.
            SpecError: the object is not a job that this version of psgd knows.
        """
        return parse_spec(self.read_json("resolved.json") or {}, f"{self.storage.url}/resolved.json")

    def read_owner(self) -> Owner | None:
        """Return the driver that owns the run; None if no driver has owned it yet.

        Raises:
            DamagedFileError: the file is not what psgd writes there.
        """
        if not self.storage.exists("owner"):
            return None
        found = self._read_document("owner")
        return Owner(**{field.name: found[field.name] for field in fields(Owner)})

    @property
    def owned_by(self) -> str | None:
        """Id of the driver that owns the run; None if no driver has owned it yet."""
        owner = self.read_owner()
        return None if owner is None else owner.driver

    def take_over(self, former_driver: str | None) -> Owner:
        """Take over the run, unless another driver has done so since it was checked, or does so now.

        The driver that owned it before writes nothing more, and stops.

        Args:
            former_driver: id of the driver that owned the run when it was checked; None if it had no owner.

        Raises:
            RunExistsError: another driver took over the run. Nothing was written.
        """
        with self.storage.locked() as is_alone:
            if is_alone and self.owned_by == former_driver:
                owner = self.own()
                if self.owned_by == owner.driver:  # there is no lock in an object store
                    return owner
                self._owner = None
        raise RunExistsError(
            f"another driver took over the run in {self.storage.url} while Ray was started here: --resume takes it "
            "over again, another --name starts a new run"
        )

    def own(self) -> Owner:
        """Take over the run, whatever other drivers do."""
        before = self.read_owner()
        self._owner = Owner.this_process(before.incarnation + 1 if before else 1)
        self._first_incarnation = self._owner.incarnation
        self.storage.write("owner", _json(asdict(self._owner)))
        return self._owner

    def check_owner(self) -> None:
        """Raise an error unless this driver still owns the run.

        Raises:
            OwnershipError: another driver took over the run.
            DamagedFileError: it is not known which driver owns the run, because `owner` is damaged or gone.
            StorageError: `owner` cannot be read.
        """
        found = self._find_owner(self.storage)
        if self._owner is not None and found.incarnation < self._owner.incarnation:
            self.storage.write("owner", _json(asdict(self._owner)))  # this failed when the server was started

    def _find_owner(self, storage: Storage) -> Owner:
        """Return the owner of the run, which is this driver; see `check_owner`."""
        found = RunDirectory(storage).read_owner()
        if found is None:
            raise DamagedFileError(
                f"cannot read 'owner' in {storage.url}: it is not there. Restore the file from a copy, or stop this "
                "driver"
            )
        if self._owner is None or found.driver != self._owner.driver:
            self.is_ours = False
            raise OwnershipError(
                f"the run in {storage.url} was taken over by process {found.pid} on {found.host:.100}; "
                "this driver stops and writes nothing more there"
            )
        return found

    def _check_log_owner(self) -> None:
        """Raise an OwnershipError if another driver has taken over the run, which this one writes the log of.

        The log is also written while `owner` is damaged, because it says why nothing is saved.
        """
        if self._owner is not None:
            with suppress(DamagedFileError):
                self._find_owner(self._log.storage)

    def next_incarnation(self) -> int:
        """Return a new incarnation, for a server that this driver restores. It is higher than any before.

        If it cannot be written to `owner` now, it is written before the next commit.

        Raises:
            OwnershipError: another driver took over the run.
        """
        assert self._owner is not None
        self._owner = replace(self._owner, incarnation=self._owner.incarnation + 1)
        self._log.attempt(self.check_owner, last=True)
        return self._owner.incarnation

    def tolerate_faults(self, report: Callable[[str], None]) -> None:
        """Let the run continue from now on if a log file cannot be written. Its lines are written later, if possible.

        Args:
            report: called with a sentence about the first fault.
        """
        self._log.tolerate_faults(report)

    def event(self, kind: str, **fields: Any) -> None:
        """Append a line to `events.jsonl`, unless another driver is known to have taken over the run.

        Raises:
            OwnershipError: another driver has taken over the run.
        """
        self._add("events.jsonl", {"event": kind, **fields})

    def metrics(self, values: dict[str, float | None]) -> None:
        """Append a line to `metrics.jsonl`; see `event`."""
        self._add("metrics.jsonl", values)

    def _add(self, file: str, values: dict[str, Any]) -> None:
        if self.is_ours:
            self._last_sign_at = time.monotonic()
            self._log.add(file, (redact(to_json({"time": time.time(), **values})) + "\n").encode())

    def beat(self, now: float) -> None:
        """Write `heartbeat` if there was no other sign of life for `HEARTBEAT_S`.

        Args:
            now: monotonic time, seconds.
        """
        if self.is_ours and now - self._last_sign_at >= HEARTBEAT_S:
            self._last_sign_at = now
            self._log.attempt(lambda: self._write_as_owner("heartbeat", _json({"time": time.time()})))

    def finish(self, result: Result) -> None:
        """Write `result.json`, and all lines that could not be written before.

        Raises:
            OwnershipError: another driver has taken over the run.
        """
        text = redact(_json(result.to_dict()).decode()).encode()
        self._log.close()
        self._log.attempt(lambda: self._write_as_owner("result.json", text), last=True)

    def _write_as_owner(self, name: str, data: bytes) -> None:
        self._check_log_owner()
        self._log.storage.write(name, data)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return the content of a JSON file of the run; None if there is no such file.

        Raises:
            RunNotFoundError: there is no run in this directory.
            DamagedFileError: the content is not what psgd writes into this file.
        """
        self.check_exists()
        return self._read_document(name) if self.storage.exists(name) else None

    def _read_document(self, name: str) -> dict[str, Any]:
        return parse_document(name, self.storage.read(name, MOST_JSON_BYTES), f"{self.storage.url}/{name}")

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """Return the records of a JSON-lines file of the run. A line that a crash truncated is skipped.

        Raises:
            RunNotFoundError: there is no run in this directory.
            DamagedFileError: a line is not what psgd writes into this file.
        """
        self.check_exists()
        text = self.storage.read(name, MOST_LOG_BYTES) if self.storage.exists(name) else b""
        return parse_lines(name, text, f"{self.storage.url}/{name}")

    def check_exists(self) -> None:
        """Raise an error unless there is a run in this directory.

        Raises:
            RunNotFoundError: there is none.
        """
        if not self.exists:
            raise RunNotFoundError(
                f"there is no run in {self.storage.url}: give the name and the --storage that it was trained with"
            )

    def liveness(self) -> Liveness:
        """Return the state of the run's driver: running, ended or lost.

        Raises:
            RunNotFoundError: there is no run in this directory.
            DamagedFileError: a file of the run is damaged.
        """
        marks = [line for line in self.read_lines("events.jsonl") if line["event"] in ("started", "finished")]
        ended = bool(marks) and marks[-1]["event"] == "finished" and self.read_json("result.json") is not None
        newest = [line for name in ("events.jsonl", "metrics.jsonl") for line in self.read_lines(name)[-1:]]
        signs = [line["time"] for line in [*newest, self.read_json("heartbeat")] if line]
        return judge_liveness(self.read_owner(), ended, signs, self.read_spec().failure.timeout_s, time.time())

    @property
    def foreign_user(self) -> str | None:
        """Name of the other user that this directory belongs to; None if it belongs to the present user.

        An object store does not say which user wrote a run, so that the run may be of any user.
        """
        users = self.storage.users("", "resolved.json")
        if users is None:
            return "an unknown user (an object store does not name one)"
        return next((f"user {_user_name(user)}" for user in sorted(users) if user != os.geteuid()), None)

    @property
    def resume_command(self) -> str:
        """The command that continues the run."""
        folder, _, name = self.storage.url.rpartition("/")
        job = "JOB.yaml" if "://" in folder else f"{self.storage.url}/spec.yaml"
        return shlex.join(["psgd", "train", job, "--name", name, "--storage", folder, "--resume"])

    def command(self, kind: CommandKind, settings: Sequence[str] = ()) -> str:
        """Give a command to the run's driver, which will answer with an event in `events.jsonl`.

        Args:
            kind: kind of the command.
            settings: texts FIELD=VALUE for `set`, the number of workers for `scale`.

        Returns:
            The id of the command, which the driver's answer names.

        Raises:
            RunNotFoundError: there is no run in this directory.
            RunNotRunningError: no driver runs that could follow the command.
            SpecError: a setting is too long, or there are too many.
        """
        liveness = self.liveness()
        owner = self.read_owner()
        if liveness.status != "running" or owner is None:
            state = "has ended" if liveness.status == "ended" else f"was lost: {liveness.reason}"
            raise RunNotRunningError(
                f"psgd {kind} is for a run that trains, but the run in {self.storage.url} {state}. To continue it: "
                f"{self.resume_command}"
            )
        identifier = f"{time.time_ns()}-{uuid4().hex[:8]}"
        command = make_command(identifier, owner.incarnation, kind, settings)
        self.storage.write(f"commands/{identifier}.json", _json(command.model_dump()))
        return identifier

    def take_commands(self) -> list[Command | Refusal]:
        """Take the new commands out of the directory. Return them, oldest first.

        An entry that is no command for this driver is returned as a refusal. If the folder cannot be read, one refusal
        says so, and the next attempt is made after `RETRY_S`.

        Raises:
            OwnershipError: another driver has taken over the run.
        """
        now = time.monotonic()
        if now < self._retry_commands_at or self._log.is_paused:
            return []
        try:
            if self._owner is not None:
                self._find_owner(self._log.storage)  # else the commands may be for the new owner
            files = self._log.storage.take_out("commands", MOST_TAKEN, MOST_BYTES, self._taken)
        except StorageError as error:
            self._retry_commands_at = now + RETRY_S
            is_known = self._commands_fault == str(error)
            self._commands_fault = str(error)
            return [] if is_known else [Refusal("commands", f"the folder cannot be read: {error}")]
        self._commands_fault = ""
        return [read_command(file, self._first_incarnation) for file in files]


def _user_name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def _json(value: Any) -> bytes:
    return (to_json(value, indent=2) + "\n").encode()


def _differences(path: str, before: Any, now: Any) -> list[str]:
    """Describe each value that differs between two JSON values, with its path."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = before.keys() | now.keys()
        return [
            difference
            for key in keys
            for difference in _differences(f"{path}.{key}".lstrip("."), before.get(key), now.get(key))
        ]
    return [] if before == now else [f"{path} was {before!r} and is {now!r}"]
