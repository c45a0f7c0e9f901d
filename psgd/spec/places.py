"""Places in a job: the fields that are there, the classes that they may hold, and the way pydantic names them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

__all__ = ["TAG_FIELDS", "Place", "arguments", "field_names", "field_paths", "models_of", "tag_field", "tags_of"]

TAG_FIELDS = ("kind", "format", "mode", "name")  # a section's field that decides which others it has
UNION_STEPS = re.compile(r"str|int|number|range|\[key\]|function-.*")  # in pydantic's paths, but in no job file


@dataclass(frozen=True, slots=True)
class Place:
    """A fault's place in a job."""

    names: tuple[str, ...]  # as in the file
    owners: tuple[type[BaseModel], ...]  # classes that the last name should be a field of
    siblings: tuple[type[BaseModel], ...]  # all members of their union
    root: type[BaseModel]

    @classmethod
    def of(cls, steps: Sequence[str | int], root: type[BaseModel]) -> Place:
        """Follow pydantic's path, which has the tags of unions among the names."""
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
        """The last of the names."""
        return self.names[-1] if self.names else "job"

    @property
    def field(self) -> FieldInfo | None:
        """The field of that name, if there is one."""
        named = [owner.model_fields.get(self.name) for owner in self.owners]
        return next((field for field in named if field), None)

    @property
    def models(self) -> list[type[BaseModel]]:
        """Classes that the field may hold."""
        return [model for owner in self.owners for model in models_of(owner, self.name)]

    @property
    def options(self) -> dict[str, type[BaseModel]]:
        """Classes that the field may hold, by the tags that a job chooses them by."""
        return {tag: model for model in self.models for tag in tags_of(model)}

    @property
    def known(self) -> list[str]:
        """Names that may be in this place."""
        return sorted({name for owner in self.owners for name in field_names(owner)})


@cache
def field_paths(root: type[BaseModel], above: str = "") -> tuple[str, ...]:
    """Return all fields of a job, `a.b`, the outermost first."""
    here = [f"{above}{name}" for name in field_names(root)]
    sections = [(name, model) for name in root.model_fields for model in models_of(root, name)]
    below = [path for name, model in sections for path in field_paths(model, f"{above}{name}.")]
    return tuple(dict.fromkeys([*here, *sorted(below, key=lambda path: path.count("."))]))


def tags_of(model: type[BaseModel]) -> list[str]:
    """Return the values by which a job chooses this class, none if it is the only one."""
    fields = [model.model_fields[name] for name in TAG_FIELDS if name in model.model_fields]
    return [tag for field in fields[:1] for tag in get_args(field.annotation) if isinstance(tag, str)]


def tag_field(*models: type[BaseModel]) -> str:
    """Return the name of the field that tells these classes apart, or nothing."""
    return next((name for model in models for name in TAG_FIELDS if name in model.model_fields and tags_of(model)), "")


def field_names(model: type[BaseModel]) -> list[str]:
    aliases = [
        alias
        for field in model.model_fields.values()
        for alias in getattr(field.validation_alias, "choices", [])
        if isinstance(alias, str)
    ]
    return list(dict.fromkeys([*model.model_fields, *aliases]))


def models_of(owner: type[BaseModel], name: str) -> list[type[BaseModel]]:
    """Return the classes that a field may hold, all members of a union."""
    field = owner.model_fields.get(name)
    return list(_models((field.annotation, *field.metadata))) if field else []


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for part in _parts(annotation):
        yield from _models(part)


def arguments(annotation: Any) -> Iterator[Any]:
    """Yield an annotation's arguments, and theirs."""
    for part in _parts(annotation):
        yield part
        yield from arguments(part)


def _parts(annotation: Any) -> Sequence[Any]:
    return annotation if isinstance(annotation, tuple) else get_args(annotation)
