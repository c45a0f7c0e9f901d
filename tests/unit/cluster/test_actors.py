from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from psgd.cluster.actors import RunFacts, ServerActor
from psgd.core.server import Partition
from psgd.errors import StorageError
from psgd.monitoring.rundir import RunDirectory
from psgd.storage import Storage
from psgd_workers.layout import Layout
from tests.unit.core.jobs import GRID, START, job


def test_a_save_that_failed_leaves_its_journal_to_the_next(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "run"))
    owner = RunDirectory(storage).own()
    partition, layout = Partition(0, 0, len(START), len(START)), Layout.of({"weight": START})
    facts = RunFacts(job(), layout, GRID, (partition,), owner.incarnation, owner.driver, storage.url)

    async def saves() -> None:
        server = ServerActor(facts, 0, START, None)
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
