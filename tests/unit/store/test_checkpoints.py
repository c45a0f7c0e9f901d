from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psgd.core.server.state import ServerState
from psgd.errors import CheckpointError, StorageError
from psgd.jsontext import MOST_BYTES
from psgd.store.checkpoint_part import write_part
from psgd.store.checkpoints import Checkpoints, load_weights
from psgd.store.storage import Storage
from tests.support.checkpoints import FLAT, NO_RECORDS, TENSORS, fail, manifest, recommit, save, state


def test_weights_are_named_and_joined_in_the_order_of_their_slices(run: Storage) -> None:
    save(run, "000001-1")
    for path in (run.url, f"{run.url}/checkpoints/000001-1"):
        weights = load_weights(path)
        assert weights.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            np.testing.assert_array_equal(weights[name], tensor)


def test_weights_are_loaded_from_a_path(tmp_path: Path) -> None:
    save(Storage(tmp_path), "000001-1")
    assert load_weights(tmp_path).keys() == load_weights(tmp_path / "checkpoints" / "000001-1").keys() == TENSORS.keys()


def test_a_checkpoint_outside_of_a_run_is_refused(tmp_path: Path) -> None:
    save(Storage(tmp_path / "run"), "000001-1")
    shutil.copytree(tmp_path / "run/checkpoints/000001-1", tmp_path / "copy")
    with pytest.raises(CheckpointError, match="copy is a checkpoint outside of a run"):
        load_weights(tmp_path / "copy")


@pytest.mark.parametrize("path", [3, None, b"runs/digits"])
def test_weights_of_what_is_no_path_are_refused(path: Any) -> None:
    with pytest.raises(StorageError, match="a folder is a path or a URL"):
        load_weights(path)


def test_what_was_not_committed_is_no_checkpoint(run: Storage) -> None:
    save(run, "000001-1")
    write_part(run, "000002-1", state(0, updates=80), NO_RECORDS)
    newest = Checkpoints(run).newest(refused=fail)
    assert newest is not None
    assert newest.manifest.name == "000001-1"
    with pytest.raises(CheckpointError, match=r"000002-1 .* was never committed"):
        Checkpoints(run).open("000002-1")
    assert Checkpoints(run).next_number() == 3  # a name is never used again


def test_a_run_without_checkpoints_has_none(run: Storage) -> None:
    assert Checkpoints(run).newest(refused=fail) is None
    assert Checkpoints(run).next_number() == 1
    with pytest.raises(CheckpointError, match="no committed checkpoint"):
        load_weights(run.url)


@pytest.mark.parametrize("file", ["server-0.safetensors", "server-1.json"])
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(run: Storage, file: str, damage: str) -> None:
    for name in ("000001-1", "000002-1"):
        save(run, name)
    path = f"checkpoints/000002-1/{file}"
    content = run.read(path)
    run.delete(path)
    if damage == "changed":
        run.write(path, content[:-1] + bytes([content[-1] ^ 1]))
    faults: list[str] = []
    newest = Checkpoints(run).newest(refused=faults.append)
    assert newest is not None
    assert newest.manifest.name == "000001-1"
    assert len(faults) == 1
    assert f"000002-1: {file} is missing, or its checksum" in faults[0]


def test_when_all_are_damaged_every_fault_is_told(run: Storage) -> None:
    save(run, "000001-1")
    save(run, "000002-1")
    run.write("checkpoints/000001-1/COMMITTED", b"\xff")
    run.delete("checkpoints/000002-1/server-0.json")
    with pytest.raises(CheckpointError, match=r"every checkpoint .* server-0\.json is missing.*/COMMITTED is damaged"):
        Checkpoints(run).newest(refused=lambda _: None)


def test_pruning_keeps_the_newest_and_what_is_not_committed(run: Storage) -> None:
    for name in ("000001-1", "000002-1", "000003-2"):
        save(run, name)
    write_part(run, "000004-2", state(0), NO_RECORDS)
    checkpoints = Checkpoints(run)
    assert checkpoints.prune(keep=2) == ["000001-1"]
    assert checkpoints.names() == ["000002-1", "000003-2", "000004-2"]
    assert checkpoints.prune(keep=2) == []


def test_strangers_in_the_folder_are_overlooked(run: Storage) -> None:
    save(run, "000001-1")
    run.write("checkpoints/.DS_Store", b"")
    run.write("checkpoints/backup/COMMITTED", b"")
    assert Checkpoints(run).names() == ["000001-1"]
    assert Checkpoints(run).next_number() == 2


def test_the_average_is_loaded_where_there_is_one(run: Storage) -> None:
    plain = state(0)
    metadata = dict(plain.metadata) | {"partition": [0, 0, len(FLAT), 6]}
    both = ServerState({"weights": FLAT.copy(), "average": np.full(6, 7, np.float32)}, metadata)
    part = write_part(run, "000001-1", both, NO_RECORDS)
    Checkpoints(run).commit(manifest("000001-1", [part]))
    weights = load_weights(run.url, averaged=True)
    np.testing.assert_array_equal(weights["weight"], np.full((2, 3), 7))
    np.testing.assert_array_equal(weights["bias"], TENSORS["bias"])
    np.testing.assert_array_equal(load_weights(run.url)["weight"], TENSORS["weight"])


