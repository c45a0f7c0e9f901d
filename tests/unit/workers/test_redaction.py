from __future__ import annotations

import pickle
import time

import pytest

from psgd_workers.errors import DataError
from psgd_workers.redaction import redact


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cannot read s3://me:secret@bucket/runs: no", "cannot read s3://***@bucket/runs: no"),
        ("http://user:pw@host:80/x.csv", "http://***@host:80/x.csv"),
        ("https://token@host/x", "https://***@host/x"),
        ("'simplecache::ftp://me:p%40w@host/x'", "'simplecache::ftp://***@host/x'"),
        ("http://h/x?token=abc&a=1", "http://h/x?token=***&a=1"),
        (
            "http://h/x?a=1&X-Amz-Signature=ab%2F&X-Amz-Credential=c",
            "http://h/x?a=1&X-Amz-Signature=***&X-Amz-Credential=***",
        ),
        ("https://h/x?sv=1&sig=abc#x", "https://h/x?sv=1&sig=***#x"),
        ("http://h/x?API_KEY=k, then", "http://h/x?API_KEY=*** then"),
        ("http://me:p/w@host/x", "http://***@host/x"),
        ("http://me:p?w#1@host/x", "http://***@host/x"),
        ("http://me:p@w@host:80/x@y", "http://***@host:80/x@y"),
        ("two: s3://a:b@c/d and s3://e:f@g/h", "two: s3://***@c/d and s3://***@g/h"),
    ],
)
def test_passwords_and_keys_of_urls_are_hidden(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "me@example.com",
        "s3://bucket/a@b",
        "http://h:80/a@b",
        "http://[::1]:80/a@b",
        "/home/me/x?token=1",
        "http://h/x?seed=3&epochs=5",
        "://",
        "a://@",
    ],
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert redact(text) == text


def test_every_error_is_redacted_and_stays_so_when_it_is_sent() -> None:
    error = DataError("cannot read http://user:pw@host/x.csv", 3)
    assert error.args == ("cannot read http://***@host/x.csv", 3)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301


@pytest.mark.parametrize(("start", "unit"), [("", "://"), ("://", "a"), ("://?", "a"), ("", "://?a"), ("://", "?a=")])
def test_a_hostile_text_takes_no_longer_than_its_length(start: str, unit: str) -> None:
    text = start + unit * 100_000
    began = time.process_time()
    redact(text)
    assert time.process_time() - began < 5
