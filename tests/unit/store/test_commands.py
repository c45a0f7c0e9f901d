from __future__ import annotations

from typing import Any

import pytest

from psgd.errors import SpecError
from psgd.jsontext import to_json
from psgd.store.commands import MOST_REASON, Command, Refusal, make_command, read_command
from psgd.store.foreign import TakenFile

GIVEN = {"id": "1", "incarnation": 3, "command": "set", "settings": ["optimizer.lr=0.1"]}


def read(data: bytes | None, fault: str = "", name: str = "1.json", first_incarnation: int = 3) -> Command | Refusal:
    return read_command(TakenFile(name, data, fault), first_incarnation)


def test_a_command_is_read_as_it_was_made() -> None:
    command = make_command("1", 3, "set", ["optimizer.lr=0.1"])
    assert command.model_dump() == GIVEN
    assert read(to_json(command.model_dump()).encode()) == command


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"command": "dance"}, "command: Input should be 'stop', 'set' or 'scale'"),
        ({"command": None}, "command: "),
        ({"incarnation": "3"}, "incarnation: "),
        ({"incarnation": True}, "incarnation: "),
        ({"settings": "optimizer.lr=0.1"}, "settings: "),
        ({"settings": [1]}, "settings.0: "),
        ({"settings": ["x" * 4097]}, "settings.0: "),
        ({"settings": ["x"] * 101}, "settings: "),
        ({"settings": {"a": 1}}, "settings: "),
        ({"id": "x" * 101}, "id: "),
        ({"more": 1}, "more: "),
    ],
)
def test_what_is_no_command_is_refused_with_the_field(change: dict[str, Any], reason: str) -> None:
    refusal = read(to_json(GIVEN | change).encode())
    assert isinstance(refusal, Refusal)
    assert refusal.reason.startswith("it is not a command: ")
    assert reason in refusal.reason


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff", b"[" * 60_000, b'{"a":' * 10_000, b"9" * 60_000, b"[]", b"null", b"1e999", b'{"stop": true}'],
    ids=["empty", "cut", "binary", "deep", "deep object", "number", "list", "null", "infinite", "other"],
)
def test_what_is_no_json_is_refused_briefly(data: bytes) -> None:
    refusal = read(data)
    assert isinstance(refusal, Refusal)
    assert refusal.id == "1"
    assert 0 < len(refusal.reason) <= MOST_REASON


def test_what_was_not_read_is_refused_for_that_reason() -> None:
    assert read(None, "it is not a regular file", "pipe") == Refusal("pipe", "it is not a regular file")
    refusal = read(None, "no", "x" * 255)
    assert refusal == Refusal("x" * 100, "no")


@pytest.mark.parametrize(("incarnation", "taken"), [(2, False), (3, True), (4, True)])
def test_a_command_is_for_the_driver_that_it_names(incarnation: int, taken: bool) -> None:
    command = make_command("1", incarnation, "stop", [])
    assert isinstance(read(to_json(command.model_dump()).encode()), Command) == taken


def test_a_command_that_would_be_refused_is_not_made() -> None:
    with pytest.raises(SpecError, match=r"psgd set: settings\.0: .*4096 characters"):
        make_command("1", 3, "set", ["x" * 4097])
