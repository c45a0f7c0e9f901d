"""Explanations of pydantic's errors in the words of a job file: place, expected value, given value, remedy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from math import log10
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from psgd.spec.synonyms import FIELDS, VALUES
from psgd_workers.spec import Spec, descriptions

__all__ = ["explain", "field_paths", "models_of"]

TAG_FIELDS = ("kind", "format", "mode", "name")  # a section's field that decides which others it has
UNION_STEPS = re.compile(r"str|int|number|range|\[key\]|function-.*")  # in pydantic's paths, but in no job file
NUMBER = re.compile(r"[-+.0-9eE]{1,40}")

EXPECTED = {  # pydantic's types of errors
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_unicode": "text",
    "tuple_type": "a list",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "string_too_short": "text that is not empty",
}
TYPES = ("int_type", "float_type", "bool_type", "string_type", "tuple_type")


def explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Return a line for each field that is wrong.

    Args:
        error: raised by the validation of a job.
        root: class that was validated.
    """
    faults: dict[tuple[str, ...], tuple[_Place, list[dict[str, Any]]]] = {}
    for fault in error.errors(include_url=False):
        place = _Place.of(fault["loc"], root)
        faults.setdefault(place.names, (place, []))[1].append(dict(fault))
    return [
        ": ".join(filter(None, (_where(place, found), _sentence(found, place))))
        for place, found in faults.values()
        if found[0]["type"] != "too_short" or len(_below(place.names, faults)) == 1
    ]


