"""The job file: YAML in which `1e-3` is a number, and messages that say what was meant."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from psgd.errors import SpecError
from psgd.spec import JobSpec

__all__ = ["change_settings", "change_workers", "load_spec", "override_spec", "parse_spec", "parse_value"]

RANGE_TAGS = ("number", "range")  # what `scaling.workers` may be, which no user writes
# YAML 1.1, which PyYAML reads, wants a dot and a sign in "1.0e-3" and takes "1e-3" for a string.
FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")


CHANGEABLE = re.compile(r"consistency(\..*)?|optimizer\.(lr|schedule|max_grad_norm|clip_value)")


class _Loader(yaml.SafeLoader):
    """Safe YAML with decimal exponents, and without silently repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if repeated := sorted({key for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"{repeated[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> JobSpec:
    """Read a job file.

    Args:
        path: of a YAML file.
        overrides: `a.b=value` each, the value in YAML; they win over the file.

    Returns:
        The job, named after the file if it says no name.

    Raises:
        SpecError: the file cannot be read or is not a valid job; every fault is listed.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read the job file {str(path)!r}: {error}") from error
    tree = parse_value(text, str(path))
    if not isinstance(tree, dict):
        raise SpecError(f"{path}: a job file is a mapping of fields such as model and data, not {tree!r:.80}")
    for override in overrides:
        _override(tree, override)
    tree.setdefault("name", path.stem)
    return parse_spec(tree, str(path))


def override_spec(spec: JobSpec, overrides: Sequence[str]) -> JobSpec:
    """The job with some of its fields replaced.

    Args:
        spec: the job.
        overrides: `a.b=value` each, the value in YAML.

    Raises:
        SpecError: the result is no valid job.
    """
    tree = spec.model_dump(mode="json", exclude_unset=True)
    for override in overrides:
        _override(tree, override)
    return parse_spec(tree, "the changed job")


def change_settings(spec: JobSpec, overrides: Sequence[str]) -> JobSpec:
    """The job with some of its settings changed, as `psgd set` may change them while it runs.

    Args:
        spec: the job as it runs.
        overrides: `a.b=value` each.

    Raises:
        SpecError: the result is no valid job, or something else would change than can.
    """
    after = override_spec(spec, overrides)
    changed = sorted(_changed(spec, after))
    if not changed:
        raise SpecError(f"{' '.join(overrides)}: that is how the job runs already")
    if wrong := [field for field in changed if not CHANGEABLE.fullmatch(field)]:
        raise SpecError(
            f"{', '.join(wrong)} cannot change while the job runs: only consistency, and the optimizer's lr, schedule, "
            "max_grad_norm and clip_value can. Stop it, and start another under a new --name"
        )
    if spec.worker_options != after.worker_options:
        raise SpecError(
            f"consistency cannot change from {spec.consistency!r} to {after.consistency!r} while the job runs: local "
            "steps, and ringmaster's stop, are what workers are started with. Start another job under a new --name"
        )
    return after


def _changed(before: JobSpec, after: JobSpec) -> Iterator[str]:
    """The fields that differ, sections' one by one."""
    for section in JobSpec.model_fields:
        old = getattr(before, section)
        new = getattr(after, section)
        if old == new:
            continue
        if type(old) is not type(new) or not isinstance(old, BaseModel):
            yield section
            continue
        yield from (f"{section}.{name}" for name in type(old).model_fields if getattr(old, name) != getattr(new, name))


def change_workers(spec: JobSpec, workers: str) -> JobSpec:
    """The job with another number of workers.

    Raises:
        SpecError: it is no number, or the job cannot be run by so many.
    """
    if not workers.isdigit():
        raise SpecError(f"{workers!r} workers: expected a number")
    tree = spec.model_dump(mode="json")
    tree["scaling"]["workers"] = int(workers)
    return parse_spec(tree, f"the job with {workers} workers")


def parse_spec(tree: dict[str, Any], source: str) -> JobSpec:
    """Turn plain values into a JobSpec; faults become one SpecError that lists them all."""
    try:
        return JobSpec.model_validate(tree)
    except ValidationError as error:
        faults = "\n".join(f"  {_fault(dict(fault))}" for fault in error.errors(include_url=False))
        raise SpecError(f"{source} is not a valid job:\n{faults}") from error


def parse_value(text: str, source: str) -> Any:
    """YAML in which `1e-3` is a number.

    Raises:
        SpecError: naming the source: it is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise SpecError(f"{source} is not YAML: {error}") from error


def _override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    *parents, leaf = path.strip().split(".")
    if not equals or not leaf:
        raise SpecError(f"--set {override!r}: expected FIELD.FIELD=VALUE, such as optimizer.lr=0.1")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise SpecError(f"--set {override!r}: {parent} is a plain value and has no fields")
    if leaf == "learning_rate":  # the alias must replace what the file calls lr
        tree.pop("lr", None)
    if leaf == "lr":
        tree.pop("learning_rate", None)
    value = parse_value(text, f"--set {override}")
    if path.strip() == "consistency.mode" and tree.get(leaf) != value:
        tree.clear()  # another mode has other fields
    tree[leaf] = value


def _fault(fault: dict[str, Any]) -> str:
    """One line on one fault: where, what, and what was perhaps meant."""
    names, models = _walk(fault["loc"])
    where = ".".join(names) or "the job"
    if fault["type"] == "extra_forbidden":
        fields = [field for model in models for field in _field_names(model)]
        close = get_close_matches(names[-1], fields, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the fields are {', '.join(fields)}"
        return f"{where}: unknown field; {hint}"
    if fault["type"] == "missing":
        return f"{where}: missing"
    if fault["type"] == "union_tag_not_found":
        return f"{where}: missing {fault['ctx']['discriminator']}, which says what the other fields mean"
    given = "" if isinstance(fault["input"], dict) else f", not {fault['input']!r:.80}"
    return f"{where}: {fault['msg'].removeprefix('Value error, ')}{given}"


def _walk(loc: Sequence[str | int]) -> tuple[list[str], list[type[BaseModel]]]:
    """The names on a fault's path, union tags left out, and the spec classes that the last name belongs to."""
    names: list[str] = []
    inside: list[type[BaseModel]] = [JobSpec]
    owners = inside
    for step in loc:
        fields = [model.model_fields[str(step)] for model in inside if str(step) in model.model_fields]
        tagged = [model for model in inside if step in _tags(model)]
        if not fields and tagged and step != loc[-1]:
            inside = tagged
            continue
        if step in RANGE_TAGS and names and names[-1] == "workers":
            continue
        names.append(str(step))
        owners = inside
        inside = [model for field in fields for model in _models((field.annotation, field.metadata))]
    return names, owners


def _tags(model: type[BaseModel]) -> list[str]:
    return [
        tag
        for name in ("kind", "format", "mode", "name")
        if name in model.model_fields
        for tag in get_args(model.model_fields[name].annotation)
        if isinstance(tag, str)
    ]


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    parts = annotation if isinstance(annotation, tuple) else get_args(annotation)
    return [model for part in parts for model in _models(part)] if parts else []


def _field_names(model: type[BaseModel]) -> list[str]:
    aliases = [
        alias
        for field in model.model_fields.values()
        for alias in getattr(field.validation_alias, "choices", [])
        if isinstance(alias, str)
    ]
    return sorted({*model.model_fields, *aliases})
