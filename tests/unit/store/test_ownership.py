"""Drivers that take over the same run at the same instant: one wins, and the other writes nothing into the run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from psgd.errors import OwnershipError, PsgdError, RunExistsError, StorageError
from psgd.store.run_directory import RunDirectory
from psgd.store.storage import Storage
from tests.support.minimal_specs import spec
from tests.support.run_records import finish, start

ROUNDS = 10
DRIVER = """
import sys
from psgd.errors import RunExistsError
from psgd.store.run_directory import RunDirectory
from psgd.store.storage import Storage

print("ready", flush=True)
for line in sys.stdin:
    run = RunDirectory(Storage(line.strip()))
    try:
        run.take_over(None)
        run.event("started", incarnation=1, resumed=None)
        print("took", flush=True)
    except RunExistsError as error:
        print(error, flush=True)
"""


class Stepped(Storage):
    """A folder, each call of whose filesystem is a step.

    Attributes:
        steps: number of steps so far.
        meanwhile: called before each step, with its number.
    """

    steps = 0
    meanwhile: Callable[[int], None] = staticmethod(lambda step: None)

    def _call_filesystem(self, doing: str, call: Any, size: int = 0) -> Any:
        self.steps += 1
        self.meanwhile(self.steps)
        return super()._call_filesystem(doing, call, size)


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the folder of a run: on a disk, then in an object store, which has no locks."""
    return str(tmp_path / "run") if request.param == "local" else f"memory://{uuid4().hex}/run"


def begun(url: str) -> str | None:
    """Let a driver begin a run and end. Return its id."""
    run = RunDirectory(Storage(url))
    run.own()
    run.begin(spec())
    start(run)
    return run.owned_by


def files(url: str) -> dict[str, bytes]:
    """Return the content of the files of a run."""
    storage = Storage(url)
    return {name: storage.read(name) for name in storage.names("") if "." in name or name in ("owner", "heartbeat")}


@pytest.mark.parametrize("resumes", [False, True], ids=["start", "resume"])
@pytest.mark.parametrize("step", range(1, 12))
def test_whatever_the_moment_one_driver_wins_and_the_other_writes_nothing(url: str, resumes: bool, step: int) -> None:
    former = begun(url) if resumes else None
    second = RunDirectory(Storage(url))
    errors: list[PsgdError] = []

    def take_second(now: int) -> None:
        if now == step:
            attempt(second, former, errors)

    storage = Stepped(url)
    storage.meanwhile = take_second
    first = RunDirectory(storage)
    attempt(first, former, errors)
    storage.meanwhile = lambda step: None
    if storage.steps < step:
        attempt(second, former, errors)
    owner = RunDirectory(Storage(url)).owned_by
    (winner,) = [run for run in (first, second) if run._owner is not None and run._owner.driver == owner]
    loser = second if winner is first else first
    winner.begin(spec())
    start(winner, incarnation=2)
    before = files(url)
    write_everything(loser)
    assert files(url) == before
    assert all(isinstance(error, RunExistsError) for error in errors)
    assert len(errors) == 1 or url.startswith("memory"), "a lock lets one driver win"
    winner.check_owner()


def attempt(run: RunDirectory, former: str | None, errors: list[PsgdError]) -> None:
    try:
        run.take_over(former)
    except PsgdError as error:
        errors.append(error)


def write_everything(run: RunDirectory) -> None:
    """Make a driver write all that it may write, if it believes that it owns the run."""
    if run._owner is None:
        return
    actions: list[Callable[[], object]] = [
        run.check_owner,
        lambda: run.begin(spec(name="other")),
        run.next_incarnation,
        lambda: start(run),
        lambda: run.metrics({"train/loss": 1.0}),
        lambda: run.beat(1e9),
        run.take_commands,
    ]
    for action in actions:
        run.is_ours = True  # as if this were its first action since
        with pytest.raises(OwnershipError, match="was taken over by process"):
            action()
    run.event("finished")  # no error: the driver knows already
    with pytest.raises(OwnershipError):
        finish(run)


def test_of_two_processes_one_takes_the_run(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DRIVER]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as one,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other,
    ):
        processes = (one, other)
        assert [read(process) for process in processes] == ["ready", "ready"]
        for number in range(ROUNDS):
            url = str(tmp_path / str(number))
            for process in processes:
                tell(process, url)
            took, lost = sorted((read(process) for process in processes), key=lambda answer: answer != "took")
            assert took == "took"
            assert f"another driver took over the run in {url}" in lost
            assert [path.name for path in sorted(Path(url).iterdir())] == ["events.jsonl", "owner"]
            assert Path(url, "events.jsonl").read_text().count("\n") == 1
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()


def tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def read(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_lock_ends_with_its_block_and_keeps_others_out(tmp_path: Path) -> None:
    folder = Storage(tmp_path / "run")
    for _ in range(2):
        with folder.locked() as one, Storage(tmp_path / "run").locked() as other:
            assert (one, other) == (True, False)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_that_cannot_be_locked_is_taken_without_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    run = RunDirectory(Storage(tmp_path / "run"))
    run.take_over(None)
    run.check_owner()


@pytest.mark.parametrize("harm", ["damaged", "gone"])
def test_while_the_owner_cannot_be_told_the_log_goes_on_but_nothing_is_committed(url: str, harm: str) -> None:
    run = RunDirectory(Storage(url))
    run.take_over(None)
    run.begin(spec())
    if harm == "damaged":
        run.storage.write("owner", b"[" * 1000)
    else:
        run.storage.delete("owner")
    start(run)
    with pytest.raises(StorageError, match="owner"):
        run.check_owner()
    (refusal,) = run.take_commands()
    assert "owner" in str(refusal)
    finish(run)
    assert [line["event"] for line in run.read_lines("events.jsonl")] == ["started", "finished"]
