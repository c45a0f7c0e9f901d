"""Commands that run in this process, without Ray: simulate, verify, replay."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from psgd.cli import FAILED
from psgd.cli.options import AsJson, JobFile, Overrides, RunName, RunStorage
from psgd.cli.output import print_checks, print_json
from psgd_workers.redaction import printable, redact

__all__ = ["replay", "simulate", "verify"]

SECONDS = "SECONDS"


def simulate(
    job: JobFile,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of simulated workers. [default: as in the job]")
    ] = None,
    delays: Annotated[
        str | None,
        typer.Option(
            metavar="NAME:ARGS",
            help="Distribution of the virtual seconds that a gradient takes: constant:S, exponential:MEAN, "
            "lognormal:MU,SIGMA, gamma:SHAPE,SCALE, measured:RUN-DIRECTORY, ... [default: constant:1]",
        ),
    ] = None,
    modes: Annotated[
        str | None,
        typer.Option(
            metavar="MODE,...",
            help="Consistency modes to compare, such as async,ringmaster:r=32,bsp. [default: as in the job]",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="quadratic", help="Minimise a noisy quadratic, without the job's model and data."),
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Number of weights of the quadratic. [default: 100]")
    ] = None,
    pushes: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Number of gradients after which a simulation of the quadratic ends. [default: 20000]",
        ),
    ] = None,
    link: Annotated[
        float | None,
        typer.Option(
            metavar=SECONDS,
            help="Virtual seconds to send a gradient to a server; the weights take as long to come back. [default: 0]",
        ),
    ] = None,
    crashes: Annotated[
        float | None,
        typer.Option(metavar=SECONDS, help="Mean virtual seconds between two crashes of a worker. [default: none]"),
    ] = None,
    joins: Annotated[
        float | None,
        typer.Option(
            metavar=SECONDS,
            help="Mean virtual seconds until a worker joins, at the start and after a crash. [default: 0]",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Seed of delays, crashes and joins. [default: 0]")
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC=VALUE",
            help="Stop when a metric reaches this value: val/accuracy, val/loss, train/loss, or a quadratic's excess.",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Write a page with figures. Needs pip install 'psgd[plots]'."),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Compare consistency modes on simulated workers and a virtual clock.

    A mode decides which gradients form a step, and which workers wait. Runs the real code of the servers and of the
    driver with simulated workers, on the job's own model and data or on a quadratic function. For each mode it shows
    the time and the examples needed to reach a target, the throughput, the staleness of gradients and each worker's
    share of the work. An option that is not given takes its value from the job's `simulate` section, or else the
    default below.
    """
    from psgd.simulation.command import run
    from psgd.spec.reader import load_spec

    spec = load_spec(job, overrides or ())
    options = {
        "workers": workers,
        "delays": delays,
        "modes": modes,
        "model": model,
        "size": size,
        "pushes": pushes,
        "link_s": link,
        "crash_s": crashes,
        "join_s": joins,
        "seed": seed,
        "until": until,
    }
    with redirect_stdout(sys.stderr):  # the user's own model may print
        results = run(spec, options, html)
    if as_json:
        print_json({"results": [result.to_dict() for result in results]})


def verify(job: JobFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Test psgd's guarantees on a job's own model and data.

    Takes less than a minute, on this machine and without Ray. Checks on a few batches that the gradient is the slope of
    the loss and is the same on every worker, that one worker equals a serial loop, that a step of several workers
    equals a step on the mean of their gradients, that several servers give the same weights as one, that a resumed run
    equals an undisturbed one, and that each batch is applied exactly once although workers are killed. Exits with 3 if
    a check fails.
    """
    from psgd.simulation.verify import verify as run_checks
    from psgd.spec.reader import load_spec

    spec = load_spec(job, overrides or ())
    with redirect_stdout(sys.stderr):  # the user's own model may print
        checks = run_checks(spec)
    if as_json:
        print_json({"checks": [asdict(check) for check in checks]})
    print_checks(checks)
    raise typer.Exit(0 if all(check.holds for check in checks) else FAILED)


def replay(
    run: RunName,
    storage: RunStorage = "runs",
    until: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Stop when every server has taken N steps.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(dir_okay=False, metavar="FILE.safetensors", help="Write the recomputed weights to this file."),
    ] = None,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="Execute the code that the run of another user names as its model."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Recompute a run, and compare the weights bit for bit.

    Reads the run's job, its data and its journal (the record of all pushes). Computes every gradient again in one
    process, up to the newest checkpoint, and compares the weights with those saved there. Exits with 3 if they differ.
    A run that belongs to another user, or lies in an object store, and names code as its model needs --trust.
    """
    from psgd.cli.runs import open_run

    directory = open_run(run, storage)
    directory.check_exists()
    # Set before NumPy is imported, to the number of threads that the workers had: another number adds in another order.
    os.environ.setdefault("OMP_NUM_THREADS", str(directory.read_spec().scaling.cpus_per_worker))
    from psgd.replay.replay import replay as recompute

    with redirect_stdout(sys.stderr):  # the user's own model may print
        result = recompute(directory, until=until, out=out, trust=trust)
    if as_json:
        print_json(result.to_dict())
    else:
        typer.echo(printable(redact(str(result))))
    raise typer.Exit(FAILED if result.agrees is False else 0)
