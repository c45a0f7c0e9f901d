"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "AsJson",
    "Dashboard",
    "JobFile",
    "JobStorage",
    "NameOption",
    "Overrides",
    "RunName",
    "RunStorage",
]

JobFile = Annotated[
    Path,
    typer.Argument(metavar="JOB.yaml", help="The job file. `psgd schema` describes its fields.", show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Set a field, such as optimizer.lr=0.1. May be repeated."),
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.", show_default=False)]
JobStorage = Annotated[
    str | None,
    typer.Option(metavar="FOLDER|URL", help="Where to keep run directories. [default: the job's run.storage, or runs]"),
]
RunStorage = Annotated[str, typer.Option(metavar="FOLDER|URL", help="Where the run's directory is kept.")]
NameOption = Annotated[str | None, typer.Option(metavar="NAME", help="Name of the run. [default: the job's name]")]
Dashboard = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="Dashboard of the cluster that the run was submitted to, such as http://HEAD:8265."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result on stdout, as one JSON document.")]
