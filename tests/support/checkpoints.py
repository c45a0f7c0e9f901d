"""Checkpoints of a small model in two partitions, written without servers."""

from __future__ import annotations

from typing import Any

import numpy as np

from psgd.core.server.journal import RECORD
from psgd.core.server.state import ServerState
from psgd.store.checkpoint_part import Part, write_part
from psgd.store.checkpoints import Checkpoints
from psgd.store.manifest import Manifest
from psgd.store.storage import Storage
from psgd_workers.gradients.layout import Layout
from tests.support.jobs import job

__all__ = ["FLAT", "LAYOUT", "NO_RECORDS", "TENSORS", "fail", "manifest", "recommit", "save", "state"]

TENSORS = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.full(2, -1, np.float32)}
LAYOUT = Layout.of(TENSORS)
FLAT = LAYOUT.pack(TENSORS)
CUT = 5  # between the two partitions, inside a tensor
SETTINGS = job().settings
NO_RECORDS = np.zeros(0, RECORD)


def state(partition: int, updates: int = 40) -> ServerState:
    """Return a server's state. Partition 1 holds the first slice, so that numbers and order differ."""
    start, stop = (CUT, len(FLAT)) if partition == 0 else (0, CUT)
    arrays = {
        "weights": FLAT[start:stop],
        "settled.3": np.array([True, False, True]),
        "optimizer.velocity": FLAT[start:stop] / 3,
    }
    metadata = {
        "version": [1, updates],
        "partition": [partition, start, stop, stop - start],
        "epochs": 3,
        "settings": SETTINGS.model_dump(mode="json"),
    }
    return ServerState(arrays, metadata)


def manifest(name: str, parts: list[Part]) -> Manifest:
    """Return the manifest of a checkpoint of these parts."""
    return Manifest(
        format=1,
        name=name,
        incarnation=1,
        updates=min(part.updates for part in parts),
        epochs=3,
        seed=0,
        spec_hash="spec",
        settings=SETTINGS,
        data_fingerprint="data",
        names=LAYOUT.names,
        shapes=LAYOUT.shapes,
        num_trainable=LAYOUT.num_trainable,
        partitions=len(parts),
        requeued=0,
        files={name: checksum for part in parts for name, checksum in part.files.items()},
        journal={},
    )


def save(run: Storage, name: str) -> Manifest:
    """Write and commit a checkpoint of two partitions."""
    whole = manifest(name, [write_part(run, name, state(partition), NO_RECORDS) for partition in (0, 1)])
    Checkpoints(run).commit(whole)
    return whole


def fail(fault: str) -> None:
    """Fail the test, because a checkpoint was refused."""
    raise AssertionError(fault)


def recommit(run: Storage, name: str, **changes: Any) -> None:
    """Write a manifest with other fields, and with the checksum of these."""
    changed = Checkpoints(run).manifest(name).model_copy(update=changes)
    run.write(f"checkpoints/{name}/COMMITTED", changed.to_bytes())
