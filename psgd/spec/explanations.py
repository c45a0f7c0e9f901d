"""Explanations of pydantic's errors in the words of a job file: place, expected value, given value, remedy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from math import log10
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from psgd.spec.places import TAG_FIELDS, Place, arguments, field_names, field_paths, tag_field, tags_of
from psgd.spec.synonyms import FIELDS, VALUES
from psgd_workers.spec import Spec, descriptions

__all__ = ["explain"]

MAX_FAULTS = 20  # explained in one message
NUMBER = re.compile(r"[-+]?([0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})([eE][-+]?[0-9]{1,9})?")

EXPECTED = {  # pydantic's types of errors
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
    """Return a line for each field that is wrong, up to 20 of them.

    Args:
        error: raised by the validation of a job.
        root: class that was validated.
    """
    faults: dict[tuple[str, ...], tuple[Place, list[dict[str, Any]]]] = {}
    for fault in error.errors(include_url=False):
        place = Place.of(fault["loc"], root)
        faults.setdefault(place.names, (place, []))[1].append(dict(fault))
    shown = [
        (place, found)
        for place, found in list(faults.values())[:MAX_FAULTS]
        if found[0]["type"] != "too_short" or len(_below(place.names, faults)) == 1
    ]
    lines = [": ".join(filter(None, (_where(place, found), _sentence(found, place)))) for place, found in shown]
    return [*lines, f"and {len(faults) - MAX_FAULTS:,} more"] if len(faults) > MAX_FAULTS else lines


def _below(names: tuple[str, ...], faults: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return the places of faults in that part of the job, itself included."""
    return [fault for fault in faults if fault[: len(names)] == names]


def _example(place: Place) -> str:
    """Return the field and its value, as they may be written, or nothing."""
    examples = (place.field.examples or []) if place.field else []
    return " or ".join(f"{place.name}: {_flow(example)}" for example in examples)


def _where(place: Place, faults: Sequence[Mapping[str, Any]]) -> str:
    tag = [tag_field(*place.options.values())] if faults[0]["type"] == "union_tag_invalid" else []
    return ".".join([*((name or "''") if len(name) <= 60 else f"{name[:57]}..." for name in place.names), *tag])


def _sentence(faults: Sequence[Mapping[str, Any]], place: Place) -> str:
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
            options = re.findall(r"'([^']*)'", context["expected"])
            return _none_of(given, options) if options else f"expected {context['expected']}{_but(given)}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return _no_section(given, place)
        case "value_error":
            said, semicolon, advice = fault["msg"].removeprefix("Value error, ").partition(";")
            return f"{said}{'' if isinstance(given, dict) else _but(given)}{semicolon}{advice}"
    if kind not in EXPECTED:
        return f"{fault['msg']}{_but(given)}"
    known = [each for each in faults if each["type"] in EXPECTED]
    expected = " or ".join(EXPECTED[each["type"]].format(**each.get("ctx", {})) for each in known)
    return f"expected {expected}{_but(given)}{_remedy([each['type'] for each in faults], given, place)}"


def _none_of(given: Any, options: Sequence[str]) -> str:
    close = _closest(given, options) or (_closest(given.rpartition(".")[2], options) if isinstance(given, str) else "")
    one = f"one of {', '.join(options)}" if len(options) > 1 else ", ".join(options)
    return f"expected {one}{_but(given)}" + (f"; did you mean {close!r}?" if close else "")


def _remedy(kinds: Sequence[str], given: Any, place: Place) -> str:
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
            return "; for the text, write it in quotes" + (f", '{_bare(given)}'" if isinstance(given, int) else "")
        case int() | str() if (
            "tuple_type" in kinds and not (_has_length(place) or place.models) and NUMBER.fullmatch(_bare(given))
        ):
            return f"; write [{_bare(given)}]"
        case str() if re.fullmatch(r"[-+]?[0-9]{1,20},[0-9]{1,20}", given):
            return f"; a decimal has a point, {given.replace(',', '.')}"
        case str() if not text and (NUMBER.fullmatch(given) or given.lower() in ("true", "false", "yes", "no")):
            return "; write it without quotes"
    return f"; for example {_example(place)}" if _example(place) and kinds[0] in TYPES else ""


def _has_length(place: Place) -> bool:
    """Return True if the field is a list of a fixed length."""
    return place.field is not None and ... not in arguments(place.field.annotation)


