"""The run directory: everything a run leaves behind, under fixed names.

spec.yaml          the job as it was given      resolved.json   ... with every default
env.json           versions of what ran it      owner           the driver that may commit
metrics.jsonl      numbers over time            events.jsonl    what happened, and why
checkpoints/       see psgd.store.checkpoints         journal/        one record per push
commands/          what `psgd stop` asked for   refused/        entries of commands/ that are no files
heartbeat          a sign of life without log   result.json     how it ended
"""

from __future__ import annotations

import platform
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from typing import Any
from uuid import uuid4

import yaml

from psgd.errors import OwnershipError, ResumeError, RunNotFoundError, RunNotRunningError, StorageError
from psgd.jsontext import to_json
from psgd.result import Result
from psgd.spec import JobSpec
from psgd.spec.reader import parse_spec
from psgd.store.commands import MOST_BYTES, MOST_TAKEN, Command, Kind, Refusal, make_command, read_command
from psgd.store.event_log import RETRY_S, Log
from psgd.store.liveness import HEARTBEAT_S, Liveness, judge
from psgd.store.owner import Owner
from psgd.store.records import parse_document, parse_lines
from psgd.store.storage import Storage

__all__ = ["RunDirectory"]

MOST_DOCUMENT = 2**24  # bytes of a JSON file
PACKAGES = ("psgd", "ray", "numpy", "pydantic", "safetensors", "fsspec")


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
        self._first_incarnation = 0
        self._signed_at = float("-inf")  # when the newest line was added
        self._commands_at = float("-inf")  # when commands are looked for again
        self._commands_fault = ""  # why they could not be looked for
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
        """Note the present path to the data, for `psgd replay`."""
        before = self._read_document("resolved.json")
        now = before | {"data": spec.model_dump(mode="json")["data"]}
        if now != before:
            self.storage.write("resolved.json", _json(now))

    def check_identity(self, spec: JobSpec) -> None:
        """Refuse to resume a run as another job.

        Raises:
            ResumeError: naming the fields that differ.
        """
        before = self.read_spec().identity()
        changed = sorted(_differences("", before, spec.identity()))
        if changed:
            raise ResumeError(
                f"{self.storage.url} is a run of another job; these fields may not change on resuming: "
                f"{'; '.join(changed)}. Give the new job another --name"
            )

    def read_spec(self) -> JobSpec:
        """Return the job as `resolved.json` has it.

        Raises:
            RunNotFoundError: there is no run here.
            DamagedFileError: the file is no JSON object.
            SpecError: it is no job that this psgd knows.
        """
        return parse_spec(self.read_json("resolved.json") or {}, f"{self.storage.url}/resolved.json")

    def read_owner(self) -> Owner | None:
        """Return the driver that the run belongs to; None if it never had one.

        Raises:
            DamagedFileError: the file does not tell.
        """
        if not self.storage.exists("owner"):
            return None
        found = self._read_document("owner")
        return Owner(**{field.name: found[field.name] for field in fields(Owner)})

    @property
    def owned_by(self) -> str | None:
        """Id of the driver that took the run over last; None if none did yet."""
        owner = self.read_owner()
        return None if owner is None else owner.driver

    def own(self) -> Owner:
        """Take the run over: whoever owned it before stops at its next commit."""
        before = self.read_owner()
        self._owner = Owner.this_process(before.incarnation + 1 if before else 1)
        self._first_incarnation = self._owner.incarnation
        self.storage.write("owner", _json(asdict(self._owner)))
        return self._owner

    def check_owner(self) -> None:
        """Make sure that no other driver took the run over.

        Raises:
            OwnershipError: one did.
            StorageError: `owner` cannot be read.
        """
        found = self.read_owner()
        if found is None:
            raise StorageError(f"cannot read 'owner' in {self.storage.url}: it is not there")
        if self._owner is None or found.driver != self._owner.driver:
            self.is_ours = False
            raise OwnershipError(
                f"the run in {self.storage.url} was taken over by process {found.pid} on {found.host}; "
                "this driver stops and commits nothing"
            )
        if found.incarnation < self._owner.incarnation:  # it could not be written when it was taken
            self.storage.write("owner", _json(asdict(self._owner)))

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
        self._add("events.jsonl", {"event": kind, **fields})

    def metrics(self, values: dict[str, float | None]) -> None:
        """Add a line to `metrics.jsonl`."""
        self._add("metrics.jsonl", values)

    def _add(self, file: str, values: dict[str, Any]) -> None:
        self._signed_at = time.monotonic()
        self._log.add(file, (to_json({"time": time.time(), **values}) + "\n").encode())

    def beat(self, now: float) -> None:
        """Give a sign of life, if the log gave none of late.

        Args:
            now: monotonic time, seconds.
        """
        if now - self._signed_at >= HEARTBEAT_S:
            self._signed_at = now
            beat = _json({"time": time.time()})
            self._log.attempt(lambda: self._log.storage.write("heartbeat", beat))

    def finish(self, result: Result) -> None:
        """Write `result.json`, and what could not be written before."""
        self._log.close()
        self._log.attempt(lambda: self._log.storage.write("result.json", _json(result.to_dict())), last=True)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return a JSON file of the run; None if it is not there (yet).

        Raises:
            RunNotFoundError: there is no run here.
            DamagedFileError: the file is not what psgd writes there.
        """
        self.check_exists()
        return self._read_document(name) if self.storage.exists(name) else None

    def _read_document(self, name: str) -> dict[str, Any]:
        return parse_document(name, self.storage.read(name, MOST_DOCUMENT), f"{self.storage.url}/{name}")

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """Return the records of a JSON-lines file of the run; a line that a crash cut short is left out.

        Raises:
            RunNotFoundError: there is no run here.
            DamagedFileError: a line is not what psgd writes there.
        """
        self.check_exists()
        text = self.storage.read(name) if self.storage.exists(name) else b""
        return parse_lines(name, text, f"{self.storage.url}/{name}")

    def check_exists(self) -> None:
        if not self.exists:
            raise RunNotFoundError(
                f"there is no run in {self.storage.url}: give the name and the --storage that it was trained with"
            )

    def liveness(self) -> Liveness:
        """Return whether the run's driver runs, has ended, or was lost.

        Raises:
            RunNotFoundError: there is no run here.
            DamagedFileError: a file of the run is damaged.
        """
        marks = [line for line in self.read_lines("events.jsonl") if line["event"] in ("started", "finished")]
        ended = bool(marks) and marks[-1]["event"] == "finished" and self.read_json("result.json") is not None
        newest = [line for name in ("events.jsonl", "metrics.jsonl") for line in self.read_lines(name)[-1:]]
        signs = [line["time"] for line in [*newest, self.read_json("heartbeat")] if line]
        return judge(self.read_owner(), ended, signs, self.read_spec().failure.timeout_s, time.time())

    @property
    def resume_command(self) -> str:
        """The command that continues the run."""
        folder, _, name = self.storage.url.rpartition("/")
        job = "JOB.yaml" if "://" in folder else f"{self.storage.url}/spec.yaml"
        return shlex.join(["psgd", "train", job, "--name", name, "--storage", folder, "--resume"])

    def command(self, kind: Kind, settings: Sequence[str] = ()) -> str:
        """Ask the run's driver for something; its answer in `events.jsonl` names the id that is returned.

        Raises:
            RunNotFoundError: there is no run here.
            RunNotRunningError: no driver runs that could obey.
            SpecError: the settings are too long, or too many.
        """
        liveness = self.liveness()
        owner = self.read_owner()
        if liveness.status != "running" or owner is None:
            state = "has ended" if liveness.status == "ended" else f"was lost: {liveness.reason}"
            raise RunNotRunningError(
                f"psgd {kind} is for a run that trains, and the run in {self.storage.url} {state}. To continue it: "
                f"{self.resume_command}"
            )
        identifier = f"{time.time_ns()}-{uuid4().hex[:8]}"
        command = make_command(identifier, owner.incarnation, kind, settings)
        self.storage.write(f"commands/{identifier}.json", _json(command.model_dump()))
        return identifier

    def take_commands(self) -> list[Command | Refusal]:
        """Return the commands that came since the last call, oldest first, and take them out of the directory.

        What is no command for this driver is returned as a refusal. A folder that cannot be read is told once.
        """
        now = time.monotonic()
        if now < self._commands_at or self._log.rests:
            return []
        try:
            files = self._log.storage.take_out("commands", MOST_TAKEN, MOST_BYTES, self._taken)
        except StorageError as error:
            self._commands_at = now + RETRY_S
            known, self._commands_fault = self._commands_fault, str(error)
            return [] if known == str(error) else [Refusal("commands", f"the folder cannot be read: {error}")]
        self._commands_fault = ""
        return [read_command(file, self._first_incarnation) for file in files]


def _json(value: Any) -> bytes:
    return (to_json(value, indent=2) + "\n").encode()


def _differences(path: str, before: Any, now: Any) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = before.keys() | now.keys()
        return [
            difference
            for key in keys
            for difference in _differences(f"{path}.{key}".lstrip("."), before.get(key), now.get(key))
        ]
    return [] if before == now else [f"{path} was {before!r} and is {now!r}"]
