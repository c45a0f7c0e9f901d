from __future__ import annotations

import json

import pytest

from psgd.errors import CheckpointError
from psgd.store.checkpoints import Checkpoints, load_weights
from psgd.store.storage import Storage
from tests.support.checkpoints import LAYOUT, recommit, save


def test_the_manifest_is_restored(run: Storage) -> None:
    saved = save(run, "000001-1")
    restored = Checkpoints(run).open("000001-1").manifest
    assert restored == saved
    assert restored.layout == LAYOUT


def test_another_format_is_told_apart_from_damage(run: Storage) -> None:
    tree = json.loads(save(run, "000001-1").model_dump_json())
    run.write("checkpoints/000001-1/COMMITTED", json.dumps(tree | {"format": 2}).encode())
    with pytest.raises(CheckpointError, match="has format 2, and this psgd reads format 1"):
        Checkpoints(run).open("000001-1")


def test_the_manifest_of_another_checkpoint_is_refused(run: Storage) -> None:
    """Checksums would be checked in one directory, and weights read from the other one."""
    for name in ("000001-1", "000002-1"):
        save(run, name)
    run.write("checkpoints/000002-1/COMMITTED", run.read("checkpoints/000001-1/COMMITTED"))
    with pytest.raises(CheckpointError, match=r"000002-1: its COMMITTED is that of checkpoint 000001-1"):
        Checkpoints(run).open("000002-1")
    with pytest.raises(CheckpointError, match=r"its COMMITTED is that of checkpoint 000001-1"):
        load_weights(f"{run.url}/checkpoints/000002-1")


@pytest.mark.parametrize("files", [{}, {"server-0.safetensors": "x"}, {"../1-1/server-0.json": "x"}])
def test_a_manifest_that_lacks_files_is_refused(run: Storage, files: dict[str, str]) -> None:
    save(run, "000001-1")
    recommit(run, "000001-1", files=files)
    with pytest.raises(CheckpointError, match=r"000001-1: its COMMITTED lacks server-.*server-1\.json"):
        Checkpoints(run).open("000001-1")


def test_a_manifest_with_a_huge_number_of_partitions_is_refused_at_once(run: Storage) -> None:
    save(run, "000001-1")
    recommit(run, "000001-1", partitions=10**18)
    with pytest.raises(CheckpointError, match=r"lacks server-2\.safetensors"):
        Checkpoints(run).open("000001-1")


@pytest.mark.parametrize(("before", "after"), [(b'"updates": 40', b'"updates": 41'), (b'"bias"', b'"bia5"')])
def test_a_manifest_that_was_changed_is_damaged(run: Storage, before: bytes, after: bytes) -> None:
    save(run, "000001-1")
    text = run.read("checkpoints/000001-1/COMMITTED")
    assert before in text
    run.write("checkpoints/000001-1/COMMITTED", text.replace(before, after))
    with pytest.raises(CheckpointError, match=r"COMMITTED is damaged .*does not have the checksum that it names"):
        Checkpoints(run).open("000001-1")
