"""Explanations of pydantic's errors in the terms of a job file: field, expected value, given value and remedy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice
from math import log10
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from psgd.spec.places import TAG_FIELDS, Place, arguments, field_names, field_paths, tag_field, tags_of
from psgd.spec.synonyms import FIELDS, VALUES
from psgd_workers.quoting import quoted, shown
from psgd_workers.redaction import redact
from psgd_workers.spec import Spec, descriptions

__all__ = ["as_yaml", "explain"]

MAX_ITEMS = 20  # items of a list or a mapping that are shown
MAX_PLAIN = 60  # characters of a text that is shown without quotes
MAX_FAULTS = 20  # largest number of fields explained in one message
NUMBER = re.compile(r"[-+]?([0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})([eE][-+]?[0-9]{1,9})?")

EXPECTED = {  # type of pydantic's error -> expected value
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_unicode": "text",
    "tuple_type": "a list",
    "invalid_key": "text as a field's name",
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
    """Return a line for each wrong field, for at most 20 fields.

    Args:
        error: error of the validation of a job.
        root: class of the job that was validated.
    """
    faults: dict[tuple[str, ...], tuple[Place, list[dict[str, Any]]]] = {}
    for fault in error.errors(include_url=False):
        place = Place.of(fault["loc"], root)
        faults.setdefault(place.names, (place, []))[1].append(dict(fault))
    shown = [
        (place, found)
        for place, found in list(faults.values())[:MAX_FAULTS]
        if found[0]["type"] != "too_short" or len(_faults_inside(place.names, faults)) == 1
    ]
    lines = [": ".join(filter(None, (_path(place, found), _sentence(found, place)))) for place, found in shown]
    return [*lines, f"and {len(faults) - MAX_FAULTS:,} more"] if len(faults) > MAX_FAULTS else lines


def _faults_inside(names: tuple[str, ...], faults: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return the names of the faults in a part of the job, including the part itself."""
    return [fault for fault in faults if fault[: len(names)] == names]


def _example(place: Place) -> str:
    """Return an example of the field and its value in YAML, or an empty string."""
    examples = (place.field.examples or []) if place.field else []
    return " or ".join(f"{place.name}: {as_yaml(example)}" for example in examples)


def _path(place: Place, faults: Sequence[Mapping[str, Any]]) -> str:
    tag = [tag_field(*place.options.values())] if faults[0]["type"] == "union_tag_invalid" else []
    return ".".join([*(_shown_name(name) for name in place.names), *tag])


def _shown_name(name: str) -> str:
    """Return the name of a field, shortened, and with control characters escaped."""
    return shown(name if len(name) <= 60 else f"{name[:57]}...") or "''"


def _sentence(faults: Sequence[Mapping[str, Any]], place: Place) -> str:
    fault = faults[0]
    kind = fault["type"]
    given = fault["input"]
    context = fault.get("ctx", {})
    match kind:
        case "extra_forbidden":
            return f"unknown field; {_unknown_field(given, place)}"
        case "missing":
            return _missing(place)
        case "union_tag_not_found":
            return _missing_tag(given, place)
        case "union_tag_invalid":
            return _wrong_choice(context["tag"], list(place.options))
        case "literal_error":
            options = re.findall(r"'([^']*)'", context["expected"])
            if not options:
                return f"expected {context['expected']}{_instead_of(given)}"
            return _wrong_choice(given, options) + (_remedy([kind], given, place) if isinstance(given, bool) else "")
        case "model_type" | "model_attributes_type" | "dict_type":
            return _not_a_section(given, place)
        case "value_error":
            problem, semicolon, advice = fault["msg"].removeprefix("Value error, ").partition(";")
            return f"{problem}{'' if isinstance(given, dict) else _instead_of(given)}{semicolon}{advice}"
    if kind not in EXPECTED:
        return f"{fault['msg']}{_instead_of(given)}"
    known = [each for each in faults if each["type"] in EXPECTED]
    expected = " or ".join(EXPECTED[each["type"]].format(**each.get("ctx", {})) for each in known)
    return f"expected {expected}{_instead_of(given)}{_remedy([each['type'] for each in faults], given, place)}"


def _wrong_choice(given: Any, options: Sequence[str]) -> str:
    close = _closest(given, options) or (_closest(given.rpartition(".")[2], options) if isinstance(given, str) else "")
    one = f"one of {', '.join(options)}" if len(options) > 1 else ", ".join(options)
    return f"expected {one}{_instead_of(given)}" + (f"; did you mean {close!r}?" if close else "")


