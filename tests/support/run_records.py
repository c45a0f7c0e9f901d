"""Write the records of a run that a driver would write."""

from __future__ import annotations

from typing import Any

from psgd.result import LedgerCounts, Result
from psgd.store.run_directory import RunDirectory

__all__ = ["finish", "result_of", "start"]


def start(run: RunDirectory, incarnation: int = 1, resumed: str | None = None) -> None:
    """Record that a run started."""
    run.event("started", incarnation=incarnation, resumed=resumed)


def finish(run: RunDirectory, status: Any = "finished") -> Result:
    """Record that a run ended, and return its result."""
    result = result_of(run, status)
    run.event("finished", status=status, error=None)
    run.finish(result)
    return result


def result_of(run: RunDirectory, status: Any = "finished", **metrics: float | None) -> Result:
    """Return a result of the run, with made-up figures."""
    counts = LedgerCounts(batches=5, applied=5, duplicates=0, requeued=2, discarded=0)
    name = run.storage.url.rpartition("/")[2]
    return Result(status, name, run.storage.url, 1, 5, 150, 0.5, metrics, counts, {}, 1.0, None, None)
