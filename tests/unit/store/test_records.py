from __future__ import annotations

from dataclasses import asdict

import pytest

from psgd.errors import DamagedFileError
from psgd.jsontext import to_json
from psgd.store.owner import Owner
from psgd.store.records import parse_document, parse_lines

HERE = "s3://bucket/runs/x"


def test_a_document_is_given_back_as_it_was_written() -> None:
    owner = asdict(Owner.this_process(3))
    assert parse_document("owner", to_json(owner).encode(), f"{HERE}/owner") == owner
    assert parse_document("other.json", b'{"a": [1, null]}', f"{HERE}/other.json") == {"a": [1, None]}


def test_a_fault_names_the_file_and_the_field() -> None:
    owner = asdict(Owner.this_process(3)) | {"pid": "none"}
    with pytest.raises(DamagedFileError, match=rf"{HERE}/owner is damaged \(pid: .*integer.*\): restore the file"):
        parse_document("owner", to_json(owner).encode(), f"{HERE}/owner")


def test_lines_are_records_and_those_that_a_crash_cut_short_are_left_out() -> None:
    text = b'{"time": 1, "event": "a", "more": [2]}\n{"time": 2, "ev\n\xff\n\n{"time": 3, "event": "b"}\n{"time": 4'
    assert parse_lines("events.jsonl", text, HERE) == [
        {"time": 1, "event": "a", "more": [2]},
        {"time": 3, "event": "b"},
    ]


def test_a_line_that_another_program_wrote_is_told_with_its_number() -> None:
    with pytest.raises(DamagedFileError, match=r"events\.jsonl, line 2, is damaged \(event 'checkpoint' lacks name\)"):
        parse_lines(
            "events.jsonl", b'{"time": 1, "event": "a"}\n{"time": 2, "event": "checkpoint"}\n', f"{HERE}/events.jsonl"
        )


@pytest.mark.parametrize("kind", ["started", "server_started", "checkpoint"])
def test_an_event_that_a_replay_goes_by_has_all_its_fields(kind: str) -> None:
    with pytest.raises(DamagedFileError, match=rf"line 1, is damaged .*event '{kind}' lacks "):
        parse_lines("events.jsonl", to_json({"time": 1, "event": kind}).encode(), HERE)
