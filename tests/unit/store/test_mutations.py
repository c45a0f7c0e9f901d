"""Damaged copies of every file of a run: each is refused with a typed error, at once and within bounded memory."""

from __future__ import annotations

import shutil
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psgd.errors import CheckpointError, JournalError, PsgdError, SpecError
from psgd.jsontext import to_json
from psgd.replay.lineage import read_lineage
from psgd.replay.replay import replay
from psgd.spec import JobSpec
from psgd.spec.changes import change_settings, change_workers
from psgd.store.checkpoints import Checkpoint, Checkpoints
from psgd.store.commands import MOST_BYTES, Command, make_command, read_command
from psgd.store.foreign import TakenFile
from psgd.store.manifest import Manifest
from psgd.store.run_directory import RunDirectory
from psgd.store.segments import parse_segment
from psgd.store.storage import Storage
from psgd_workers.messages import FloatArray
from tests.support.mutations import mutations
from tests.support.recorded_run import digits, record, run_directory
from tests.support.run_records import finish

SLOWEST_S = 5.0  # of this process, for one copy
MOST_MEMORY = 200 * 2**20  # bytes above the size of the copy
LONGEST_REASON = 30_000  # characters; an error about a job lists many faults
REPLAYS = 10  # a replay takes longer than a read: one for this number of copies
TRACED = 4  # tracing the memory takes longer than a read: it is done for one of this number of copies

