from __future__ import annotations

import pytest

from psgd_workers.counting import counted


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 workers"), (1, "1 worker"), (2, "2 workers"), (1.0, "1 worker"), (0.5, "0.5 workers")]
)
def test_only_one_is_followed_by_the_singular(number: float, text: str) -> None:
    assert counted(number, "worker") == text


def test_an_irregular_plural_is_given() -> None:
    assert (counted(1, "batch", "batches"), counted(3, "batch", "batches")) == ("1 batch", "3 batches")


def test_a_large_whole_number_keeps_all_its_digits() -> None:
    assert counted(12345678, "update") == "12345678 updates"
