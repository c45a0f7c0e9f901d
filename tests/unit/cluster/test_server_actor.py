from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psgd.cluster.server_actor import ServerActor
from psgd.core.context import RunContext
from psgd.core.server.journal import RECORD, RecordKind
from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition, partition_weights
from psgd.errors import StorageError
from psgd.store.checkpoint_part import Part, write_part
from psgd.store.checkpoints import Checkpoints
from psgd.store.run_directory import RunDirectory
from psgd.store.storage import Storage
from psgd_workers.gradients.layout import Layout
from psgd_workers.messages import FloatArray, Version
from tests.support.checkpoints import manifest
from tests.support.jobs import GRID, START, job


def test_a_save_that_failed_leaves_its_journal_to_the_next(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "run"))
    owner = RunDirectory(storage).own()
    partition = Partition(0, 0, len(START), len(START))
    layout = Layout.of({"weight": START})
    context = RunContext(job(), layout, GRID, (partition,), owner.driver, storage.url)

    async def saves() -> None:
        server = ServerActor(context, 0, owner.incarnation, START)
        await server.join("worker-0")
        storage.write("journal", b"a file where the folder should be")
        with pytest.raises(StorageError):
            await server.save("000001-1")
        storage.delete("journal")
        await server.leave("worker-0")
        await server.save("000002-1")
        await server.join("worker-1")
        await server.save("000003-1")

    asyncio.run(saves())
    segments = [np.load(path)["worker"].tolist() for path in sorted((tmp_path / "run" / "journal").iterdir())]
    assert segments == [[b"worker-0", b"worker-0"], [b"worker-1"]]


class SlowStorage:
    """A replacement for `write_part` that waits for permission.

    Attributes:
        begun: names of the checkpoints whose part was to be written.
        permitted: set when parts may be written.
    """

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.permitted = threading.Event()

    def write_part(self, run: Storage, checkpoint: str, *arguments: Any) -> Part:
        self.begun.append(checkpoint)
        assert self.permitted.wait(10)
        return write_part(run, checkpoint, *arguments)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SlowStorage:
    """Make server actors write their parts through a `SlowStorage`."""
    storage = SlowStorage()
    monkeypatch.setattr("psgd.cluster.server_actor.write_part", storage.write_part)
    return storage


def only_server(tmp_path: Path, timeout_s: float, **fields: Any) -> ServerActor:
    storage = Storage(str(tmp_path / "run"))
    owner = RunDirectory(storage).own()
    partition = Partition(0, 0, len(START), len(START))
    layout = Layout.of({"weight": START})
    made = job(failure={"timeout_s": timeout_s}, **fields)
    return ServerActor(
        RunContext(made, layout, GRID, (partition,), owner.driver, storage.url), 0, owner.incarnation, START
    )


LONG = {"epochs": 10_000}


@pytest.mark.parametrize(
    ("fields", "loads"),
    [
        ({"run": LONG}, True),
        ({"run": LONG | {"max_updates": 4999}}, False),
        ({"run": {"max_time_s": 5.0}}, True),
        ({"run": LONG | {"max_time_s": 4.9}}, False),
        ({"run": LONG, "consistency": {"mode": "bsp"}}, False),
        ({"run": LONG, "compression": {"name": "int8"}}, False),
    ],
)
def test_compiled_code_is_loaded_for_long_runs_whose_mode_can_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], loads: bool
) -> None:
    names: list[str] = []

    class NotedThread:
        def __init__(self, target: object, name: str, daemon: bool) -> None:
            names.append(name)

        def start(self) -> None:
            names.append("started")

    monkeypatch.setattr("psgd.cluster.server_actor.Thread", NotedThread)

    async def change() -> None:
        server = only_server(tmp_path, timeout_s=10, **fields)
        assert names == (["psgd-compile", "started"] if loads else [])
        await server.change(job(run=LONG).settings)  # to a mode that can use it
        assert len(names) == (2 if loads or fields == {"run": LONG, "consistency": {"mode": "bsp"}} else 0)

    asyncio.run(change())


