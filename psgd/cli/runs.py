"""Commands for a run that was started: status, logs, stop, set, scale."""

from __future__ import annotations

import shlex
import time
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from psgd.cli.options import Dashboard, RunName, RunStorage
from psgd.cli.output import print_json
from psgd_workers.counting import counted
from psgd_workers.redaction import printable, redact

if TYPE_CHECKING:
    from psgd.store.run_directory import RunDirectory

__all__ = ["logs", "open_run", "scale", "set_", "status", "stop"]


STORAGE = "runs"  # default of --storage


def open_run(run: str, storage: str) -> RunDirectory:
    """Return the directory of a run."""
    from psgd.store.run_directory import RunDirectory
    from psgd.store.storage import Storage

    return RunDirectory(Storage(storage).folder(run))


def status(run: RunName, storage: RunStorage = STORAGE, address: Dashboard = None) -> None:
    """Print the state of a run, as JSON.

    Prints the newest metrics of a run that trains, and the result of a run that has ended. A run is "lost" if its
    driver (the process that directs the run) is gone and left no result. For such a run, the command prints the reason,
    the seconds since the driver's last sign of life, and the command that continues the run.

    With --address, prints Ray's status of the driver's job on that cluster, and the newest line of progress.
    """
    if address:
        from psgd.cluster.jobs import Jobs

        print_json(Jobs(address).status(run))
        return
    directory = open_run(run, storage)
    liveness = directory.liveness()
    if liveness.status == "ended":
        print_json(directory.read_json("result.json"))
        return
    lost = {"reason": liveness.reason, "resume": directory.resume_command} if liveness.status == "lost" else {}
    print_json(
        {
            "status": liveness.status,
            **lost,
            "last_sign_s": round(max(0.0, time.time() - liveness.last_sign), 1),
            "owner": directory.read_json("owner"),
            "metrics": directory.read_lines("metrics.jsonl")[-1:] or None,
        }
    )


def logs(run: RunName, storage: RunStorage = STORAGE, address: Dashboard = None) -> None:
    """Print the events of a run, one per line.

    With --address, print the output of the run's driver on that cluster instead.
    """
    if address:
        from psgd.cluster.jobs import Jobs

        for text in redact(Jobs(address).logs(run)).splitlines():
            typer.echo(printable(text))
        return
    for line in open_run(run, storage).read_lines("events.jsonl"):
        when = datetime.fromtimestamp(line.pop("time")).astimezone().isoformat(sep=" ", timespec="seconds")
        fields = "  ".join(f"{key}={value}" for key, value in line.items() if key != "event" and value is not None)
        typer.echo(printable(redact(f"{when}  {line['event']:<18} {fields}")))


def stop(run: RunName, storage: RunStorage = STORAGE, address: Dashboard = None) -> None:
    """Ask a run to save its state and end.

    `psgd train --resume` continues it later. Exits with 2 if the run is not running. With --address, Ray is asked
    to stop the driver on that cluster.
    """
    if address:
        from psgd.cluster.jobs import Jobs

        Jobs(address).stop(run)
    else:
        open_run(run, storage).command("stop")
    typer.echo(f"asked {run} to stop; `{_command('status', run, storage, address)}` shows when it has stopped")


def set_(
    run: RunName,
    settings: Annotated[
        list[str],
        typer.Argument(metavar="FIELD=VALUE", help="New values, such as consistency.mode=bsp optimizer.lr=0.1."),
    ],
    storage: RunStorage = STORAGE,
) -> None:
    """Change settings of a run while it trains.

    Only consistency, and the optimizer's lr, schedule, max_grad_norm and clip_value, can change. `psgd logs` shows
    after how many steps of the servers the change took effect, or why it was refused.
    """
    open_run(run, storage).command("set", settings)
    follow = _command("logs", run, storage)
    given = redact(" ".join(settings))
    typer.echo(f"asked {run} to set {given}; `{follow}` shows when they took effect, or why not")


def scale(
    run: RunName,
    workers: Annotated[int, typer.Argument(min=1, metavar="WORKERS", help="Number of workers from now on.")],
    storage: RunStorage = STORAGE,
) -> None:
    """Change the number of workers of a run while it trains.

    New workers join as soon as the cluster has room. A worker that leaves finishes its current batch first.
    """
    open_run(run, storage).command("scale", [str(workers)])
    follow = _command("logs", run, storage)
    typer.echo(f"asked {run} to use {counted(workers, 'worker')}; `{follow}` shows them join or leave, or why not")


def _command(name: str, run: str, storage: str, address: str | None = None) -> str:
    """Return a command about the same run as the present one: with its --address, or else with its --storage."""
    place = ["--address", address] if address else ["--storage", storage] if storage != STORAGE else []
    return shlex.join(["psgd", name, run, *place])
