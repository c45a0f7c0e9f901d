"""`psgd simulate`, once its arguments are parsed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from psgd.core.server.journal import RECORD
from psgd.errors import RunNotFoundError, SpecError, StorageError
from psgd.job import OpenJob
from psgd.simulation.delays import parse_delays
from psgd.simulation.scenario import Scenario, Target, contenders, parse_target
from psgd.simulation.simulate import FIGURES, JobSubject, QuadraticSubject, Simulated, Subject, figures, simulate
from psgd.spec import JobSpec
from psgd.store.storage import Storage

__all__ = ["SimulationRequest", "run"]


@dataclass(frozen=True, slots=True)
class SimulationRequest:
    """The arguments, as they were given."""

    workers: int | None  # None: the job's
    delays: str
    modes: str | None
    model: str | None
    size: int
    pushes: int
    link_s: float
    crash_s: float | None
    join_s: float
    seed: int
    until: str | None
    html: Path | None


def run(spec: JobSpec, request: SimulationRequest) -> list[Simulated]:
    """Simulate each mode, show a table, and write the page.

    Raises:
        InputError: something asked for makes no sense; nothing was simulated.
    """
    workers = request.workers or spec.scaling.most_workers
    target = parse_target(request.until) if request.until else None
    delays = parse_delays(request.delays, read_journal)
    scenario = Scenario(workers, delays, request.link_s, request.crash_s, request.join_s, request.seed)
    jobs = contenders(spec, workers, request.modes)
    if request.html:
        from psgd.simulation import comparison  # before anything runs: matplotlib may be missing
    console = Console(stderr=True, highlight=False)
    results = []
    for name, job in jobs.items():
        subject = _subject(job, request, target)
        results.append(simulate(name, _for_quadratic(job) if request.model else job, subject, scenario, target))
        console.print(f"simulated {name}: {results[-1].updates} updates in {results[-1].time_s:.4g} virtual s")
    console.print(_table(results))
    if request.html:
        lead = f"{workers} workers, {request.delays} virtual seconds a gradient, seed {request.seed}."
        request.html.parent.mkdir(parents=True, exist_ok=True)
        request.html.write_text(comparison.page(results, lead), encoding="utf-8")
        console.print(f"figures: {request.html}", soft_wrap=True)
    return results


def _subject(job: JobSpec, request: SimulationRequest, target: Target | None) -> Subject:
    metric = target.metric if target else None
    if request.model is None:
        return JobSubject(OpenJob.open(job), metric)
    if request.model != "quadratic":
        raise SpecError(f"--model {request.model!r}: expected quadratic, or leave it out for the job's own model")
    if metric not in (None, "excess"):
        raise SpecError(f"--until {metric}: a quadratic has no loss on data; use --until excess=VALUE")
    return QuadraticSubject(request.size, request.pushes, request.seed)


def _for_quadratic(job: JobSpec) -> JobSpec:
    """One long epoch, whatever the job's own limits are."""
    return job.model_copy(update={"run": job.run.model_copy(update={"epochs": 1, "max_updates": None})})


def read_journal(path: str) -> NDArray[np.void]:
    """All records of a run's journal, from the run's directory or from one segment's file.

    Raises:
        RunNotFoundError: there is none.
    """
    storage = Storage(path.rpartition("/")[0] or ".") if path.endswith(".npy") else Storage(path).folder("journal")
    names = [path.rpartition("/")[2]] if path.endswith(".npy") else storage.names("")
    try:
        segments = [np.load(BytesIO(storage.read(name)), allow_pickle=False) for name in names if name.endswith(".npy")]
    except (StorageError, ValueError) as error:
        raise RunNotFoundError(f"{path} holds no journal: {error}") from error
    if not segments or any(segment.dtype != RECORD for segment in segments):
        raise RunNotFoundError(f"{path} holds no journal: give a run's directory, such as runs/digits")
    return np.concatenate(segments)


def _table(results: Sequence[Simulated]) -> Table:
    """A column for each result: names of modes are long, and there are few."""
    table = Table("", *(result.name for result in results), title=f"{results[0].metric}, on a virtual clock")
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in figures(r)] for r in results]
    for number, name in enumerate(FIGURES):
        table.add_row(name, *(column[number] for column in cells))
    return table
