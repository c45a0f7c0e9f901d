from __future__ import annotations

import ast
import time
from math import inf, nan
from pathlib import Path

import pytest

import psgd
from psgd.errors import DamagedFileError, StorageError
from psgd.jsontext import parse_json, to_json


def test_numbers_that_are_not_finite_become_null() -> None:
    written = to_json({"loss": inf, "rates": [1.5, -inf, (nan,)], nan: {"deep": nan}})
    assert parse_json(written.encode(), "result.json") == {
        "loss": None,
        "rates": [1.5, None, [None]],
        "nan": {"deep": None},
    }


def test_finite_values_are_written_as_python_does() -> None:
    value = {"b": [1, 2.5, True, None, "ü"], "a": {}}
    assert parse_json(to_json(value, indent=2).encode(), "x") == value
    assert to_json(value, sort_keys=True).startswith('{"a"')


def test_what_is_no_plain_value_is_an_error_of_the_program() -> None:
    with pytest.raises(TypeError):
        to_json({"a": object()})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b'{"a": 1', "Expecting"),
        (b"\xff\xfe\x00", "codec"),
        (b"[" * 100_000, "nested more than 64 levels"),
        (b'{"a": Infinity}', "Infinity is not a JSON number"),
        (b"[NaN]", "NaN is not a JSON number"),
        (b"9" * 5_000, "digits"),
    ],
    ids=["empty", "blank", "cut", "binary", "deep", "infinity", "nan", "long number"],
)
def test_what_is_no_json_is_one_error_that_names_the_file(text: bytes, reason: str) -> None:
    with pytest.raises(DamagedFileError, match=rf"runs/x/result\.json is damaged \(.*{reason}"):
        parse_json(text, "runs/x/result.json")


def test_a_damaged_file_is_a_fault_of_the_storage() -> None:
    assert issubclass(DamagedFileError, StorageError)


def uses_of_json(path: Path) -> list[str]:
    """Return the uses of the standard library's `json` in a module."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [
        f"{path}:{node.lineno}"
        for node in nodes
        if (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "json" for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and node.module == "json")
    ]


def test_no_other_module_writes_or_reads_json_in_its_own_way() -> None:
    folder = Path(psgd.__file__).parent
    modules = [path for path in folder.rglob("*.py") if path.name != "jsontext.py"]
    assert len(modules) > 50
    assert [use for path in modules for use in uses_of_json(path)] == []
    assert uses_of_json(folder / "jsontext.py")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"[" * 65 + b"]" * 65, "nested more than 64 levels deep"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested more than 64 levels deep"),
        (b'["\\"",' * 65 + b"1" + b"]" * 65, "nested more than 64 levels deep"),
        (b"[" + b"1," * 500_000 + b"1]", "more than 500,000 values"),
        (b" " * 2**24 + b"1", "has 16,777,217 bytes, more than 16,777,216"),
    ],
    ids=["lists", "objects", "strings", "values", "bytes"],
)
def test_a_document_beyond_a_limit_is_refused(text: bytes, reason: str) -> None:
    with pytest.raises(DamagedFileError, match=reason):
        parse_json(text, "runs/x/result.json")


def test_brackets_in_texts_are_no_levels() -> None:
    deep = "[" * 64 + "]" * 64
    assert parse_json(deep.encode(), "x") is not None
    value = {"a": deep * 2, 'b\\"[[': ["[{" * 100, '"'] * 100}
    assert parse_json(to_json(value).encode(), "x") == value


@pytest.mark.parametrize("unit", [b"[", b'"', b'"\\', b"{}"])
def test_the_limits_are_checked_in_linear_time(unit: bytes) -> None:
    text = unit * (2**24 // len(unit))
    began = time.process_time()
    with pytest.raises(DamagedFileError):
        parse_json(text, "x")
    assert time.process_time() - began < 10
