"""Changes to the fields of a job before and while it runs. All functions raise only SpecError."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from psgd.errors import SpecError
from psgd.spec.job import JobSpec
from psgd.spec.reader import parse_spec, with_setting
from psgd_workers.counting import counted

__all__ = ["change_settings", "change_workers", "override_spec"]

CHANGEABLE = re.compile(r"consistency(\..*)?|optimizer\.(lr|schedule|max_grad_norm|clip_value)")
WORKERS = re.compile(r"[0-9]{1,9}")


def override_spec(spec: JobSpec, overrides: Sequence[str]) -> JobSpec:
    """Return the job with some of its fields replaced.

    Args:
        spec: job to change.
        overrides: settings `FIELD=VALUE`, such as `optimizer.lr=0.1`; each value is YAML.

    Raises:
        SpecError: a setting cannot be read, or the result is not a valid job.
    """
    tree: dict[str, Any] = spec.model_dump(mode="json", exclude_unset=True)
    for override in overrides:
        tree = with_setting(tree, override)
    return parse_spec(tree, "the changed job")


def change_settings(spec: JobSpec, overrides: Sequence[str]) -> JobSpec:
    """Return the job with changed settings. Only settings that can change while the job runs are accepted.

    Args:
        spec: job as it runs.
        overrides: settings `FIELD=VALUE`, such as `optimizer.lr=0.1`; each value is YAML.

    Raises:
        SpecError: a setting cannot be read or cannot change, or the result is not a valid job.
    """
    after = override_spec(spec, overrides)
    changed = sorted(_changed(spec, after))
    if not changed:
        raise SpecError(f"{' '.join(overrides):.200}: the job runs with these settings already")
    if wrong := [field for field in changed if not CHANGEABLE.fullmatch(field)]:
        raise SpecError(
            f"{', '.join(wrong)} cannot change while the job runs: only consistency, and the optimizer's lr, schedule, "
            "max_grad_norm and clip_value can. Stop the run, and start another one with a new --name"
        )
    if spec.worker_options != after.worker_options:
        raise SpecError(
            f"consistency cannot change from {_mode_text(spec)} to {_mode_text(after)} while the job runs: "
            "workers are started with their local steps and with ringmaster's stop. Stop the run, and start another "
            "one with a new --name"
        )
    return after


def change_workers(spec: JobSpec, workers: str) -> JobSpec:
    """Return the job with another number of workers.

    Args:
        spec: job as it runs.
        workers: new number of workers, in decimal digits.

    Raises:
        SpecError: `workers` is not a number, or the job cannot run with this number of workers.
    """
    if not WORKERS.fullmatch(workers):
        raise SpecError(f"expected a number of workers, such as 4, not {workers!r:.80}")
    tree = spec.model_dump(mode="json")
    tree["scaling"]["workers"] = int(workers)
    return parse_spec(tree, f"the job with {counted(int(workers), 'worker')}")


def _changed(before: JobSpec, after: JobSpec) -> Iterator[str]:
    """Yield the names of the fields that differ. A field of a section is named `section.field`."""
    for section in JobSpec.model_fields:
        old = getattr(before, section)
        new = getattr(after, section)
        if old == new:
            continue
        if type(old) is not type(new) or not isinstance(old, BaseModel):
            yield section
            continue
        yield from (f"{section}.{name}" for name in type(old).model_fields if getattr(old, name) != getattr(new, name))


def _mode_text(spec: JobSpec) -> str:
    fields = spec.consistency.model_dump(mode="json")
    return "{" + ", ".join(f"{name}: {value}" for name, value in fields.items()) + "}"
