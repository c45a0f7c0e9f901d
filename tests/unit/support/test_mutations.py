"""Damaged copies of files: repeatable, different from the original, and of every kind."""

from __future__ import annotations

import json

import pytest

from tests.support.mutations import MUTATIONS, mutations

ORIGINAL = json.dumps({"updates": 12, "names": ["weight", "bias"], "text": "x" * 100}).encode()


def test_a_seed_decides_the_copies() -> None:
    assert list(mutations(ORIGINAL, 50, seed=1)) == list(mutations(ORIGINAL, 50, seed=1))
    assert list(mutations(ORIGINAL, 50, seed=1)) != list(mutations(ORIGINAL, 50, seed=2))


@pytest.mark.parametrize("original", [ORIGINAL, b"", b"{", bytes(1000)], ids=["json", "empty", "byte", "zeros"])
def test_each_copy_differs_from_the_original(original: bytes) -> None:
    copies = list(mutations(original, 200, seed=3))
    assert len(copies) == 200
    assert original not in copies


def test_copies_have_every_kind_of_damage() -> None:
    copies = list(mutations(ORIGINAL, 1000, seed=4))
    assert any(len(copy) < len(ORIGINAL) and ORIGINAL.startswith(copy) for copy in copies)  # truncated
    assert any(len(copy) == len(ORIGINAL) and len(differences(copy)) == 1 for copy in copies)  # one bit
    assert any(b"[" * 20_000 in copy for copy in copies)
    assert any(b"9" * 5_000 in copy for copy in copies)
    assert any(copy.count(b"updates") > 1 for copy in copies)  # a repeated slice
    assert len(MUTATIONS) == len(set(MUTATIONS)) == 10


def differences(copy: bytes) -> list[int]:
    return [index for index, (one, other) in enumerate(zip(copy, ORIGINAL, strict=True)) if one != other]