def test_a_checkpoint_waits_for_the_one_that_is_being_written(tmp_path: Path, slow: SlowStorage) -> None:
    async def saves() -> None:
        server = only_server(tmp_path, timeout_s=10)
        first = asyncio.create_task(server.save("000001-1"))
        await asyncio.sleep(0)
        await server.join("worker-0")  # recorded in the journal after the first checkpoint
        second = asyncio.create_task(server.save("000002-1"))
        await asyncio.sleep(0)
        assert (await server.report(wait=False)).version.updates == 0  # the server answers while the part is written
        slow.permitted.set()
        await asyncio.gather(first, second)

    asyncio.run(saves())
    assert slow.begun == ["000001-1", "000002-1"]
    segments = [np.load(path)["worker"].tolist() for path in sorted((tmp_path / "run" / "journal").iterdir())]
    assert [worker for segment in segments for worker in segment] == [b"worker-0"]  # recorded once


def test_a_checkpoint_does_not_wait_for_ever(tmp_path: Path, slow: SlowStorage) -> None:
    async def saves() -> None:
        server = only_server(tmp_path, timeout_s=0.2)
        first = asyncio.create_task(server.save("000001-1"))
        await asyncio.sleep(0)
        with pytest.raises(StorageError, match=r"still being written after 0\.2 s"):
            await server.save("000002-1")
        slow.permitted.set()
        await first

    asyncio.run(saves())
    assert slow.begun == ["000001-1"]


def test_a_server_is_restored_from_a_checkpoint_of_another_number_of_servers(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "run"))
    owner = RunDirectory(storage).own()
    layout = Layout.of({"weight": START})
    made = job()
    parts = []
    for partition in partition_weights(len(START), len(START), 2):
        server = ParameterServer(made, partition, START[partition.start : partition.stop], GRID, Version(1, 7))
        parts.append(write_part(storage, "000001-1", server.state(), np.zeros(0, RECORD)))
    whole = manifest("000001-1", parts)
    Checkpoints(storage).commit(whole)
    (partition,) = partition_weights(len(START), len(START), 1)
    context = RunContext(made, layout, GRID, (partition,), owner.driver, storage.url)

    async def pull() -> tuple[Version, FloatArray]:
        return await ServerActor(context, 0, 2, Checkpoints(storage).open("000001-1")).pull()

    version, weights = asyncio.run(pull())
    assert version == Version(2, 7)
    np.testing.assert_array_equal(weights, START)


@pytest.mark.parametrize(
    ("text", "error"),
    [(b"[" * 100_000, "owner is damaged"), (b"7", "owner is damaged"), (None, "does not see the driver's files")],
    ids=["deep", "other", "missing"],
)
def test_a_server_that_does_not_see_its_driver_says_why(tmp_path: Path, text: bytes | None, error: str) -> None:
    storage = Storage(str(tmp_path / "run"))
    owner = RunDirectory(storage).own()
    storage.delete("owner")
    if text is not None:
        storage.write("owner", text)
    layout = Layout.of({"weight": START})
    partition = Partition(0, 0, len(START), len(START))
    with pytest.raises(StorageError, match=error):
        ServerActor(RunContext(job(), layout, GRID, (partition,), owner.driver, storage.url), 0, 1, START)


def test_a_part_saved_before_the_settings_changed_is_restored_to_those_of_the_run(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "run"))
    owner = RunDirectory(storage).own()
    layout = Layout.of({"weight": START})
    before = job()
    after = job(optimizer={"lr": 0.5})
    partition = Partition(0, 0, len(START), len(START))
    server = ParameterServer(before, partition, START, GRID, Version(1, 7))
    part = write_part(storage, "000001-1", server.state(), np.zeros(0, RECORD))
    Checkpoints(storage).commit(manifest("000001-1", [part]))
    context = RunContext(after, layout, GRID, (partition,), owner.driver, storage.url)

    async def restored() -> None:
        await ServerActor(context, 0, 2, Checkpoints(storage).open("000001-1")).save("000002-2")

    asyncio.run(restored())
    (saved,) = (json.loads(file.read_text()) for file in (tmp_path / "run/checkpoints/000002-2").glob("*.json"))
    assert saved["settings"]["optimizer"]["lr"] == 0.5
    (journal,) = (np.load(file) for file in (tmp_path / "run/journal").glob("*000002*"))
    assert journal["kind"].tolist() == [RecordKind.FORK, RecordKind.CHANGE]
