from __future__ import annotations

import pytest

from psgd_workers.errors import DataError
from tests.support import fuzzing
from tests.support.fuzzing import check_reader


def refuse(content: bytes) -> None:
    if content == b"refused":
        raise DataError("refused")


def test_files_that_are_read_and_refused_are_counted() -> None:
    assert check_reader(refuse, [b"read", b"refused", b"read"]) == (2, 1)


def test_another_error_passes_on() -> None:
    with pytest.raises(ZeroDivisionError):
        check_reader(lambda _: 1 // 0, [b""])


def test_a_message_that_is_no_line_is_a_fault() -> None:
    def refuse_with_control_character(_: bytes) -> None:
        raise DataError("\x1b")

    with pytest.raises(AssertionError):
        check_reader(refuse_with_control_character, [b""])


@pytest.mark.parametrize(("name", "limit"), [("MAX_TIME_S", 0), ("MAX_MEMORY", 1e6)])
def test_too_much_time_or_memory_is_a_fault(monkeypatch: pytest.MonkeyPatch, name: str, limit: float) -> None:
    monkeypatch.setattr(fuzzing, name, limit)
    with pytest.raises(AssertionError):
        check_reader(lambda _: bytes(2_000_000), [b""])