numbers = pytest.mark.parametrize(
    "number", [300, pytest.param(10_000, marks=[pytest.mark.chaos, pytest.mark.timeout(7200)])]
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of two servers that was trained, resumed and has ended; it is not changed."""
    folder = tmp_path_factory.mktemp("original")
    often = {"every_s": None, "every_updates": 20, "keep": 2}
    spec = digits(scaling={"workers": 2, "servers": 2}, run={"epochs": 1}, checkpoint=often)
    run = run_directory(folder)
    record(run, spec)
    record(run, spec.model_copy(update={"run": spec.run.model_copy(update={"epochs": 2})}))
    run.metrics({"train/loss": 0.5, "val/loss": None})
    run.beat(float("inf"))
    finish(run)
    return folder / "run"


@pytest.fixture
def run(original: Path, tmp_path: Path) -> RunDirectory:
    """Return the directory of a copy of that run, which a test may damage."""
    shutil.copytree(original, tmp_path / "run")
    return run_directory(tmp_path)


@contextmanager
def bounded(size: int, is_traced: bool = True) -> Iterator[None]:
    """Fail if the block takes too long or, if its memory is traced, more than `MOST_MEMORY` above the size."""
    if is_traced:
        tracemalloc.start()
    began = time.process_time()
    try:
        yield
    finally:
        took_s = time.process_time() - began
        _, peak = tracemalloc.get_traced_memory()  # 0 if the memory is not traced
        tracemalloc.stop()
        assert took_s < SLOWEST_S
        assert peak < size + MOST_MEMORY


def refusals(path: Path, number: int, read: Callable[[], object], typed: type[Exception] = PsgdError) -> int:
    """Read damaged copies of a file. Return how many were refused, each with an error of a type and of one line.

    Args:
        path: the file.
        number: number of copies.
        read: reads the file.
        typed: type of the errors.
    """
    content = path.read_bytes()
    refused = 0
    for index, copy in enumerate(mutations(content, number, seed=7)):
        path.write_bytes(copy)
        reason = refusal(read, len(copy), typed, index % TRACED == 0)
        refused += reason is not None
        assert reason is None or 0 < len(reason) < LONGEST_REASON
    path.write_bytes(content)
    return refused


def refusal(read: Callable[[], object], size: int, typed: type[Exception], is_traced: bool = True) -> str | None:
    """Return the message of the error that a read raises, or None."""
    try:
        with bounded(size, is_traced):
            read()
    except typed as error:
        return str(error)
    return None


READERS: dict[str, Callable[[RunDirectory], object]] = {
    "owner": lambda run: run.read_owner(),
    "resolved.json": lambda run: run.read_spec(),
    "result.json": lambda run: run.read_json("result.json"),
    "env.json": lambda run: run.read_json("env.json"),
    "heartbeat": lambda run: run.read_json("heartbeat"),
    "events.jsonl": lambda run: run.read_lines("events.jsonl"),
    "metrics.jsonl": lambda run: run.read_lines("metrics.jsonl"),
}


@numbers
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_text_file_is_read_or_refused(run: RunDirectory, name: str, number: int) -> None:
    def read() -> None:
        READERS[name](run)

    def judge() -> None:
        assert run.liveness().status in ("running", "ended", "lost")

    path = Path(run.storage.url, name)
    least = 0 if name.endswith(".jsonl") else number / 20  # a line that is cut short is skipped
    assert refusals(path, number, read) > least
    if name in ("owner", "heartbeat", "events.jsonl"):
        assert refusals(path, number // REPLAYS, judge) > least / REPLAYS


def newest(run: RunDirectory) -> Checkpoint:
    checkpoint = Checkpoints(run.storage).newest(refused=lambda _: None)
    assert checkpoint is not None
    return checkpoint


def alone(run: RunDirectory) -> Path:
    """Delete all checkpoints but the newest. Return its folder."""
    Checkpoints(run.storage).prune(keep=1)
    (name,) = Checkpoints(run.storage).names()
    return Path(run.storage.url, "checkpoints", name)


def content(checkpoint: Checkpoint) -> tuple[Manifest, FloatArray, list[Any]]:
    """Return all that a run continues from."""
    states = [
        (state.metadata, {name: array.tobytes() for name, array in state.arrays.items()})
        for state in checkpoint.states()
    ]
    return checkpoint.manifest, checkpoint.weights(), states


@numbers
@pytest.mark.parametrize("file", ["COMMITTED", "server-0.json", "server-1.safetensors"])
def test_a_damaged_checkpoint_that_opens_is_the_same(run: RunDirectory, file: str, number: int) -> None:
    path = alone(run) / file
    manifest, weights, states = content(newest(run))

    def compare() -> None:
        found_manifest, found_weights, found_states = content(newest(run))
        assert found_manifest == manifest
        assert found_weights.tobytes() == weights.tobytes()
        assert found_states == states

    assert refusals(path, number, compare, CheckpointError) > number * 0.8


@numbers
@pytest.mark.parametrize("file", ["server-0.json", "server-1.safetensors"])
def test_a_part_whose_checksum_holds_is_read_or_refused(run: RunDirectory, file: str, number: int) -> None:
    """The checksums were computed from a file that was damaged already."""
    path = alone(run) / file
    checkpoint = newest(run)
    assert refusals(path, number, checkpoint.states, CheckpointError) > number / 20


def segment(run: RunDirectory) -> Path:
    """Return the first segment of the journal, whose checksum was deleted together with its checkpoint."""
    alone(run)
    return min(Path(run.storage.url, "journal").glob("*-server-0.npy"))


@numbers
def test_a_damaged_journal_without_a_checksum_is_read_or_refused(run: RunDirectory, number: int) -> None:
    path = segment(run)
    manifest = newest(run).manifest
    assert refusals(path, number, lambda: read_lineage(run, manifest, 0), JournalError) > number / 4


@numbers
def test_a_lineage_of_damaged_events_is_read_or_refused(run: RunDirectory, number: int) -> None:
    manifest = newest(run).manifest
    path = Path(run.storage.url, "events.jsonl")
    few = number // REPLAYS
    assert refusals(path, few, lambda: read_lineage(run, manifest, 0, branches=True)) > few / 20


@numbers
def test_a_damaged_journal_with_a_checksum_is_refused(run: RunDirectory, number: int) -> None:
    alone(run)
    manifest = newest(run).manifest
    path = Path(run.storage.url, "journal", max(manifest.journal))
    partition = int(path.stem[-1])
    assert refusals(path, number, lambda: read_lineage(run, manifest, partition), JournalError) == number


@numbers
def test_a_damaged_journal_of_unknown_partitions_is_read_or_refused(run: RunDirectory, number: int) -> None:
    path = segment(run)
    assert refusals(path, number, lambda: parse_segment(path.read_bytes(), str(path)), JournalError) > number / 4


@numbers
def test_a_replay_of_a_damaged_journal_disagrees_or_is_refused(run: RunDirectory, number: int) -> None:
    path = segment(run)
    weights = newest(run).weights()

    def recompute() -> None:
        result = replay(run)
        if result.agrees:  # the damage changed nothing that a replay needs, such as a time
            assert newest(run).weights().tobytes() == weights.tobytes()

    assert refusals(path, number // REPLAYS, recompute) > number / REPLAYS / 20


@numbers
def test_a_damaged_command_is_read_or_refused(number: int) -> None:
    spec = digits()
    refused = 0
    for kind, settings in (("set", ["optimizer.lr=0.1", "consistency={mode: ssp, s: 3}"]), ("scale", ["4"])):
        made = make_command("1", 3, kind, settings)  # type: ignore[arg-type]
        for index, copy in enumerate(mutations(to_json(made.model_dump()).encode(), number, seed=8)):
            with bounded(len(copy), index % TRACED == 0):
                command = read_command(TakenFile("1.json", copy[:MOST_BYTES], ""), 3)
                refused += not isinstance(command, Command) or not is_followed(spec, command)
    assert refused > number


def is_followed(spec: JobSpec, command: Command) -> bool:
    """Return True if a command changes the job, and False if it is refused."""
    try:
        if command.command == "set":
            change_settings(spec, command.settings)
        elif command.command == "scale":
            change_workers(spec, *command.settings[:1] or [""])
    except SpecError:
        return False
    return True


@numbers
def test_a_damaged_setting_is_read_or_refused(number: int) -> None:
    spec = digits()
    setting = b"optimizer={lr: 0.1, schedule: {name: cosine, total: 100}, max_grad_norm: 1.0}"
    for index, copy in enumerate(mutations(setting, number, seed=9)):
        with bounded(len(copy), index % TRACED == 0):
            command = Command.model_construct(id="1", incarnation=1, command="set", settings=[copy.decode("latin-1")])
            is_followed(spec, command)


@pytest.mark.parametrize("name", ["owner", "resolved.json", "result.json", "events.jsonl", "checkpoints/{}/COMMITTED"])
def test_a_file_of_a_gibibyte_is_refused_unread(run: RunDirectory, name: str) -> None:
    path = Path(run.storage.url, name.format(alone(run).name))
    with path.open("r+b") as file:
        file.truncate(2**30)

    def read() -> None:
        read_lineage(run, newest(run).manifest, 0)
        run.liveness()

    assert "has more than" in str(refusal(read, 0, PsgdError))


def test_an_unread_file_does_not_stop_other_checkpoints_from_being_found(run: RunDirectory) -> None:
    before, last = Checkpoints(run.storage).committed()[-2:]
    Storage(run.storage.url).write(f"checkpoints/{last}/COMMITTED", b" " * 2**25)
    assert newest(run).manifest.name == before
    assert np.isfinite(newest(run).weights()).all()
