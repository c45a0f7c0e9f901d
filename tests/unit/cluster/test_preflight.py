from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from psgd.cluster import preflight as module
from psgd.cluster.preflight import RunPlan, preflight
from psgd.errors import ClusterError, DamagedFileError, PsgdError, RunError, RunExistsError
from psgd.interruption import Interruption
from psgd.job import OpenJob
from psgd.monitoring.console import stderr_console
from psgd.monitoring.stages import Stages
from psgd.spec import JobSpec
from psgd.store.checkpoints import Checkpoints
from psgd.store.run_directory import RunDirectory
from psgd.store.storage import Storage
from tests.support.recorded_run import digits, record, run_directory

FUNCTIONS = (
    "find_address",
    "find_checkpoint",
    "check_checkpoint",
    "with_settings",
    "partition_weights",
    "check_room",
    "session",
)
METHODS = (
    *((Storage, "probe"), (RunDirectory, "check_identity"), (RunDirectory, "own")),
    *((OpenJob, "open"), (JobSpec, "warnings")),
)


@pytest.fixture
def meanwhile() -> list[Callable[[], object]]:
    """Return a list for functions that are called while Ray starts."""
    return []


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch, meanwhile: list[Callable[[], object]]) -> None:
    """Replace Ray by a cluster with room for every job."""

    @contextmanager
    def session(spec: JobSpec, address: str | None) -> Iterator[None]:
        for act in meanwhile:
            act()
        yield

    monkeypatch.setattr(module, "session", session)
    monkeypatch.setattr(module, "check_room", lambda spec, num_parameters: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def plan(folder: Path, spec: JobSpec | None = None, **options: Any) -> RunPlan:
    given = {"name": "run", "storage": str(folder), "address": None, "resume": False} | options
    given["interruption"] = Interruption()
    given["stages"] = Stages(stderr_console())
    with preflight(spec or digits(), **given) as made:
        return made


def counted(patch: pytest.MonkeyPatch) -> Counter[str]:
    """Return a counter of the calls of every check, by name."""
    calls = Counter[str]()

    def count(owner: Any, name: str) -> None:
        check = getattr(owner, name)

        def called(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return check(*arguments, **options)

        patch.setattr(owner, name, called)

    for name in FUNCTIONS:
        count(module, name)
    for owner, name in METHODS:
        count(owner, name)
    return calls


def test_each_check_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(run_directory(tmp_path), digits())
    calls = counted(monkeypatch)
    made = plan(tmp_path, resume=True)
    assert calls == dict.fromkeys([*FUNCTIONS, *(name for _, name in METHODS)], 1)
    assert made.checkpoint is not None
    assert made.checkpoint.manifest.name == Checkpoints(made.run.storage).committed()[-1]


def test_a_new_run_is_owned_and_nothing_else_is_written(tmp_path: Path) -> None:
    made = plan(tmp_path)
    assert made.checkpoint is None
    assert made.run.owned_by == made.owner.driver
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["owner"]
    assert (made.job.spec.name, made.job.spec.run.storage) == ("run", str(tmp_path))


def test_what_is_refused_leaves_the_run_to_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(run_directory(tmp_path), digits())
    owner = run_directory(tmp_path).owned_by

    def refuse(spec: JobSpec, num_parameters: int) -> None:
        raise ClusterError("no room")

    with pytest.raises(RunExistsError, match="--resume continues it"):
        plan(tmp_path)
    monkeypatch.setattr(module, "check_room", refuse)
    with pytest.raises(ClusterError, match="no room"):
        plan(tmp_path, resume=True)
    assert run_directory(tmp_path).owned_by == owner


@pytest.mark.parametrize("resume", [False, True])
def test_of_two_drivers_that_start_together_the_second_is_refused(
    tmp_path: Path, meanwhile: list[Callable[[], object]], resume: bool
) -> None:
    if resume:
        record(run_directory(tmp_path), digits())
    other = run_directory(tmp_path)
    meanwhile.append(other.own)
    with pytest.raises(RunExistsError, match=r"another driver took over the run in .* while Ray was started here"):
        plan(tmp_path, resume=resume)
    other.check_owner()


def test_what_the_driver_before_commits_while_ray_starts_is_continued_from(
    tmp_path: Path, meanwhile: list[Callable[[], object]]
) -> None:
    """The former driver also deletes the checkpoint that was the newest when the run was checked."""
    record(run_directory(tmp_path), digits())
    checkpoints = Checkpoints(run_directory(tmp_path).storage)
    (*_, newest) = checkpoints.committed()

    def commit() -> None:
        folder = tmp_path / "run" / "checkpoints"
        manifest = checkpoints.manifest(newest)
        (folder / newest).rename(folder / "000099-1")
        (folder / "000099-1" / "COMMITTED").unlink()
        checkpoints.commit(manifest.model_copy(update={"name": "000099-1"}))

    meanwhile.append(commit)
    made = plan(tmp_path, resume=True)
    assert made.checkpoint is not None
    assert made.checkpoint.manifest.name == "000099-1"


def test_an_address_is_refused_where_ray_is_connected_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    with pytest.raises(ClusterError, match=r"connected to a Ray cluster already.*'10\.0\.0\.1:6379'"):
        plan(tmp_path, address="10.0.0.1:6379")
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")  # not read, because Ray is connected
    assert plan(tmp_path).checkpoint is None


def test_a_driver_that_is_refused_records_nothing_in_the_run(
    tmp_path: Path, meanwhile: list[Callable[[], object]]
) -> None:
    record(run_directory(tmp_path), digits())
    checkpoints = Checkpoints(run_directory(tmp_path).storage)
    (*_, newest) = checkpoints.committed()
    checkpoints._run.write(f"checkpoints/{newest}/COMMITTED", b"{}")  # it is refused, which is an event
    events = (tmp_path / "run" / "events.jsonl").read_bytes()
    meanwhile.append(run_directory(tmp_path).own)
    with pytest.raises(RunExistsError):
        plan(tmp_path, resume=True)
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == events
    meanwhile.clear()
    plan(tmp_path, resume=True)
    assert run_directory(tmp_path).read_lines("events.jsonl")[-1]["event"] == "checkpoint_refused"


TEXTS = {"empty": b"", "deep": b"[" * 100_000, "list": b"[]", "binary": b"\xff", "object": b"{}"}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("name", ["owner", "resolved.json", "checkpoints/{}/COMMITTED"])
def test_a_run_with_a_damaged_file_is_not_begun_anew(tmp_path: Path, name: str, text: bytes) -> None:
    spec = digits(run={"epochs": 1}, checkpoint={"every_s": None, "every_updates": 1000, "keep": 1})
    run = run_directory(tmp_path)
    record(run, spec)
    owner = run.storage.read("owner")
    (checkpoint,) = Checkpoints(run.storage).names()
    run.storage.write(name.format(checkpoint), text)
    with pytest.raises(PsgdError) as refused:
        plan(tmp_path, spec, resume=True)
    assert not isinstance(refused.value, RunError)
    assert run.storage.read("owner") == (text if name == "owner" else owner)


@pytest.mark.parametrize("line", [b"[]", b'{"time": 1}', b'{"time": "1", "event": "checkpoint"}'])
def test_a_run_whose_checkpoints_and_events_are_damaged_is_not_begun_anew(tmp_path: Path, line: bytes) -> None:
    run = run_directory(tmp_path)
    record(run, digits(run={"epochs": 1}))
    run.storage.delete("checkpoints")
    run.storage.append("events.jsonl", line + b"\n")
    with pytest.raises(DamagedFileError, match=r"events\.jsonl, line \d+, is damaged"):
        plan(tmp_path, digits(run={"epochs": 1}), resume=True)
