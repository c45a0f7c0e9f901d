from __future__ import annotations

from hashlib import sha256
from io import BytesIO

import numpy as np
import pytest

from psgd.core.server.journal import RECORD
from psgd.core.server.state import ServerState
from psgd.errors import CheckpointError
from psgd.store.checkpoint_part import write_part
from psgd.store.checkpoints import Checkpoints
from psgd.store.storage import Storage
from tests.support.checkpoints import FLAT, NO_RECORDS, manifest, save, state


def test_a_state_is_restored_bit_for_bit(run: Storage) -> None:
    save(run, "000001-1")
    checkpoint = Checkpoints(run).open("000001-1")
    for partition in (0, 1):
        saved = state(partition)
        restored = checkpoint.state(partition)
        assert restored.metadata == saved.metadata
        assert restored.arrays.keys() == saved.arrays.keys()
        for name, array in saved.arrays.items():
            assert restored.arrays[name].dtype == array.dtype
            np.testing.assert_array_equal(restored.arrays[name], array)


def test_a_part_tells_how_far_it_is_and_what_it_wrote(run: Storage) -> None:
    part = write_part(run, "000001-1", state(0), NO_RECORDS)
    assert (part.partition, part.updates, part.epochs) == (0, 40, 3)
    folder = run.folder("checkpoints/000001-1")
    assert part.files == {name: sha256(folder.read(name)).hexdigest() for name in folder.names("")}
    assert list(part.journal) == run.names("journal") == ["000001-1-server-0.npy"]


def test_the_journal_is_kept_beside_the_checkpoints(run: Storage) -> None:
    records = np.zeros(3, RECORD)
    records["updates"] = (1, 2, 3)
    part = write_part(run, "000002-1", state(0), records)
    assert list(part.journal) == run.names("journal") == ["000002-1-server-0.npy"]
    np.testing.assert_array_equal(np.load(BytesIO(run.read("journal/000002-1-server-0.npy"))), records)


def test_a_part_without_the_weights_of_its_slice_is_refused(run: Storage) -> None:
    metadata = dict(state(0).metadata) | {"partition": [0, 0, 3, 3]}
    part = write_part(run, "000001-1", ServerState({"weights": FLAT[:2]}, metadata), NO_RECORDS)
    Checkpoints(run).commit(manifest("000001-1", [part]))
    with pytest.raises(CheckpointError, match="has no weights of 3 values"):
        Checkpoints(run).open("000001-1").weights()