def _missing(place: Place) -> str:
    if _example(place):
        return f"missing; for example {_example(place)}"
    texts = [descriptions(owner).get(place.name, "") for owner in place.owners if issubclass(owner, Spec)]
    meaning = " ".join(texts[0].split()) if texts else ""
    return f"missing ({meaning})" if meaning else "missing"


def _no_section(given: Any, place: Place) -> str:
    """Tell how fields are written, where a plain value is in their place."""
    name = place.name
    label = "" if name.isdigit() else f"{name}: "  # of an item of a list
    if given is None:
        out = "" if place.field and place.field.is_required() else ", or leave it out"
        return f"empty; give its fields, for example {_example(place) or label + '{NAME: VALUE}'}{out}"
    if filled := _filled(given, place.options):
        return f"expected fields{_but(given)}; write {label}{filled}"
    return f"expected fields{_but(given)}; for example {_example(place) or label + '{NAME: VALUE}'}"


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
    return f"{{{', '.join([f'{tag_field(options[tag])}: {tag}', *others])}}}"


def _untagged(given: Any, place: Place) -> str:
    tag = tag_field(*place.options.values())
    options = place.options
    given = given if isinstance(given, Mapping) else {}
    wrong = [name for name, value in given.items() if isinstance(value, str) and value in options]
    inside = [name for name in given if name in options]  # such as mlp: {hidden: [64]}
    hint = f"; write {tag} in place of {wrong[0]}" if wrong else f"; write {tag}: {inside[0]}" if inside else ""
    return f"missing {tag!r}, which says what the other fields mean: one of {', '.join(options)}{hint}"


def _meant(given: Any, place: Place) -> str:
    """Tell what an unknown field was probably meant for."""
    name = place.name
    folded = _folded(name)
    ours = FIELDS.get(_folded(name), name)
    if ":" in name:
        return "a field is written NAME: VALUE, with a space after the colon"
    if name in place.known:
        return "lr and learning_rate mean the same: give one of them"
    if name in (tags := [tag for model in place.siblings for tag in tags_of(model)]):
        return f"write {tag_field(*place.siblings)}: {name}, and its fields beside it"
    chosen = [each for each in place.known if given in _choices(each, place)]
    if meant := [ours] if ours in place.known else chosen or _related(folded, place.known):
        return f"did you mean {_listed([repr(each) for each in meant], 'or')}?"
    if others := [tag for tag, model in zip(tags, place.siblings, strict=False) if ours in field_names(model)]:
        if close := get_close_matches(folded, place.known, n=1, cutoff=0.85):
            return f"did you mean {close[0]!r}?"
        own = _listed([tag for owner in place.owners for tag in tags_of(owner)])
        return f"{ours} is a field of {place.names[-2]} {_listed(others)}, not of {own}"
    return _elsewhere(name, ours, place) or f"the fields are {', '.join(place.known)}{_own_arguments(place)}"


def _related(folded: str, known: Sequence[str]) -> list[str]:
    """Return the fields whose names are part of this one, or begin with it."""
    return [each for each in known if each.startswith(f"{folded}_") or f"_{each}_" in f"_{folded}_"]


def _own_arguments(place: Place) -> str:
    return "; arguments of your own function go into kwargs" if "kwargs" in place.known else ""


def _elsewhere(name: str, ours: str, place: Place) -> str:
    """Tell in which other part of a job such a field is, or which field here has a similar name."""
    paths: dict[str, str] = {}
    for path in field_paths(place.root):
        if len(last := path.rpartition(".")[2]) > 1:
            paths.setdefault(last, path)
    exact = [paths[each] for each in (name, ours) if each in paths]
    similar = get_close_matches(_folded(name), place.known, n=1, cutoff=0.7)
    far = [paths[each] for each in get_close_matches(_folded(name), paths, n=1, cutoff=0.85)]
    found = next(iter([*exact, *similar, *far]), "")
    if found and "." not in found and found not in place.known:
        return f"{found!r} belongs to the top level of the job"
    return f"did you mean {found!r}?" if found else ""


def _choices(name: str, place: Place) -> list[Any]:
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


def _bare(value: Any) -> str:
    """Return a value as it is written, text without quotes."""
    return _flow(value).strip("'")


def _plain(value: Any) -> str:
    """Return text without quotes where YAML needs none."""
    return value if isinstance(value, str) and re.fullmatch(r"\.\.\.|[A-Za-z_][\w./:-]*", value) else _flow(value)


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
