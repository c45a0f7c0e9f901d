"""Places in a job, as pydantic's errors name them, with the fields and classes that may stand there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

__all__ = ["TAG_FIELDS", "Place", "arguments", "field_names", "field_paths", "models_of", "tag_field", "tags_of"]

TAG_FIELDS = ("kind", "format", "mode", "name")  # fields that decide which other fields a section has
UNION_STEPS = re.compile(r"str|int|number|range|\[key\]|function-.*")  # in pydantic's paths, not in job files


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a fault in a job."""

    names: tuple[str, ...]  # path from the root, as in the job file
    owners: tuple[type[BaseModel], ...]  # classes that should have a field of the last name
    siblings: tuple[type[BaseModel], ...]  # all classes of the union that the owners belong to
    root: type[BaseModel]  # class of the whole job

    @classmethod
    def of(cls, steps: Sequence[str | int], root: type[BaseModel]) -> Place:
        """Return the place at the end of a path from pydantic, which contains tags of unions among the names."""
        names: list[str] = []
        inside: tuple[type[BaseModel], ...] = (root,)
        union = owners = siblings = inside
        for step in steps:
            tagged = tuple(model for model in inside if len(inside) > 1 and step in tags_of(model))
            if tagged:
                inside = tagged
            elif isinstance(step, int):  # an item of a list
                names.append(str(step))
            elif not names or not UNION_STEPS.fullmatch(str(step)):
                names.append(str(step))
                owners = inside
                siblings = union
                inside = union = tuple(model for owner in inside for model in models_of(owner, str(step)))
        return cls(tuple(names), owners, siblings, root)

    @property
    def name(self) -> str:
        """Last name of the path."""
        return self.names[-1] if self.names else "job"

    @property
    def field(self) -> FieldInfo | None:
        """Field of that name, or None."""
        named = [owner.model_fields.get(self.name) for owner in self.owners]
        return next((field for field in named if field), None)

    @property
    def models(self) -> list[type[BaseModel]]:
        """Classes of the values that the field may have."""
        return [model for owner in self.owners for model in models_of(owner, self.name)]

    @property
    def options(self) -> dict[str, type[BaseModel]]:
        """Classes of the values that the field may have, by the tag with which a job chooses them."""
        return {tag: model for model in self.models for tag in tags_of(model)}

    @property
    def known(self) -> list[str]:
        """Names of the fields that may stand in this place."""
        return sorted({name for owner in self.owners for name in field_names(owner)})


@cache
def field_paths(root: type[BaseModel], above: str = "") -> tuple[str, ...]:
    """Return the paths `section.field` of all fields of a job, shortest first."""
    here = [f"{above}{name}" for name in field_names(root)]
    sections = [(name, model) for name in root.model_fields for model in models_of(root, name)]
    below = [path for name, model in sections for path in field_paths(model, f"{above}{name}.")]
    return tuple(dict.fromkeys([*here, *sorted(below, key=lambda path: path.count("."))]))


@cache
def tags_of(model: type[BaseModel]) -> list[str]:
    """Return the tags with which a job chooses this class: none if there is no choice."""
    fields = [model.model_fields[name] for name in TAG_FIELDS if name in model.model_fields]
    return [tag for field in fields[:1] for tag in get_args(field.annotation) if isinstance(tag, str)]


def tag_field(*models: type[BaseModel]) -> str:
    """Return the name of the field whose value chooses among these classes, or an empty string."""
    return next((name for model in models for name in TAG_FIELDS if name in model.model_fields and tags_of(model)), "")


def field_names(model: type[BaseModel]) -> list[str]:
    """Return the names of the fields of a class, and their aliases."""
    aliases = [
        alias
        for field in model.model_fields.values()
        for alias in getattr(field.validation_alias, "choices", [])
        if isinstance(alias, str)
    ]
    return list(dict.fromkeys([*model.model_fields, *aliases]))


@cache
def models_of(owner: type[BaseModel], name: str) -> list[type[BaseModel]]:
    """Return the classes of the values that a field may have: all members of a union."""
    field = owner.model_fields.get(name)
    return list(_models((field.annotation, *field.metadata))) if field else []


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for part in _parts(annotation):
        yield from _models(part)


def arguments(annotation: Any) -> Iterator[Any]:
    """Yield the arguments of a type annotation, the arguments of these, and so on."""
    for part in _parts(annotation):
        yield part
        yield from arguments(part)


def _parts(annotation: Any) -> Sequence[Any]:
    return annotation if isinstance(annotation, tuple) else get_args(annotation)
