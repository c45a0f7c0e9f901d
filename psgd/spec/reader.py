"""The reader of job files: turns YAML into a JobSpec, or raises one error that lists every fault."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from psgd.errors import SpecError
from psgd.spec.explanations import as_yaml, explain
from psgd.spec.job import JobSpec
from psgd.spec.yaml_values import FILE_LIMIT, read_yaml
from psgd_workers.quoting import quoted, shown
from psgd_workers.regular_file import open_regular_file

__all__ = ["as_spec", "load_spec", "parse_spec", "with_setting"]

LONGEST_FAULT = 500  # characters of a fault in an error; a name in a damaged file may be of any length
MAX_DEPTH = 16  # field names in a setting such as a.b.c=1


def load_spec(
    path: str | Path, overrides: Sequence[str] = (), *, name: str | None = None, storage: str | None = None
) -> JobSpec:
    """Read a job file.

    Args:
        path: job file in YAML, of at most 256 KiB.
        overrides: settings `FIELD=VALUE`, such as `optimizer.lr=0.1`, which replace fields of the file; each value is
            YAML.
        name: name of the run. None: the `name` in the file, or a name made from the file's own name.
        storage: folder or URL that holds the runs. None: the `run.storage` in the file.

    Raises:
        SpecError: the file cannot be read or is not a valid job; every fault is listed.
    """
    path = Path(path)
    source = shown(str(path))
    tree = read_yaml(_text(path), source, FILE_LIMIT)
    if not isinstance(tree, dict):
        given = "is empty" if tree is None else f"holds {as_yaml(tree)}"
        raise SpecError(
            f"{source} {given}, but a job file is a mapping of fields such as model and data: see `psgd schema`"
        )
    for override in overrides:
        tree = with_setting(tree, override)
    if storage is not None:
        tree = _replace_field(tree, ("run", "storage"), storage, "--storage")
    given = tree.get("name") if name is None else name
    return parse_spec(tree | {"name": _name_of(path) if given is None else given}, source)


def as_spec(job: JobSpec | Mapping[str, Any]) -> JobSpec:
    """Return a JobSpec unchanged, or the job that a mapping of its fields describes, checked like a job file.

    Raises:
        SpecError: the mapping is not a valid job (every fault is listed), or `job` is neither of the two.
    """
    if isinstance(job, JobSpec):
        return job
    if isinstance(job, Mapping):
        return parse_spec(dict(job), "the job")
    raise SpecError(
        f"a job is a JobSpec, or a mapping of its fields such as model and data, not {as_yaml(job)}; "
        "psgd.spec.reader.load_spec reads a job file"
    )


def parse_spec(tree: Mapping[str, Any], source: str) -> JobSpec:
    """Return the JobSpec with these fields.

    Args:
        tree: fields of a job, as plain values.
        source: name of the job in errors.

    Raises:
        SpecError: the fields are not a valid job; every fault is listed.
    """
    try:
        return JobSpec.model_validate(tree)
    except ValidationError as error:
        faults = "\n".join(f"  {_cut(line)}" for line in explain(error, JobSpec))
        raise SpecError(f"{source} is not a valid job:\n{faults}") from error


def with_setting(tree: Mapping[str, Any], setting: str) -> dict[str, Any]:
    """Return the fields of a job with one of them replaced.

    Args:
        tree: fields of the job, which are not changed.
        setting: `FIELD=VALUE`, such as `optimizer.lr=0.1`; the value is YAML.

    Raises:
        SpecError: `setting` has another form, or its value is not YAML.
    """
    path, equals, text = setting.partition("=")
    names = tuple(path.strip().split("."))
    if not equals or not all(names) or len(names) > MAX_DEPTH:
        raise SpecError(f"setting {quoted(setting)}: expected FIELD=VALUE, such as optimizer.lr=0.1")
    source = f"setting {quoted(setting)}"
    return _replace_field(tree, names, read_yaml(text, source), source)


def _replace_field(tree: Mapping[str, Any], names: Sequence[str], value: Any, source: str) -> dict[str, Any]:
    first, *others = names
    if not others:
        return {name: each for name, each in tree.items() if name not in ALIASES.get(first, ())} | {first: value}
    section = tree.get(first) or {}
    if not isinstance(section, dict):
        raise SpecError(f"{source}: {first} is a plain value, which has no fields")
    if tuple(names) == ("consistency", "mode") and section.get("mode") != value:
        section = {}  # another mode has other fields
    return dict(tree) | {first: _replace_field(section, others, value, source)}


ALIASES = {"lr": ("learning_rate",), "learning_rate": ("lr",)}  # field -> its other names


def _cut(fault: str) -> str:
    return fault if len(fault) <= LONGEST_FAULT else f"{fault[:LONGEST_FAULT]}..."


def _text(path: Path) -> str:
    source = f"the job file '{shown(str(path))}'"
    try:
        with open_regular_file(path) as file:
            content = file.read(FILE_LIMIT + 1)
        if len(content) > FILE_LIMIT:
            raise SpecError(f"{source} is larger than 256 KiB, the largest size that is read")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise SpecError(f"cannot read {source}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"cannot read {source}: it is not text in UTF-8 ({error.reason})") from error
    except ValueError as error:
        raise SpecError(f"cannot read {source}: no file can have this name ({error})") from error


def _name_of(path: Path) -> str:
    """Return the name of a job file as the name of a run: hyphens replace characters that a run's name cannot have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")[:63] or "job"