def test_an_average_that_is_not_kept_is_not_made_up(run: Storage) -> None:
    metadata = dict(state(0).metadata) | {"partition": [0, 0, len(FLAT), len(FLAT)]}
    part = write_part(run, "000001-1", ServerState({"weights": FLAT.copy()}, metadata), NO_RECORDS)
    Checkpoints(run).commit(manifest("000001-1", [part]))
    with pytest.raises(CheckpointError, match=r"its job sets no optimizer\.ema"):
        load_weights(run.url, averaged=True)


def test_a_checkpoint_whose_commit_was_cut_short_was_never_committed(run: Storage) -> None:
    save(run, "000001-1")
    save(run, "000002-1")
    text = run.read("checkpoints/000002-1/COMMITTED")
    checkpoints = Checkpoints(run)
    for length in (*range(0, len(text), len(text) // 6), len(text) - 3, len(text) - 2):
        run.write("checkpoints/000002-1/COMMITTED", text[:length])
        told: list[str] = []
        newest = checkpoints.newest(refused=told.append)
        assert newest is not None
        assert newest.manifest.name == "000001-1"
        assert len(told) == 1
        assert "was not committed: its COMMITTED is cut short" in told[0]
        assert checkpoints.committed() == ["000001-1"]
        with pytest.raises(CheckpointError, match=r"000002-1 .* was not committed: its COMMITTED is cut short"):
            checkpoints.open("000002-1")


DAMAGES = {
    "empty": b"",
    "cut short": b'{"format": 1, "na',
    "not JSON": b"}",
    "deep": b"[" * 100_000,
    "deep and closed": b"[" * 900 + b"]" * 900,
    "another type": b"[]",
    "binary": bytes(range(256)),
    "no format": b"{}",
    "too large": b" " * (MOST_BYTES + 1),
}


@pytest.mark.parametrize("text", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_run_whose_only_commit_is_damaged_does_not_begin_anew(run: Storage, text: bytes) -> None:
    save(run, "000001-1")
    run.write("checkpoints/000001-1/COMMITTED", text)
    told: list[str] = []
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged: .*000001-1"):
        Checkpoints(run).newest(refused=told.append)
    assert len(told) == 1
    assert Checkpoints(run).next_number() == 2
    Checkpoints(run).prune(keep=1)
    assert Checkpoints(run).names() == ["000001-1"]


def test_weights_that_do_not_fill_the_tensors_are_refused(run: Storage) -> None:
    save(run, "000001-1")
    recommit(run, "000001-1", shapes=((2, 3), (3,)))
    with pytest.raises(CheckpointError, match="has 8 weights, but its tensors have 9 values"):
        load_weights(run.url)


@pytest.mark.parametrize("file", ["server-0.safetensors", "server-0.json", "server-1.safetensors", "server-1.json"])
def test_every_file_may_be_cut_short_anywhere(run: Storage, file: str) -> None:
    save(run, "000001-1")
    save(run, "000002-1")
    path = f"checkpoints/000002-1/{file}"
    text = run.read(path)
    for length in (0, 1, len(text) // 2, len(text) - 1):
        run.write(path, text[:length])
        told: list[str] = []
        newest = Checkpoints(run).newest(refused=told.append)
        assert newest is not None
        assert newest.manifest.name == "000001-1"
        assert told == [
            f"checkpoint 000002-1: {file} is missing, or its checksum is not the committed one; "
            "psgd tries the previous checkpoint"
        ]


def test_a_newer_format_gives_way_to_the_one_before_and_this_is_told(run: Storage) -> None:
    save(run, "000001-1")
    tree = json.loads(save(run, "000002-1").model_dump_json())
    run.write("checkpoints/000002-1/COMMITTED", json.dumps(tree | {"format": 2}).encode())
    told: list[str] = []
    newest = Checkpoints(run).newest(refused=told.append)
    assert newest is not None
    assert newest.manifest.name == "000001-1"
    assert "has format 2, and this psgd reads format 1: use the psgd that wrote it; psgd tries the previous" in told[0]


def test_pruning_takes_what_a_crash_left_unfinished(run: Storage) -> None:
    save(run, "000001-1")
    write_part(run, "000002-1", state(0), NO_RECORDS)
    save(run, "000003-2")
    assert Checkpoints(run).prune(keep=2) == []
    assert Checkpoints(run).names() == ["000001-1", "000003-2"]


def test_checkpoints_are_ordered_by_number_not_by_letters(run: Storage) -> None:
    for name in ("999999-2", "1000000-2", "000001-10", "000001-9"):
        save(run, name)
    assert Checkpoints(run).committed() == ["000001-9", "000001-10", "999999-2", "1000000-2"]


def test_a_damaged_manifest_does_not_count_among_those_that_are_kept(run: Storage) -> None:
    for number in range(1, 6):
        save(run, f"{number:06d}-1")
    for number in (2, 4):
        run.write(f"checkpoints/{number:06d}-1/COMMITTED", b"{}")
    assert Checkpoints(run).prune(keep=2) == ["000001-1", "000002-1"]
    assert Checkpoints(run).names() == ["000003-1", "000004-1", "000005-1"]
    save(run, "000006-1")
    assert Checkpoints(run).prune(keep=2) == ["000003-1", "000004-1"]
