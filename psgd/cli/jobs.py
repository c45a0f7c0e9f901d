"""Commands for job files: validate and schema."""

from __future__ import annotations

import typer

from psgd.cli.options import JobFile, Overrides
from psgd.cli.output import print_json

__all__ = ["schema", "validate"]


def validate(job: JobFile, overrides: Overrides = None) -> None:
    """Check a job file, and print the job with all defaults filled in.

    Only the job file is read: the data is not opened and no process is started. Exits with 2 if the job is not valid.
    """
    import yaml

    from psgd.spec.reader import load_spec

    typer.echo(yaml.safe_dump(load_spec(job, overrides or ()).model_dump(mode="json"), sort_keys=False), nl=False)


def schema() -> None:
    """Print the JSON schema of job files.

    It describes every field with its unit, bounds and default.
    """
    from psgd.spec import JobSpec

    print_json(JobSpec.model_json_schema(), indent=2)
