"""A reader of plain YAML values from untrusted text: bounded in size, depth and aliases.

Tags such as `!!float` are refused, and dates are texts. Unlike in YAML 1.1, a number with a leading zero is decimal,
and `1e-3` is a number. Keys must be texts, each given once.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from psgd.errors import SpecError
from psgd_workers.quoting import shown

__all__ = ["FILE_LIMIT", "VALUE_LIMIT", "read_yaml"]

FILE_LIMIT = 1 << 18  # bytes of a job file: PyYAML reads about a megabyte in two seconds
VALUE_LIMIT = 10_000  # characters of a value from a command
MAX_DEPTH = 32
MAX_VALUES = 10_000  # an alias counts as all values that it stands for
MAX_CHARACTERS = 1 << 20  # characters of all values; an alias counts as the texts that it stands for
LONGEST_NUMBER = 100  # characters; a longer number is read as text

PREFIX = "tag:yaml.org,2002:"
RESOLVERS = {  # tag -> pattern of the texts without quotes that get this tag, and their first characters
    "merge": (r"<<", "<"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    "int": (r"[-+]?(0x[0-9a-fA-F]+|[0-9][0-9_]*)", "-+0123456789"),
    "float": (
        r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
}


class _Loader(yaml.SafeLoader):
    """PyYAML's loader of plain values, with the limits and rules of this module."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (declared by PyYAML; filled below)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._values = 0
        self._characters = 0
        self._sizes: dict[str, tuple[int, int]] = {}  # complete anchor -> values and characters

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: yaml.CollectionStartEvent | yaml.ScalarEvent | yaml.AliasEvent = self.peek_event()  # type: ignore[no-untyped-call]
        values = self._values
        characters = self._characters
        if isinstance(event, yaml.AliasEvent):
            self._count(event, *self._size_of(event))
            return super().compose_node(parent, index)
        if event.tag is not None:
            tag = event.tag.replace(PREFIX, "!!")
            raise _refusal(f"tags such as {tag:.80} are not read: write the value without one", event)
        self._depth += 1
        self._count(event, 1, len(event.value) if isinstance(event, yaml.ScalarEvent) else 0)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None:
            self._sizes[event.anchor] = (self._values - values, self._characters - characters)
        return node

    def _size_of(self, alias: yaml.AliasEvent) -> tuple[int, int]:
        if alias.anchor in self.anchors and alias.anchor not in self._sizes:
            raise _refusal(f"the alias *{alias.anchor:.80} stands for something that contains it", alias)
        return self._sizes.get(str(alias.anchor), (0, 0))  # PyYAML refuses an alias without an anchor

    def _count(self, event: yaml.Event, values: int, characters: int) -> None:
        self._values += values
        self._characters += characters
        if self._depth > MAX_DEPTH:
            raise _refusal(f"values are nested more than {MAX_DEPTH} levels deep", event)
        if self._values > MAX_VALUES:
            raise _refusal(f"there are more than {MAX_VALUES:,} values, including those that aliases stand for", event)
        if self._characters > MAX_CHARACTERS:
            raise _refusal(f"the texts that aliases stand for have more than {MAX_CHARACTERS:,} characters", event)

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and len(value) > LONGEST_NUMBER:
            return PREFIX + "str"
        return super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return the fields of a mapping. Fields merged by `<<` are defaults for the fields that are given.

        PyYAML merges later, and chooses the wrong value if a merged mapping has itself merged another one.
        """
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        fields = {}
        for key, value in node.value:
            if key.tag == PREFIX + "merge":
                continue
            _check_name(key, value)
            if key.value in fields:
                raise _refusal(f"{key.value!r:.80} is given twice", key)
            fields[key.value] = (key, value)
        for key, value in node.value:
            if key.tag == PREFIX + "merge":
                for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if not isinstance(merged, yaml.MappingNode):
                        raise _refusal("'<<' takes the fields of a mapping, but this is not a mapping", merged)
                    fields = {name.value: (name, each) for name, each in merged.value} | fields
        node.value = list(fields.values())
        return node

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """Return the number. A leading zero does not make it octal, as it does in YAML 1.1."""
        text = node.value.replace("_", "")
        return int(text, 16 if "x" in text else 10)


for tag, (texts, first) in RESOLVERS.items():
    _Loader.add_implicit_resolver(PREFIX + tag, re.compile(f"(?:{texts})$"), list(first))
_Loader.add_constructor(PREFIX + "int", _Loader.construct_int)


def read_yaml(text: str, source: str, limit: int = VALUE_LIMIT) -> Any:
    """Return the plain values in a YAML document.

    Args:
        text: document.
        source: name of the document in errors.
        limit: largest number of characters that is read.

    Raises:
        SpecError: the text is not YAML, or exceeds a limit.
    """
    if len(text) > limit:
        raise SpecError(f"{source} has {len(text):,} characters, but at most {limit:,} are read")
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        raise SpecError(f"{source} is not YAML that can be read: {_where(error)}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: from chr() or int(), which get any text
        reason = shown(" ".join(str(error).split())[:200])
        raise SpecError(f"{source} is not YAML that can be read: {reason}") from error


def _check_name(key: yaml.Node, value: yaml.Node) -> None:
    if key.tag != PREFIX + "str":
        given = f"{key.value!r:.80}" if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
        decimal = "; a decimal has a point, not a comma" if value.tag == PREFIX + "null" else ""  # {lr: 0,1}
        raise _refusal(f"a field's name must be text: write {given} in quotes{decimal}", key)


def _refusal(problem: str, at: Any) -> yaml.MarkedYAMLError:
    """Return an error with the position of an event or a node."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def _where(error: yaml.MarkedYAMLError) -> str:
    """Return the position, the problem and, for common mistakes, the remedy."""
    mark = error.problem_mark or error.context_mark
    position = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
    if mark and error.context_mark and error.context_mark.line != mark.line:
        position += f", in the part that begins on line {error.context_mark.line + 1}"
    problem = error.problem or error.context or "malformed"
    return f"{position}: {shown(problem[:200])}{next((hint for sign, hint in HINTS.items() if sign in problem), '')}"


HINTS = {  # part of PyYAML's message -> remedy
    "'\\t'": ". Indent with spaces, not with tabs",
    "mapping values are not allowed": ". Fields of one section begin in the same column; text with ': ' needs quotes",
    "could not find expected ':'": ". A field is written NAME: VALUE, with a space after the colon",
    "expected ',' or": ". A bracket or a brace is not closed, or a comma is missing",
    "another document": ". A job is one document: leave '---' out",
    "expected <block end>": ". Fields of one section begin in the same column",
}
