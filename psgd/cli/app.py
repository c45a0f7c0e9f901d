"""The `psgd` command with its subcommands. Each subcommand is a function in the module of its group."""

from __future__ import annotations

from typing import Annotated

import typer

from psgd.cli import jobs, runs, simulation, training

__all__ = ["app"]

app = typer.Typer(
    help="Train models by stochastic gradient descent with parameter servers, on Ray.\n\n"
    "Worker processes compute gradients on different batches of the data at the same time. Server processes hold the "
    "model's weights and change them by these gradients.",
    epilog="A job is described by a YAML file; `psgd schema` lists its fields. Each run is kept in a directory of its "
    "own, in the folder `runs` or in the one that --storage names.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich would take longer to import than everything else
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from psgd import __version__

        typer.echo(f"psgd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version  # handled by _print_version


for command in (
    *(training.train, training.submit),
    *(runs.status, runs.logs, runs.stop, runs.set_, runs.scale),
    *(jobs.validate, jobs.schema),
    *(simulation.simulate, simulation.verify, simulation.replay),
):
    app.command(command.__name__.rstrip("_"))(command)