def _below(names: tuple[str, ...], faults: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return the places of faults in that part of the job, itself included."""
    return [fault for fault in faults if fault[: len(names)] == names]


@dataclass(frozen=True, slots=True)
class _Place:
    """A fault's place in a job."""

    names: tuple[str, ...]  # as in the file
    owners: tuple[type[BaseModel], ...]  # classes that the last name should be a field of
    siblings: tuple[type[BaseModel], ...]  # all members of their union
    root: type[BaseModel]

    @classmethod
    def of(cls, steps: Sequence[str | int], root: type[BaseModel]) -> _Place:
        """Follow pydantic's path, which has the tags of unions among the names."""
        names: list[str] = []
        inside: tuple[type[BaseModel], ...] = (root,)
        union = owners = siblings = inside
        for step in steps:
            tagged = tuple(model for model in inside if len(inside) > 1 and step in _tags(model))
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
    def field(self) -> FieldInfo | None:
        """The field of that name, if there is one."""
        named = [owner.model_fields.get(self.names[-1]) for owner in self.owners if self.names]
        return next((field for field in named if field), None)

    @property
    def options(self) -> dict[str, type[BaseModel]]:
        """Classes that the field may hold, by their tags."""
        models = [model for owner in self.owners for model in models_of(owner, self.names[-1])]
        return {tag: model for model in models for tag in _tags(model) or [model.__name__]}

    @property
    def known(self) -> list[str]:
        """Names that may be in this place."""
        return sorted({name for owner in self.owners for name in _field_names(owner)})

    @property
    def example(self) -> str:
        """The field and its value, as they may be written, or nothing."""
        examples = (self.field.examples or []) if self.field else []
        return " or ".join(f"{self.names[-1]}: {_flow(example)}" for example in examples)


def _where(place: _Place, faults: Sequence[Mapping[str, Any]]) -> str:
    tag = [_tag_field(*place.options.values())] if faults[0]["type"] == "union_tag_invalid" else []
    return ".".join([*place.names, *tag])


def _sentence(faults: Sequence[Mapping[str, Any]], place: _Place) -> str:
    fault = faults[0]
    kind = fault["type"]
    given = fault["input"]
    context = fault.get("ctx", {})
    match kind:
        case "extra_forbidden":
            return f"unknown field; {_meant(given, place)}"
        case "missing":
            return _missing(place)
        case "union_tag_not_found":
            return _untagged(given, place)
        case "union_tag_invalid":
            return _none_of(context["tag"], list(place.options))
        case "literal_error":
            return _none_of(given, re.findall(r"'([^']*)'", context["expected"]) or [context["expected"]])
        case "model_type" | "model_attributes_type" | "dict_type":
            return _no_section(given, place)
        case "value_error":
            said, semicolon, advice = fault["msg"].removeprefix("Value error, ").partition(";")
            return f"{said}{'' if isinstance(given, dict) else _but(given)}{semicolon}{advice}"
    expected = " or ".join(EXPECTED.get(each["type"], each["msg"]).format(**each.get("ctx", {})) for each in faults)
    return f"expected {expected}{_but(given)}{_remedy([each['type'] for each in faults], given, place)}"


def _none_of(given: Any, options: Sequence[str]) -> str:
    close = _closest(given, options)
    one = f"one of {', '.join(options)}" if len(options) > 1 else ", ".join(options)
    return f"expected {one}{_but(given)}" + (f"; did you mean {close!r}?" if close else "")


def _remedy(kinds: Sequence[str], given: Any, place: _Place) -> str:
    """Return what to do about a value of the wrong type, where that can be told."""
    text = "string_type" in kinds
    required = place.field is not None and place.field.is_required()
    match given:
        case None:
            return "; give a value" if required else "; give a value, or leave the field out"
        case bool():
            words, word = ("yes, on and true", "yes") if given else ("no, off and false", "no")
            said = f": YAML reads {words} without quotes as {_flow(given)}"
            return f"{said}; for the text, write it in quotes, such as {word!r}" if text else said
        case int() | float() if text:
            return "; for the text, write it in quotes" + (f", '{given}'" if isinstance(given, int) else "")
        case int() | str() if (
            "tuple_type" in kinds and not (_has_length(place) or place.options) and NUMBER.fullmatch(str(given))
        ):
            return f"; write [{given}]"
        case str() if re.fullmatch(r"[-+]?[0-9]{1,20},[0-9]{1,20}", given):
            return f"; a decimal has a point, {given.replace(',', '.')}"
        case str() if not text and (NUMBER.fullmatch(given) or given.lower() in ("true", "false", "yes", "no")):
            return "; write it without quotes"
    return f"; for example {place.example}" if place.example and kinds[0] in TYPES else ""


def _has_length(place: _Place) -> bool:
    """Return True if the field is a list of a fixed length."""
    return place.field is not None and ... not in _arguments(place.field.annotation)


def _missing(place: _Place) -> str:
    if place.example:
        return f"missing; for example {place.example}"
    texts = [descriptions(owner).get(place.names[-1], "") for owner in place.owners if issubclass(owner, Spec)]
    meaning = " ".join(texts[0].split()) if texts else ""
    return f"missing ({meaning})" if meaning else "missing"


def _no_section(given: Any, place: _Place) -> str:
    """Tell how fields are written, where a plain value is in their place."""
    name = place.names[-1]
    label = "" if name.isdigit() else f"{name}: "  # of an item of a list
    if given is None:
        out = "" if place.field and place.field.is_required() else ", or leave it out"
        return f"empty; give its fields, for example {place.example or label + '{NAME: VALUE}'}{out}"
    if filled := _filled(given, place.options):
        return f"expected fields{_but(given)}; write {label}{filled}"
    return f"expected fields{_but(given)}; for example {place.example or label + '{NAME: VALUE}'}"


def _filled(given: Any, options: Mapping[str, type[BaseModel]]) -> str:
    """Return the fields that a plain value in their place was probably meant for, or nothing."""
    if not isinstance(given, str):
        return ""
    fields = [(tag, name) for tag, model in options.items() for name in model.model_fields]
    values = [(tag, name) for tag, name in fields if given in get_args(options[tag].model_fields[name].annotation)]
    tag, name = next(iter(values), (given.rpartition(".")[2], "path"))  # such as iris, or mnist.npz
    meant = {name: given}
    if close := _closest(given, list(options)):
        tag = close
        meant = {}
    if tag not in options:
        return ""
    wanted = [each for each, field in options[tag].model_fields.items() if field.is_required()]
    others = [f"{each}: {_plain(meant.get(each, '...'))}" for each in wanted if each not in TAG_FIELDS]
    return f"{{{', '.join([f'{_tag_field(options[tag])}: {tag}', *others])}}}"


def _untagged(given: Any, place: _Place) -> str:
    tag = _tag_field(*place.options.values())
    options = place.options
    given = given if isinstance(given, Mapping) else {}
    wrong = [name for name, value in given.items() if isinstance(value, str) and value in options]
    hint = f"; write {tag} in place of {wrong[0]}" if wrong else ""
    return f"missing {tag!r}, which says what the other fields mean: one of {', '.join(options)}{hint}"


def _meant(given: Any, place: _Place) -> str:
    """Tell what an unknown field was probably meant for."""
    name = place.names[-1]
    folded = _folded(name)
    ours = FIELDS.get(_folded(name), name)
    if ":" in name:
        return "a field is written NAME: VALUE, with a space after the colon"
    if name in place.known:
        return "lr and learning_rate mean the same: give one of them"
    begun = [each for each in place.known if each.startswith(f"{folded}_") or each == ours]
    if holders := begun or [each for each in place.known if given in _choices(each, place)]:
        return f"did you mean {_listed([repr(each) for each in holders], 'or')}?"
    if others := [tag for model in place.siblings if ours in _field_names(model) for tag in _tags(model)]:
        close = get_close_matches(folded, place.known, n=1, cutoff=0.85)
        own = _listed([tag for owner in place.owners for tag in _tags(owner)])
        where = f"{ours} is a field of {place.names[-2]} {_listed(others)}, not of {own}"
        return f"did you mean {close[0]!r}?" if close else where
    return _elsewhere(name, ours, place) or f"the fields are {', '.join(place.known)}{_own_arguments(place)}"


def _own_arguments(place: _Place) -> str:
    return "; arguments of your own function go into kwargs" if "kwargs" in place.known else ""


def _elsewhere(name: str, ours: str, place: _Place) -> str:
    """Tell in which other part of a job such a field is, or which field here has a similar name."""
    paths: dict[str, str] = {}
    for path in field_paths(place.root):
        paths.setdefault(path.rpartition(".")[2], path)
    similar = get_close_matches(_folded(name), place.known, n=1)
    far = get_close_matches(_folded(name), paths, n=1, cutoff=0.8)
    found = paths.get(name) or paths.get(ours) or next(iter(similar), "") or (paths[far[0]] if far else "")
    if found and "." not in found and found not in place.known:
        return f"{found!r} belongs to the top level of the job"
    return f"did you mean {found!r}?" if found else ""


def _choices(name: str, place: _Place) -> list[Any]:
    """Return the texts that a field may have, those of a union's other members included."""
    fields = [model.model_fields[name] for model in place.siblings if name in model.model_fields]
    return [each for field in fields for each in get_args(field.annotation) if isinstance(each, str)]


def _closest(given: Any, options: Sequence[str]) -> str:
    """Return the option that was probably meant, or nothing."""
    if not isinstance(given, str):
        return ""
    meant = VALUES.get(_folded(given), "")
    close = [meant] if meant in options else get_close_matches(_folded(given), options, n=1)
    return close[0] if close else ""


@cache
def field_paths(root: type[BaseModel], above: str = "") -> tuple[str, ...]:
    """Return all fields of a job, `a.b`, the outermost first."""
    here = [f"{above}{name}" for name in _field_names(root)]
    sections = [(name, model) for name in root.model_fields for model in models_of(root, name)]
    below = [path for name, model in sections for path in field_paths(model, f"{above}{name}.")]
    return tuple(dict.fromkeys([*here, *sorted(below, key=lambda path: path.count("."))]))


def _tags(model: type[BaseModel]) -> list[str]:
    """Return the values by which a job chooses this class, none if it is the only one."""
    fields = [model.model_fields[name] for name in TAG_FIELDS if name in model.model_fields]
    return [tag for field in fields[:1] for tag in get_args(field.annotation) if isinstance(tag, str)]


def _tag_field(*models: type[BaseModel]) -> str:
    """Return the name of the field that tells these classes apart, or nothing."""
    return next((name for model in models for name in TAG_FIELDS if name in model.model_fields and _tags(model)), "")


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


def _arguments(annotation: Any) -> Iterator[Any]:
    """Yield an annotation's arguments, and theirs."""
    for part in _parts(annotation):
        yield part
        yield from _arguments(part)


def _parts(annotation: Any) -> Sequence[Any]:
    return annotation if isinstance(annotation, tuple) else get_args(annotation)


def _field_names(model: type[BaseModel]) -> list[str]:
    aliases = [
        alias
        for field in model.model_fields.values()
        for alias in getattr(field.validation_alias, "choices", [])
        if isinstance(alias, str)
    ]
    return list(dict.fromkeys([*model.model_fields, *aliases]))


def _listed(texts: Sequence[str], word: str = "and") -> str:
    return f" {word} ".join(filter(None, (", ".join(texts[:-1]), *texts[-1:])))


def _folded(text: str) -> str:
    return text.lower().replace("-", "_")


def _but(given: Any) -> str:
    return f", not {_flow(given)}"


def _flow(value: Any) -> str:
    """Return a value as it is written in YAML, shortened."""
    match value:
        case str():
            return repr(value) if len(value) <= 60 else f"{value[:60]!r}... ({len(value):,} characters)"
        case bool() | None:
            return {True: "true", False: "false", None: "null"}[value]
        case int() if abs(value) >= 10**60:
            return f"a number of {int(value.bit_length() * log10(2)) + 1:,} digits"
        case Mapping():
            pairs = (f"{_plain(key)}: {_plain(each)}" for key, each in list(value.items())[:20])
            return _short("{" + ", ".join(pairs) + "}")
        case list() | tuple():
            return _short("[" + ", ".join(_plain(each) for each in value[:20]) + "]")
    return _short(repr(value))


def _plain(value: Any) -> str:
    """Return text without quotes where YAML needs none."""
    return value if isinstance(value, str) and re.fullmatch(r"\.\.\.|[A-Za-z_][\w./:-]*", value) else _flow(value)


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
