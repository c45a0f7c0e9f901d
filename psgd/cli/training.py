"""Commands that train: with the driver in this process (train), or on the cluster (submit)."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from psgd.cli import FAILED, INTERRUPTED
from psgd.cli.options import AsJson, JobFile, JobStorage, NameOption, Overrides
from psgd.cli.output import print_json, print_result
from psgd.errors import PsgdError, RunError
from psgd.interruption import Interruption
from psgd_workers.redaction import redact

__all__ = ["submit", "train"]


def train(
    context: typer.Context,
    job: JobFile,
    overrides: Overrides = None,
    storage: JobStorage = None,
    name: NameOption = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Running Ray cluster to train on. [default: RAY_ADDRESS, or a Ray started on this machine]",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue the run of this name from its newest checkpoint. Starts the run if it is new."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a model and wait until it is done.

    Without --address, Ray is started on this machine, for this run only and with the CPUs that the job needs. Ctrl-C
    saves the run and ends it; --resume continues it.

    Exit codes: 0 finished or stopped, 2 refused before anything started, 3 failed or not saved, 130 interrupted.
    """
    from psgd.monitoring.console import stderr_console
    from psgd.monitoring.stages import Stages

    stages = Stages(stderr_console())
    stages.show(f"reading {job}")  # before the imports that take a second
    from psgd.spec.reader import load_spec

    try:
        with redirect_stdout(sys.stderr):  # Ray and the user's own model may print
            spec = load_spec(job, overrides or ())
            from psgd.cluster.run import run_job

            result = run_job(
                spec,
                name=name,
                storage=storage,
                address=address,
                resume=resume,
                progress=True,
                interruption=context.obj,
                stages=stages,
            )
    except PsgdError as error:
        if as_json:
            print_json({"status": "failed" if isinstance(error, RunError) else "refused", "error": str(error)})
        raise
    if as_json:
        print_json(result.to_dict())
    print_result(result)
    raise typer.Exit({"failed": FAILED, "unsaved": FAILED, "interrupted": INTERRUPTED}.get(result.status, 0))


def submit(
    context: typer.Context,
    job: JobFile,
    address: Annotated[
        str, typer.Option(metavar="URL", help="Dashboard of the cluster, such as http://HEAD:8265.", show_default=False)
    ],
    overrides: Overrides = None,
    storage: JobStorage = None,
    name: NameOption = None,
    py_module: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            file_okay=False,
            metavar="FOLDER",
            help="Folder with Python code that the model imports. May be repeated.",
        ),
    ] = None,
    with_secrets: Annotated[
        bool, typer.Option("--with-secrets", help="Upload also files that look like passwords or private keys.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Show the driver's output until the run ends, or return at once.")
    ] = True,
) -> None:
    """Send a job to a cluster, which trains it without this machine.

    The driver (the process that directs the run) becomes a job of Ray's Jobs API, and this machine may be switched off
    afterwards. A run of the same name is continued. Prints the id of Ray's job.
    """
    from psgd.spec.reader import load_spec

    spec = load_spec(job, overrides or (), name=name, storage=storage)
    from psgd.cluster.jobs import Jobs

    interruption: Interruption = context.obj
    jobs = Jobs(address)
    with interruption.critical("the job is submitted first"):
        identifier = jobs.submit(spec, str(spec.name), py_module or (), with_secrets)
        interruption.outlook = (
            f"job {identifier} continues on the cluster; `psgd stop {spec.name} --address {redact(address)}` ends it"
        )
        typer.echo(identifier)
    if interruption.requested:
        typer.echo(f"psgd: {interruption.outlook}", err=True)
    interruption.check()
    if wait:
        jobs.wait(identifier, str(spec.name))
