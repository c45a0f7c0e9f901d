from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psgd_workers.quoting import quoted, shown


@pytest.mark.parametrize(
    "url",
    [
        "https://me:secret@host/a.csv",
        "https://me:sec@secret@host:80/a@b",
        "https://host/a?signature=secret",
        "zip://a.csv::https://me:secret@host/a.zip?token=secret",
    ],
)
def test_secrets_of_urls_are_left_out(url: str) -> None:
    assert "secret" not in shown(url) + quoted(url)


@pytest.mark.parametrize(
    "text", ["a@b.csv", "x#y?z=1.csv", "https://host:80/a@b", "s3://bucket/a@b", "http://[::1]:80/a@b", ""]
)
def test_text_without_secrets_stays_as_it_is(text: str) -> None:
    assert shown(text) == text
    assert quoted(text) == f"'{text}'"


def test_control_characters_are_escaped() -> None:
    assert shown("a\n\x1b[31m\x00\ud800\u202e") == r"a\n\x1b[31m\x00\ud800\u202e"
    assert quoted("a\n\x1b[31m") == r"'a\n\x1b[31m'"
    assert "secret" not in shown("https://me:\nsecret@host/a")


def test_long_text_is_shortened() -> None:
    assert quoted("x" * 60) == f"'{'x' * 60}'"
    assert quoted("x" * 5_000) == f"'{'x' * 60}'... (5,000 characters)"
    assert shown("a" * 300 + "b" * 300) == f"{'a' * 200}...{'b' * 200}"
    assert len(shown("x" * 10_000_000)) < 500


@given(st.text(st.sampled_from(":/@?#&=;. []\nab%é"), max_size=40))
def test_what_follows_a_user_and_a_colon_is_shown_in_no_url(rest: str) -> None:
    url = f"https://me:5ecret@host/{rest}"
    assert "5ecret" not in shown(url)
    assert "5ecret" not in quoted(url)


@pytest.mark.parametrize("part", ["://", "a://b:", "a://b@", "?", "a://b?c=&", "a::b://", "a" * 9])
def test_hostile_text_takes_linear_time(part: str) -> None:
    shown(part * 1_000_000)
    quoted(part * 1_000_000)
