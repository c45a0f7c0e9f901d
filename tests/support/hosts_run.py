"""Train on several hosts, with the driver on the first one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

import psgd
from psgd.result import LedgerCounts
from tests.support.command_line import CommandLine
from tests.support.digits_run import stop
from tests.support.nodes import Nodes

__all__ = ["SERVER", "WORKER", "WORKERS", "training"]

SERVER = "ray::ServerActor"
WORKER = "ray::WorkerActor"
# One worker on each of three hosts. While a host is lost, only two of the three places exist.
WORKERS = {"min": 2, "max": 3}
RUN_S = 180.0


@contextmanager
def training(nodes: Nodes, spec: psgd.JobSpec, limit_s: float = RUN_S) -> Iterator[Future[psgd.Result]]:
    """Train from the head while the block lasts; stop the run at the end of the block if it still trains."""
    folder = Path(spec.run.storage)
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(spec.model_dump(mode="json", exclude_unset=True)))
    command = CommandLine(nodes.environment, folder, nodes.head.command_prefix, limit_s)

    def train() -> psgd.Result:
        done = command.run("train", str(file), "--address", nodes.address, "--json")
        assert done.returncode == 0, done.stderr
        fields: dict[str, Any] = json.loads(done.stdout)
        return psgd.Result(**fields | {"ledger": LedgerCounts(**fields["ledger"])})

    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(train)
        try:
            yield under_way
        finally:
            if not under_way.done():
                stop(folder / (spec.name or "run"))
