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
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Set a field of the job, such as optimizer.lr=0.1. May be repeated."
    ),
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.", show_default=False)]
JobStorage = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|URL",
        help="Folder in which the run gets its directory. [default: run.storage in the job, or runs]",
    ),
]
RunStorage = Annotated[str, typer.Option(metavar="FOLDER|URL", help="Folder that holds the run's directory.")]
NameOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Name of the run. [default: name in the job, or that of the job file]"),
]
Dashboard = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="Dashboard of the cluster that the run was submitted to, such as http://HEAD:8265."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result on stdout, as one JSON document.")]