def _remedy(kinds: Sequence[str], given: Any, place: Place) -> str:
    """Return what to do about a value of the wrong type, or an empty string."""
    text = "string_type" in kinds
    required = place.field is not None and place.field.is_required()
    match given:
        case None:
            return "; give a value" if required else "; give a value, or leave the field out"
        case bool():
            words, word = ("yes, on and true", "yes") if given else ("no, off and false", "no")
            reason = f": YAML reads {words} without quotes as {as_yaml(given)}"
            return f"{reason}; for the text, write it in quotes, such as {word!r}" if text else reason
        case int() | float() if text:
            return "; for the text, write it in quotes" + (f", '{_unquoted(given)}'" if isinstance(given, int) else "")
        case int() | str() if (
            "tuple_type" in kinds and not (_has_length(place) or place.models) and NUMBER.fullmatch(_unquoted(given))
        ):
            return f"; write [{_unquoted(given)}]"
        case str() if re.fullmatch(r"[-+]?[0-9]{1,20},[0-9]{1,20}", given):
            return f"; a decimal has a point, {given.replace(',', '.')}"
        case str() if not text and (NUMBER.fullmatch(given) or given.lower() in ("true", "false", "yes", "no")):
            return "; write it without quotes"
    return f"; for example {_example(place)}" if _example(place) and kinds[0] in TYPES else ""


def _has_length(place: Place) -> bool:
    """Return True if the field is a list of fixed length."""
    return place.field is not None and ... not in arguments(place.field.annotation)


def _missing(place: Place) -> str:
    if _example(place):
        return f"missing; for example {_example(place)}"
    texts = [descriptions(owner).get(place.name, "") for owner in place.owners if issubclass(owner, Spec)]
    meaning = " ".join(texts[0].split()) if texts else ""
    return f"missing ({meaning})" if meaning else "missing"


def _not_a_section(given: Any, place: Place) -> str:
    """Explain how to write a section that was given as a plain value."""
    name = place.name
    prefix = "" if name.isdigit() else f"{name}: "  # digits: an item of a list
    if given is None:
        out = "" if place.field and place.field.is_required() else ", or leave it out"
        return f"empty; give its fields, for example {_example(place) or prefix + '{NAME: VALUE}'}{out}"
    if section := _likely_fields(given, place.options):
        return f"expected fields{_instead_of(given)}; write {prefix}{section}"
    return f"expected fields{_instead_of(given)}; for example {_example(place) or prefix + '{NAME: VALUE}'}"


def _likely_fields(given: Any, options: Mapping[str, type[BaseModel]]) -> str:
    """Return the section that a plain value in its place probably stands for, or an empty string."""
    if not isinstance(given, str):
        return ""
    fields = [(tag, name) for tag, model in options.items() for name in model.model_fields]
    values = [(tag, name) for tag, name in fields if given in get_args(options[tag].model_fields[name].annotation)]
    tag, name = next(iter(values), (given.rpartition(".")[2], "path"))  # iris is a value of dataset; mnist.npz a path
    meant = {name: given}
    if close := _closest(given, list(options)):
        tag = close
        meant = {}
    if tag not in options:
        return ""
    wanted = [each for each, field in options[tag].model_fields.items() if field.is_required()]
    others = [f"{each}: {_as_plain_yaml(meant.get(each, '...'))}" for each in wanted if each not in TAG_FIELDS]
    return f"{{{', '.join([f'{tag_field(options[tag])}: {tag}', *others])}}}"


def _missing_tag(given: Any, place: Place) -> str:
    tag = tag_field(*place.options.values())
    options = place.options
    given = given if isinstance(given, Mapping) else {}
    wrong = [name for name, value in given.items() if isinstance(value, str) and value in options]
    inside = [name for name in given if name in options]  # mlp in model: {mlp: {hidden: [64]}}
    hint = f"; write {tag} in place of {wrong[0]}" if wrong else f"; write {tag}: {inside[0]}" if inside else ""
    return f"missing {tag!r}, which says what the other fields mean: one of {', '.join(options)}{hint}"


