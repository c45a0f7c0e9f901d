"""`psgd simulate`, after its arguments are parsed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel
from rich.table import Table

from psgd.core.server.journal import plain
from psgd.errors import RunNotFoundError, StorageError
from psgd.job import OpenJob
from psgd.monitoring.console import stderr_console
from psgd.simulation.delays import build_delays
from psgd.simulation.scenario import Scenario, contenders
from psgd.simulation.simulate import FIGURES, JobSubject, QuadraticSubject, Simulated, Subject, figures, simulate
from psgd.spec import JobSpec, SimulateConfig
from psgd.spec.reader import as_spec, parse_spec
from psgd.store.storage import Storage

__all__ = ["run"]


def run(spec: JobSpec | Mapping[str, Any], options: Mapping[str, Any], html: Path | None = None) -> list[Simulated]:
    """Simulate each mode, show a table, and write the page.

    Args:
        spec: the job.
        options: fields of its simulate section that are replaced, also in short form; None: the section's.
        html: file of the page with figures; None: no page.

    Raises:
        InputError: an option makes no sense; nothing was simulated.
    """
    spec = _with_options(as_spec(spec), options)
    section = spec.simulate or SimulateConfig()
    workers = section.workers or spec.scaling.most_workers
    scenario = Scenario.of(section, workers, build_delays(section.delays, read_journal))
    jobs = contenders(spec, workers)
    if html:
        from psgd.simulation import comparison  # before anything runs: matplotlib may be missing
    console = stderr_console()
    results = []
    for name, job in jobs.items():
        subject = _subject(job, section)
        job = _for_quadratic(job) if section.model else job
        results.append(simulate(name, job, subject, scenario, section.until))
        ended = results[-1]
        told = f"simulated {name}: {ended.updates} updates in {ended.time_s:.4g} virtual s; {ended.status}"
        console.print(told, soft_wrap=True)
    console.print(_table(results))
    if html:
        lead = f"{workers} workers, {_described(section.delays)} virtual seconds a gradient, seed {section.seed}."
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(comparison.page(results, lead), encoding="utf-8")
        console.print(f"figures: {html}", soft_wrap=True)
    return results


def _with_options(spec: JobSpec, options: Mapping[str, Any]) -> JobSpec:
    tree = spec.model_dump(mode="json", exclude_unset=True)
    given = {name: value for name, value in options.items() if value is not None}
    return parse_spec(tree | {"simulate": (tree.get("simulate") or {}) | given}, "the job with these options")


def _described(delays: BaseModel) -> str:
    """Return the delays in a form for people, such as `lognormal, mu 0, sigma 1`."""
    (_, name), *parameters = delays
    values = [(key, _described(value) if isinstance(value, BaseModel) else value) for key, value in parameters]
    texts = [f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in values]
    return ", ".join([name, *texts])


def _subject(job: JobSpec, section: SimulateConfig) -> Subject:
    if section.model is None:
        return JobSubject(OpenJob.open(job), section.until.metric if section.until else None)
    return QuadraticSubject(section.size, section.pushes, section.seed)


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
        data = [BytesIO(storage.read(name)) for name in names if name.endswith(".npy")]
        segments = [plain(np.load(segment, allow_pickle=False)) for segment in data]
    except (StorageError, ValueError) as error:
        raise RunNotFoundError(f"{path} holds no journal: {error}") from error
    if not segments:
        raise RunNotFoundError(f"{path} holds no journal: give a run's directory, such as runs/digits")
    return np.concatenate(segments)


def _table(results: Sequence[Simulated]) -> Table:
    """A column for each result: names of modes are long, and there are few."""
    table = Table("", *(result.name for result in results), title=f"{results[0].metric}, on a virtual clock")
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in figures(r)] for r in results]
    for number, name in enumerate(FIGURES):
        table.add_row(name, *(column[number] for column in cells))
    return table
