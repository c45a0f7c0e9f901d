"""The reader of job files: YAML to a JobSpec, or one error that lists every fault."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from psgd.errors import SpecError
from psgd.spec.explanations import explain
from psgd.spec.job import JobSpec
from psgd.spec.yaml_values import FILE_LIMIT, read_yaml

__all__ = ["as_spec", "load_spec", "parse_spec", "parse_value", "with_setting"]

MAX_DEPTH = 16  # names in a setting


def load_spec(
    path: str | Path, overrides: Sequence[str] = (), *, name: str | None = None, storage: str | None = None
) -> JobSpec:
    """Read a job file.

    Args:
        path: file in YAML, of at most 1 MiB.
        overrides: settings `a.b=value`, each value in YAML; they win over the file.
        name: name of the run; None: the file's `name`, or one made of the file's own name.
        storage: folder or URL of runs; None: the file's `run.storage`.

    Raises:
        SpecError: the file cannot be read or is not a valid job; every fault is listed.
    """
    path = Path(path)
    tree = read_yaml(_text(path), str(path), FILE_LIMIT)
    if not isinstance(tree, dict):
        given = "and this one is empty" if tree is None else f"not {tree!r:.80}"
        raise SpecError(f"{path}: a job file is a mapping of fields such as model and data, {given}")
    for override in overrides:
        tree = with_setting(tree, override)
    if storage is not None:
        tree = _with(tree, ("run", "storage"), storage, "--storage")
    given = tree.get("name") if name is None else name
    return parse_spec(tree | {"name": _name_of(path) if given is None else given}, str(path))


def as_spec(job: JobSpec | Mapping[str, Any]) -> JobSpec:
    """Return a job as it is, or the job that a mapping of its fields describes, checked as a job file is.

    Raises:
        SpecError: the mapping is not a valid job; every fault is listed. Or it is something else altogether.
    """
    if isinstance(job, JobSpec):
        return job
    if isinstance(job, Mapping):
        return parse_spec(dict(job), "the job")
    raise SpecError(
        f"a job is a JobSpec, or a mapping of its fields such as model and data, not {job!r:.80}; "
        "psgd.spec.reader.load_spec reads a job file"
    )


def parse_spec(tree: Mapping[str, Any], source: str) -> JobSpec:
    """Turn plain values into a JobSpec.

    Args:
        tree: the fields of a job.
        source: the name of the job in errors.

    Raises:
        SpecError: the fields are not a valid job; every fault is listed.
    """
    try:
        return JobSpec.model_validate(tree)
    except ValidationError as error:
        faults = "\n".join(f"  {line}" for line in explain(error, JobSpec))
        raise SpecError(f"{source} is not a valid job:\n{faults}") from error


def parse_value(text: str, source: str) -> Any:
    """Read a value from a command, in YAML of at most 10,000 characters.

    Args:
        text: the value.
        source: the name of the value in errors.

    Raises:
        SpecError: the text is not YAML, or too large.
    """
    return read_yaml(text, source)


def with_setting(tree: Mapping[str, Any], setting: str) -> dict[str, Any]:
    """Return the fields of a job with one of them replaced.

    Args:
        tree: the fields; they are left as they are.
        setting: `a.b=value`, the value in YAML.

    Raises:
        SpecError: this is not a setting, or its value is not YAML.
    """
    path, equals, text = setting.partition("=")
    names = tuple(path.strip().split("."))
    if not equals or not all(names) or len(names) > MAX_DEPTH:
        raise SpecError(f"setting {_short(setting)}: expected FIELD.FIELD=VALUE, such as optimizer.lr=0.1")
    return _with(tree, names, parse_value(text, f"setting {_short(setting)}"), f"setting {_short(setting)}")


def _with(tree: Mapping[str, Any], names: Sequence[str], value: Any, source: str) -> dict[str, Any]:
    first, *others = names
    if not others:
        return {name: each for name, each in tree.items() if name not in SAME.get(first, ())} | {first: value}
    below = tree.get(first) or {}
    if not isinstance(below, dict):
        raise SpecError(f"{source}: {first} is a plain value and has no fields")
    if tuple(names) == ("consistency", "mode") and below.get("mode") != value:
        below = {}  # another mode has other fields
    return dict(tree) | {first: _with(below, others, value, source)}


SAME = {"lr": ("learning_rate",), "learning_rate": ("lr",)}  # other names of a field, which it replaces


def _short(setting: str) -> str:
    return repr(setting) if len(setting) <= 80 else f"{setting[:80]!r}..."


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(FILE_LIMIT + 1)
        if len(content) > FILE_LIMIT:
            raise SpecError(f"the job file {str(path)!r} has more than 1 MiB, and no larger one is read")
        return content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read the job file {str(path)!r}: {error}") from error


def _name_of(path: Path) -> str:
    """Return a run's name made of the file's, with hyphens for what a run's name cannot hold."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")[:63] or "job"