def _unknown_field(given: Any, place: Place) -> str:
    """Explain which field an unknown one probably stands for."""
    name = place.name
    normalised = _normalised(name)
    ours = FIELDS.get(_normalised(name), name)
    if ":" in name:
        return "a field is written NAME: VALUE, with a space after the colon"
    if name in place.known:
        return "lr and learning_rate mean the same: give one of them"
    if name in (tags := [tag for model in place.siblings for tag in tags_of(model)]):
        return f"write {tag_field(*place.siblings)}: {name}, and its fields beside it"
    chosen = [each for each in place.known if given in _allowed_texts(each, place)]
    if meant := [ours] if ours in place.known else chosen or _related(normalised, place.known):
        return f"did you mean {_listed([repr(each) for each in meant], 'or')}?"
    if others := [tag for tag, model in zip(tags, place.siblings, strict=False) if ours in field_names(model)]:
        if close := get_close_matches(normalised, place.known, n=1, cutoff=0.85):
            return f"did you mean {close[0]!r}?"
        own = _listed([tag for owner in place.owners for tag in tags_of(owner)])
        return f"{ours} is a field of {place.names[-2]} {_listed(others)}, not of {own}"
    return _field_elsewhere(name, ours, place) or f"{_known_fields(place)}{_kwargs_hint(place)}"


def _related(normalised: str, known: Sequence[str]) -> list[str]:
    """Return the fields whose names begin with this name, or are a part of it."""
    return [each for each in known if each.startswith(f"{normalised}_") or f"_{each}_" in f"_{normalised}_"]


def _known_fields(place: Place) -> str:
    names = ", ".join(place.known)
    return f"the fields are {names}" if len(place.known) > 1 else f"the only field is {names}"


def _kwargs_hint(place: Place) -> str:
    return "; arguments of your own function go into kwargs" if "kwargs" in place.known else ""


def _field_elsewhere(name: str, ours: str, place: Place) -> str:
    """Name the other section of a job that has such a field, or the field here that has a similar name."""
    paths: dict[str, str] = {}
    for path in field_paths(place.root):
        if len(last := path.rpartition(".")[2]) > 1:
            paths.setdefault(last, path)
    exact = [paths[each] for each in (name, ours) if each in paths]
    similar = get_close_matches(_normalised(name), place.known, n=1, cutoff=0.7)
    far = [paths[each] for each in get_close_matches(_normalised(name), paths, n=1, cutoff=0.85)]
    found = next(iter([*exact, *similar, *far]), "")
    if found and "." not in found and found not in place.known:
        return f"{found!r} belongs to the top level of the job"
    return f"did you mean {found!r}?" if found else ""


def _allowed_texts(name: str, place: Place) -> list[Any]:
    """Return the texts that a field may have, in any class of its union."""
    fields = [model.model_fields[name] for model in place.siblings if name in model.model_fields]
    return [each for field in fields for each in get_args(field.annotation) if isinstance(each, str)]


def _closest(given: Any, options: Sequence[str]) -> str:
    """Return the option that was probably meant, or an empty string."""
    if not isinstance(given, str):
        return ""
    meant = VALUES.get(_normalised(given), "")
    close = [meant] if meant in options else get_close_matches(_normalised(given), options, n=1)
    return close[0] if close else ""


def _listed(texts: Sequence[str], word: str = "and") -> str:
    return f" {word} ".join(filter(None, (", ".join(texts[:-1]), *texts[-1:])))


def _normalised(text: str) -> str:
    return text.lower().replace("-", "_")


def _instead_of(given: Any) -> str:
    return f", not {as_yaml(given)}"


def as_yaml(value: Any, depth: int = 3) -> str:
    """Return a value as it is written in YAML, in one short line and without the secrets of URLs.

    Args:
        value: any value.
        depth: levels of lists and mappings that are written out.
    """
    match value:
        case str():
            return quoted(value)
        case bool() | None:
            return {True: "true", False: "false", None: "null"}[value]
        case int() if abs(value) >= 10**60:
            return f"a number of {int(value.bit_length() * log10(2)) + 1:,} digits"
        case Mapping() | list() | tuple() if depth == 0:
            return "..."
        case Mapping():
            pairs = (
                f"{_as_plain_yaml(key, depth - 1)}: {_as_plain_yaml(value[key], depth - 1)}"
                for key in islice(value, MAX_ITEMS)
            )
            return _short("{" + ", ".join(pairs) + "}")
        case list() | tuple():
            return _short("[" + ", ".join(_as_plain_yaml(each, depth - 1) for each in value[:MAX_ITEMS]) + "]")
    return _short(repr(value))


def _unquoted(value: Any) -> str:
    """Return a value as it is written in YAML, but text without quotes."""
    return as_yaml(value).strip("'")


def _as_plain_yaml(value: Any, depth: int = 3) -> str:
    """Return a value as it is written in YAML, without quotes if YAML needs none."""
    if isinstance(value, str) and len(value) <= MAX_PLAIN and re.fullmatch(r"\.\.\.|[A-Za-z_][\w./:-]*", value):
        return redact(value)
    return as_yaml(value, depth)


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
