"""The command line. It parses first, and imports Ray, pydantic and the rest only for a command that needs them.

Exit codes: 0 finished (or stopped by command), 2 refused spec or input, 3 failed run, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from psgd.errors import PsgdError, RunError

__all__ = ["app", "main"]

REFUSED = 2
FAILED = 3
INTERRUPTED = 130

app = typer.Typer(
    help="Parameter-server SGD on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich's takes longer to import than all the rest
    context_settings={"help_option_names": ["-h", "--help"]},
)

JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job: see `psgd schema`, deploy/jobs/.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="a.b=v", help="Override a field of the job.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="The run's name.")]
StorageOption = Annotated[str | None, typer.Option(help="Folder or fsspec URL of runs. [default: the job's, or runs]")]
NameOption = Annotated[str | None, typer.Option(help="Name of the run. [default: the job's]")]
Dashboard = Annotated[str | None, typer.Option(metavar="URL", help="Dashboard of the cluster it was submitted to.")]


def _version(wanted: bool) -> None:
    if wanted:
        from psgd import __version__

        typer.echo(f"psgd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    del version  # its callback has acted


@app.command()
def train(
    job: JobFile,
    overrides: Overrides = None,
    storage: StorageOption = None,
    name: NameOption = None,
    address: Annotated[
        str | None, typer.Option(help="HOST:PORT of a running Ray. [default: RAY_ADDRESS, or a local Ray]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run of that name, if there is one.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document on stdout.")] = False,
) -> None:
    """Train a model here, and wait for it.

    It runs on a local Ray of the job's size, or, with --address, from here on a running cluster.
    """
    try:
        with redirect_stdout(sys.stderr):  # Ray and the user's own model may print
            result = _run(job, overrides, storage, name, address, resume)
    except PsgdError as error:
        if as_json:
            typer.echo(
                json.dumps({"status": "failed" if isinstance(error, RunError) else "refused", "error": str(error)})
            )
        raise
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
    _summarise(result)
    code = {"failed": FAILED, "unsaved": FAILED, "interrupted": INTERRUPTED}.get(result.status, 0)
    raise typer.Exit(code)


def _run(
    job: Path, overrides: list[str] | None, storage: str | None, name: str | None, address: str | None, resume: bool
) -> Any:
    from psgd.spec.reader import load_spec

    spec = load_spec(job, overrides or ())
    from psgd.cluster.run import run_job

    return run_job(spec, name=name, storage=storage, address=address, resume=resume, progress=True)


def _summarise(result: Any) -> None:
    """The end of a run, for people."""
    from rich.console import Console

    shown = {
        "validation accuracy": ("val/accuracy", "{:.4f}"),
        "validation loss": ("val/loss", "{:.4f}"),
        "training loss": ("train/loss", "{:.4f}"),
        "updates/s": ("perf/updates_per_s", "{:.0f}"),
        "staleness, mean": ("async/staleness_mean", "{:.2f}"),
    }
    console = Console(stderr=True, highlight=False)
    colour = {"failed": "red", "unsaved": "red", "interrupted": "yellow"}.get(result.status, "green")
    took = f"{result.epochs} epochs, {result.updates} updates in {result.duration_s:.1f} s"
    console.print(f"[bold {colour}]{result.status}[/] {result.name}: {took}")
    for title, (metric, form) in shown.items():
        if (value := result.metrics[metric]) is not None:
            console.print(f"  {title:<20} {form.format(value)}")
    console.print(f"  {'run directory':<20} {result.path}", soft_wrap=True)
    if result.error:
        console.print(f"  {'error':<20} {result.error}", markup=False, soft_wrap=True)
    if result.status in ("interrupted", "stopped"):
        console.print("  the same command with --resume continues it")


@app.command()
def submit(
    job: JobFile,
    address: Annotated[str, typer.Option(metavar="URL", help="The cluster's dashboard, such as http://HEAD:8265.")],
    overrides: Overrides = None,
    storage: StorageOption = None,
    name: NameOption = None,
    py_module: Annotated[
        list[Path] | None,
        typer.Option(exists=True, file_okay=False, help="Source folder of your own that the model needs."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the run's end, showing its output.")] = True,
) -> None:
    """Train a model from a cluster's head.

    The driver runs there, as a job of Ray's Jobs API; the run of that name is continued if there is one.
    """
    from psgd.spec.reader import load_spec

    spec = load_spec(job, overrides or (), name=name, storage=storage)
    from psgd.cluster.jobs import Jobs

    jobs = Jobs(address)
    identifier = jobs.submit(spec, str(spec.name), py_module or ())
    typer.echo(identifier)
    if wait:
        jobs.wait(identifier)


@app.command()
def status(run: RunName, storage: StorageOption = None, address: Dashboard = None) -> None:
    """Tell how a run is doing, as JSON.

    That is its result, or its newest metrics.
    """
    if address:
        from psgd.cluster.jobs import Jobs

        found = Jobs(address).find(run)
        typer.echo(json.dumps({"status": found.status.value, "job": found.submission_id, "message": found.message}))
        return
    directory = _directory(run, storage)
    lines = directory.read_lines("metrics.jsonl")
    result = directory.read_json("result.json")
    started = [line for line in directory.read_lines("events.jsonl") if line["event"] in ("started", "finished")]
    if result is not None and started and started[-1]["event"] == "finished":
        typer.echo(json.dumps(result))
        return
    typer.echo(json.dumps({"status": "running", "owner": directory.read_json("owner"), "metrics": lines[-1:] or None}))


@app.command()
def logs(run: RunName, storage: StorageOption = None, address: Dashboard = None) -> None:
    """Show what happened in a run.

    That is its events, or, with --address, its driver's output.
    """
    if address:
        from psgd.cluster.jobs import Jobs

        typer.echo(Jobs(address).logs(run))
        return
    from datetime import datetime

    for line in _directory(run, storage).read_lines("events.jsonl"):
        when = datetime.fromtimestamp(line.pop("time")).astimezone().isoformat(sep=" ", timespec="seconds")
        fields = "  ".join(f"{key}={value}" for key, value in line.items() if key != "event" and value is not None)
        typer.echo(f"{when}  {line['event']:<18} {fields}")


@app.command()
def stop(run: RunName, storage: StorageOption = None, address: Dashboard = None) -> None:
    """Ask a run to save its state and end.

    It can be resumed. With --address, Ray's job manager is asked instead.
    """
    if address:
        from psgd.cluster.jobs import Jobs

        Jobs(address).stop(run)
    else:
        _directory(run, storage).command("stop")
    typer.echo(f"asked {run} to stop; `psgd status` tells when it has")


@app.command()
def scale(
    run: RunName,
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="How many from now on.")],
    storage: StorageOption = None,
) -> None:
    """Change how many workers a running job has.

    New ones join as soon as the cluster has room; those that leave finish the batch in hand first.
    """
    _directory(run, storage).command("scale", [str(workers)])
    typer.echo(f"asked {run} for {workers} workers; `psgd logs` tells who came and went, or why not")


@app.command()
def replay(
    run: RunName,
    storage: StorageOption = None,
    until: Annotated[int | None, typer.Option(min=0, metavar="VERSION", help="Stop at so many updates.")] = None,
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, metavar="FILE.safetensors", help="Write the replayed weights there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document on stdout.")] = False,
) -> None:
    """Recompute a run in one process, and compare bit for bit.

    From the run's job, data and journal up to its newest checkpoint, whose weights must come out. Exits with 3 if they
    do not.
    """
    directory = _directory(run, storage)
    job = directory.read_json("resolved.json")
    # Before NumPy is imported: other numbers of threads sum in other orders. Ray gave its workers so many.
    os.environ.setdefault("OMP_NUM_THREADS", str(job["scaling"]["cpus_per_worker"]))
    from psgd.replay.replay import replay as recompute

    with redirect_stdout(sys.stderr):  # the user's own model may print
        result = recompute(directory, until=until, out=out)
    typer.echo(json.dumps(result.to_dict()) if as_json else str(result))
    raise typer.Exit(FAILED if result.agrees is False else 0)


def _directory(run: str, storage: str | None) -> Any:
    from psgd.store.run_directory import RunDirectory
    from psgd.store.storage import Storage

    return RunDirectory(Storage(storage or "runs").folder(run))


@app.command("set")
def set_(
    run: RunName,
    settings: Annotated[list[str], typer.Argument(metavar="a.b=v...", help="Such as consistency.mode=bsp.")],
    storage: StorageOption = None,
) -> None:
    """Change a run's settings while it trains.

    What can change is consistency, and the optimizer's lr, schedule, max_grad_norm and clip_value. `psgd logs` tells
    from which version on, or why not.
    """
    _directory(run, storage).command("set", settings)
    typer.echo(f"asked {run} for {' '.join(settings)}; `psgd logs` tells from which version on, or why not")


@app.command("verify")
def verify_(
    job: JobFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as one JSON document on stdout.")] = False,
) -> None:
    """Try psgd's promises on a job's model and data.

    One worker is a serial loop, many are a mean, partitions agree, a resumed run ends as if undisturbed, the gradient
    is the loss's: each is tried on a few batches, here, in under a minute. Exit code 3 if one does not hold.
    """
    from psgd.simulation.verify import verify
    from psgd.spec.reader import load_spec

    spec = load_spec(job, overrides or ())
    with redirect_stdout(sys.stderr):  # the user's own model may print
        checks = verify(spec)
    if as_json:
        typer.echo(json.dumps({"checks": [dataclasses.asdict(check) for check in checks]}))
    _show_checks(checks)
    raise typer.Exit(0 if all(check.holds for check in checks) else FAILED)


def _show_checks(checks: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "promised", "observed", "")
    for check in checks:
        table.add_row(
            check.name, check.promised, check.observed, "[green]holds" if check.holds else "[red]does not hold"
        )
    Console(stderr=True, highlight=False).print(table)


@app.command("simulate")
def simulate_(
    job: JobFile,
    workers: Annotated[int | None, typer.Option(min=1, help="Number of workers. [default: the job's]")] = None,
    delays: Annotated[
        str | None,
        typer.Option(metavar="NAME:ARGS", help="Virtual seconds per gradient: lognormal:0,1. [default: constant:1]"),
    ] = None,
    modes: Annotated[
        str | None, typer.Option(metavar="M,M:k=v", help="Modes to compare, such as async,ringmaster:r=32,bsp.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="quadratic", help="A noisy quadratic in place of the job's model and data.")
    ] = None,
    size: Annotated[int | None, typer.Option(min=2, help="Parameters of the quadratic. [default: 100]")] = None,
    pushes: Annotated[int | None, typer.Option(min=1, help="Most gradients of the quadratic. [default: 20000]")] = None,
    link: Annotated[float | None, typer.Option(metavar="S", help="Virtual seconds of a push, and of a pull.")] = None,
    crashes: Annotated[
        float | None, typer.Option(metavar="S", help="Mean virtual seconds between two crashes of a worker.")
    ] = None,
    joins: Annotated[float | None, typer.Option(metavar="S", help="Mean virtual seconds until a worker joins.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of delays, crashes and joins. [default: 0]")] = None,
    until: Annotated[
        str | None, typer.Option(metavar="METRIC=V", help="Stop there: excess, train/loss, val/loss, val/accuracy.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Where to write a page with figures; needs psgd\\[plots].")] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON document on stdout.")] = False,
) -> None:
    """Try a job on workers that are not there.

    The production core runs on a virtual clock, with the job's own model and data or a quadratic: what a mode does to
    time, throughput, staleness and each worker's share, before paying for the workers. Defaults come from the job's
    `simulate` section; `psgd schema` describes it.
    """
    from psgd.simulation.command import run
    from psgd.spec.reader import load_spec

    spec = load_spec(job, overrides or ())
    options: dict[str, Any] = {
        "workers": workers,
        "delays": delays,
        "modes": modes,
        "model": model,
        "size": size,
        "pushes": pushes,
    }
    options |= {"link_s": link, "crash_s": crashes, "join_s": joins, "seed": seed, "until": until}
    with redirect_stdout(sys.stderr):  # the user's own model may print
        results = run(spec, options, html)
    if as_json:
        typer.echo(json.dumps({"results": [result.to_dict() for result in results]}))


@app.command()
def validate(job: JobFile, overrides: Overrides = None) -> None:
    """Check a job, and print it with its defaults."""
    import yaml

    from psgd.spec.reader import load_spec

    typer.echo(yaml.safe_dump(load_spec(job, overrides or ()).model_dump(mode="json"), sort_keys=False), nl=False)


@app.command()
def schema() -> None:
    """Print the JSON schema of job files."""
    from psgd.spec import JobSpec

    typer.echo(json.dumps(JobSpec.model_json_schema(), indent=2))


def main() -> None:
    """The `psgd` command."""
    try:
        app()
    except PsgdError as error:
        typer.echo(f"psgd: {error}", err=True)
        sys.exit(FAILED if isinstance(error, RunError) else REFUSED)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
