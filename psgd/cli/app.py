"""The commands under one name. Each is a function of the module of its group."""

from __future__ import annotations

from typing import Annotated

import typer

from psgd.cli import jobs, runs, simulation, training

__all__ = ["app"]

app = typer.Typer(
    help="Train models by stochastic gradient descent with parameter servers, on Ray.",
    epilog="A job is a YAML file; `psgd schema` describes it. Runs are kept in `runs`, or where --storage says.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich's takes longer to import than all the rest
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from psgd import __version__

        typer.echo(f"psgd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version  # its callback has acted


for command in (
    *(training.train, training.submit),
    *(runs.status, runs.logs, runs.stop, runs.set_, runs.scale),
    *(jobs.validate, jobs.schema),
    *(simulation.simulate, simulation.verify, simulation.replay),
):
    app.command(command.__name__.rstrip("_"))(command)
