from __future__ import annotations

import json
from math import inf, nan
from types import SimpleNamespace
from typing import Any

import pytest

from psgd.simulation.verify import Check
from psgd.store.run_directory import RunDirectory


def test_simulate_prints_names_of_files_as_they_are(psgd: Any) -> None:
    pytest.importorskip("matplotlib")
    options = ("--model", "quadratic", "--pushes", "20", "--workers", "1", "--html", "mk[/b]d/q[x]q.html")
    code, _, err = psgd("simulate", "job.yaml", *options)
    assert code == 0
    assert "figures: mk[/b]d/q[x]q.html\n" in err


def test_verify_prints_what_was_seen_as_it_is(psgd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [Check("a[/b]", "is [x]", "differs in [/tensor]", False)]
    monkeypatch.setattr("psgd.simulation.verify.verify", lambda spec: checks)
    code, _, err = psgd("verify", "job.yaml")
    assert code == 3
    assert all(text in err for text in ("a[/b]", "is [x]", "differs in [/tensor]", "does not hold"))


@pytest.mark.parametrize(
    ("command", "function"), [("simulate", "simulation.command.run"), ("replay", "replay.replay.replay")]
)
def test_what_is_not_finite_is_null(
    psgd: Any, run: RunDirectory, monkeypatch: pytest.MonkeyPatch, command: str, function: str
) -> None:
    result = SimpleNamespace(to_dict=lambda: {"loss": nan, "largest_difference": inf}, agrees=True)
    found = [result] if command == "simulate" else result
    monkeypatch.setattr(f"psgd.{function}", lambda *arguments, **options: found)
    code, out, _ = psgd(command, {"simulate": "job.yaml", "replay": "iris"}[command], "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["results"][0] if command == "simulate" else told) == {"loss": None, "largest_difference": None}


@pytest.mark.parametrize("text", [b"", b"{", b"[]"], ids=["empty", "cut", "other"])
def test_a_run_whose_job_is_damaged_is_not_replayed(psgd: Any, run: RunDirectory, text: bytes) -> None:
    run.storage.write("resolved.json", text)
    code, out, err = psgd("replay", "iris")
    assert (code, out) == (2, "")
    assert err.startswith(f"psgd: {run.storage.url}/resolved.json is damaged (")
