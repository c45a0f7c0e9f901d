from __future__ import annotations

import math
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psgd.errors import SpecError
from psgd.spec.yaml_values import FILE_LIMIT, MAX_DEPTH, MAX_VALUES, read_yaml

SIGNS = "[]{}:,-?!&*#|>'\"%@`~<=. \n\t\\x0123456789abeEuUnNyY_+²é\u2028\ud800\x00"


def read(text: str) -> Any:
    return read_yaml(text, "it")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0128", 128),
        ("-007", -7),
        ("+5", 5),
        ("1_000", 1000),
        ("0x1F", 31),
        ("1e3", 1000.0),
        ("1E-3", 0.001),
        (".5", 0.5),
        ("5.", 5.0),
        ("1_0.2_5", 10.25),
        ("-.inf", -math.inf),
        ("yes", True),
        ("Off", False),
        ("~", None),
        ("", None),
        ("'010'", "010"),
        ("'yes'", "yes"),
        ("{a: [1, b], c: {d: null}}", {"a": [1, "b"], "c": {"d": None}}),
        ("[&a [1], *a]", [[1], [1]]),
        (
            "{n: {b: &b {<<: {x: 1, y: 2}, y: 3}}, c: {<<: *b}}",
            {"n": {"b": {"x": 1, "y": 3}}, "c": {"x": 1, "y": 3}},
        ),
        ("{<<: [{x: 1}, {x: 2, y: 3}], y: 4}", {"x": 1, "y": 4}),
        ("{a: &a {x: 1, y: 2}, b: {<<: *a, y: 3}}", {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}),
    ],
)
def test_plain_values_are_read(text: str, value: Any) -> None:
    assert read(text) == value
    assert type(read(text)) is type(value)


@pytest.mark.parametrize(
    "text", ["2001-99-99", "2001-12-14", "1:30", "0o17", "0b1", "1e", "e5", "1.2.3", "=", "²", "1__e", "_1"]
)
def test_dates_times_and_other_bases_are_text(text: str) -> None:
    assert read(text) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("!!float abc", "tags such as !!float are not read: write the value without one"),
        ("!!bool 7", "tags such as"),
        ("!!python/object:os.system x", "tags such as"),
        ("! x", "tags such as"),
        ("a: !!binary =", "line 1, column 4: tags such as"),
        ("[" * 5000, f"values are nested more than {MAX_DEPTH} levels deep"),
        ("[" * 5000 + "]" * 5000, f"values are nested more than {MAX_DEPTH} levels deep"),
        ("{a: " * 100, "nested more than"),
        ("- " * 1000, "nested more than"),
        ("[" + "1," * 4000, "not YAML"),
        ("&a [*a]", r"the alias \*a stands for something that contains it"),
        ("[*b]", "undefined alias"),
        ("[a, b", "line 1, column 6: .* bracket or a brace is not closed"),
        ("a: 1\n\tb: 2", "Indent with spaces, not with tabs"),
        ("a: b: c", "text with ': ' needs quotes"),
        ("a: 1\nb", "a space after the colon"),
        ("{a: 1, a: 2}", "'a' is given twice"),
        ("{7: x}", "a field's name must be text: write '7' in quotes"),
        ("{on: 1}", "write 'on' in quotes"),
        ("{[a]: 1}", "a field's name must be text"),
        ("{<<: 3}", "'<<' takes the fields of a mapping, but this is not a mapping"),
        ("{<<: [{a: 1}, 3]}", "'<<' takes the fields of a mapping, but this is not a mapping"),
        ("{lr: 0,1}", "a decimal has a point, not a comma"),
        ('"\\U00110000"', "not YAML"),
        ("%YAML 1." + "9" * 5000 + "\n--- a", "not YAML"),
        ("a\x00b", "not YAML"),
        ("\ud800", "not YAML"),
        ("a\n--- b", "not YAML"),
        ("x" * 10_001, "has 10,001 characters, but at most 10,000 are read"),
    ],
    ids=lambda text: text[:20].encode("ascii", "backslashreplace").decode(),
)
def test_everything_else_is_refused_with_a_reason(text: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        read(text)


def test_aliases_count_as_what_they_stand_for() -> None:
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else '1'] * 10)}]" for n in range(9)]
    with pytest.raises(SpecError, match=f"more than {MAX_VALUES:,} values, including those that aliases stand for"):
        read("\n".join(levels))
    assert read("\n".join(levels[:3]))["a2"] == [[[1] * 10] * 10] * 10


@pytest.mark.parametrize(
    "text",
    [
        "1" * 5000,
        "1" * 4000 + "x",
        "1_" * 5000,
        "[" * 10_000,
        "{" * 10_000,
        "- " * 5000,
        "? " * 5000,
        "&a " * 3000,
        "a: " * 3000,
        "'" + "''" * 4000,
        "0" * 9000 + ".",
        "\n" * 9000 + "x",
    ],
    ids=lambda text: text[:6],
)
def test_hostile_values_cost_little(text: str) -> None:
    tracemalloc.start()
    try:
        read(text)
    except SpecError as refused:
        assert len(str(refused)) < 1000  # noqa: PT017
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32e6


@pytest.mark.parametrize("text", ["1" * 200_000 + "x", "1_" * 100_000 + "x", "1." + "1" * 200_000 + "x"], ids=len)
def test_long_text_that_begins_like_a_number_takes_linear_time(text: str) -> None:
    assert read_yaml(text, "it", FILE_LIMIT) == text  # in quadratic time, it would take many minutes


@given(st.text(st.sampled_from(SIGNS), max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        read(text)
    except SpecError as refused:
        assert str(refused).startswith("it ")  # noqa: PT017
