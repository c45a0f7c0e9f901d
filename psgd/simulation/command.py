"""The command `psgd simulate`, after its arguments were parsed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel
from rich.table import Table

from psgd.core.server.journal import plain
from psgd.errors import JournalError, RunNotFoundError, StorageError
from psgd.job import OpenJob
from psgd.monitoring.console import stderr_console
from psgd.simulation.delays import build_delays
from psgd.simulation.scenario import Scenario, jobs_to_simulate
from psgd.simulation.simulate import (
    ROW_NAMES,
    JobWorkload,
    QuadraticWorkload,
    SimulationResult,
    Workload,
    row_values,
    simulate,
)
from psgd.spec import JobSpec, SimulateConfig
from psgd.spec.reader import as_spec, parse_spec
from psgd.store.segments import parse_segment
from psgd.store.storage import Storage
from psgd_workers.counting import counted

__all__ = ["run"]


def run(
    spec: JobSpec | Mapping[str, Any], options: Mapping[str, Any], html: Path | None = None
) -> list[SimulationResult]:
    """Simulate each mode, print a table, and write a page with figures.

    Args:
        spec: the job.
        options: values that replace fields of the job's `simulate` section, also in short form. A value of None leaves
            the field as it is.
        html: file for the page. None: no page is written.

    Raises:
        InputError: an option is invalid. Nothing was simulated.
    """
    spec = _with_options(as_spec(spec), options)
    section = spec.simulate or SimulateConfig()
    workers = section.workers or spec.scaling.most_workers
    scenario = Scenario.of(section, workers, build_delays(section.delays, read_journal))
    jobs = jobs_to_simulate(spec, workers)
    if html:
        from psgd.simulation import comparison  # imported before the simulation, because matplotlib may be missing
    console = stderr_console()
    results = []
    for name, job in jobs.items():
        workload = _workload(job, section)
        job = _with_one_epoch(job) if section.model else job
        result = simulate(name, job, workload, scenario, section.until)
        results.append(result)
        line = (
            f"simulated {name}: {counted(result.updates, 'update')} in {result.time_s:.4g} virtual s; {result.status}"
        )
        console.print(line, soft_wrap=True)
    console.print(_table(results))
    if html:
        delays = f"{_describe(section.delays)} virtual seconds a gradient"
        lead = f"{counted(workers, 'worker')}, {delays}, seed {section.seed}."
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(comparison.page(results, lead), encoding="utf-8")
        console.print(f"figures: {html}", soft_wrap=True)
    return results


def _with_options(spec: JobSpec, options: Mapping[str, Any]) -> JobSpec:
    tree = spec.model_dump(mode="json", exclude_unset=True)
    given = {name: value for name, value in options.items() if value is not None}
    return parse_spec(tree | {"simulate": (tree.get("simulate") or {}) | given}, "the job with these options")


def _describe(delays: BaseModel) -> str:
    """Return a readable description of the delays, such as `lognormal, mu 0, sigma 1`."""
    (_, name), *parameters = delays
    values = [(key, _describe(value) if isinstance(value, BaseModel) else value) for key, value in parameters]
    texts = [f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in values]
    return ", ".join([name, *texts])


def _workload(job: JobSpec, section: SimulateConfig) -> Workload:
    if section.model is None:
        return JobWorkload(OpenJob.open(job), section.until.metric if section.until else None)
    return QuadraticWorkload(section.size, section.pushes, section.seed)


def _with_one_epoch(job: JobSpec) -> JobSpec:
    """Return the job with a limit of one epoch in place of its own limits."""
    return job.model_copy(update={"run": job.run.model_copy(update={"epochs": 1, "max_updates": None})})


def read_journal(path: str) -> NDArray[np.void]:
    """Read all records of a run's journal.

    Args:
        path: the run's directory, or the file of one segment.

    Raises:
        RunNotFoundError: there is no journal at the path.
    """
    storage = Storage(path.rpartition("/")[0] or ".") if path.endswith(".npy") else Storage(path).folder("journal")
    names = [path.rpartition("/")[2]] if path.endswith(".npy") else storage.names("")
    try:
        files = [(name, storage.read(name)) for name in names if name.endswith(".npy")]
        segments = [plain(parse_segment(data, f"{storage.url}/{name}")) for name, data in files]
    except (StorageError, JournalError) as error:
        raise RunNotFoundError(
            f"{path} holds no journal that can be read: {error}. Give a run's directory, such as runs/digits"
        ) from error
    if not segments:
        raise RunNotFoundError(f"{path} holds no journal: give a run's directory, such as runs/digits")
    return np.concatenate(segments)


def _table(results: Sequence[SimulationResult]) -> Table:
    """Return a table with a column for each result, as modes have long names and are few."""
    table = Table("", *(result.name for result in results), title=f"{results[0].metric}, on a virtual clock")
    cells = [
        [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row_values(result)] for result in results
    ]
    for number, name in enumerate(ROW_NAMES):
        table.add_row(name, *(column[number] for column in cells))
    return table
