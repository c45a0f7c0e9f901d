"""PushCheck: refuses pushes that no worker of the run sends, before the server takes them."""

from __future__ import annotations

import numpy as np

from psgd.core.server.partitions import Partition
from psgd.errors import PushRefusedError
from psgd.spec import JobSpec
from psgd_workers.counting import counted
from psgd_workers.errors import EncodingError
from psgd_workers.gradients.compression import decode
from psgd_workers.messages import Encoded, EpochGrid, FloatArray, Gradient, Version

__all__ = ["PushCheck"]

# Upper limits, exclusive. Those of the integers are the limits of the fields of a journal's record.
LONGEST_S = 1e9  # computing time of a batch, seconds
SLOTS = 1 << 8
INCARNATIONS = 1 << 32
COUNTS = 1 << 64


class PushCheck:
    """The checks of a push against the job and the partition that it was sent to.

    Args:
        spec: the job that the push must belong to.
        partition: slice of the weights that the push must fit.
        grid: batches by shard, and number of examples in an epoch.
    """

    def __init__(self, spec: JobSpec, partition: Partition, grid: EpochGrid) -> None:
        self._grid = grid
        self._size = partition.stop - partition.start
        self._trainable = partition.num_trainable
        self._reads_weights = spec.correction.reads_weights
        self._partitions = spec.scaling.servers

    def check(self, gradient: Gradient, epochs: int, scratch: FloatArray) -> None:
        """Refuse a push that no worker of this run sends.

        Args:
            gradient: the push.
            epochs: number of complete epochs of the partition.
            scratch: `[partition size]` float32, overwritten.

        Raises:
            PushRefusedError: the batch does not exist; a number or a vector is impossible; or a vector that the job
                asks for is missing.
        """
        self._check_batch(gradient, epochs)
        self._check_name(gradient)
        # The norm of a gradient that is not finite is inf or nan: `push` rejects it, and the journal records that.
        if gradient.norm < 0 or not 0 <= gradient.compute_s < LONGEST_S:
            raise PushRefusedError(
                f"the push has norm {gradient.norm} and computing time {gradient.compute_s} s; expected a norm of 0 or "
                f"more and a time from 0 to {LONGEST_S:g} s"
            )
        if isinstance(gradient.values, Encoded):
            _check_encoded(gradient.values, scratch[: self._trainable])
            if self._trainable < self._size:
                _check_vector("buffers", gradient.buffers, self._size - self._trainable)
        else:
            _check_vector("values", gradient.values, self._size)
        if self._reads_weights:
            _check_vector("weights_read", gradient.weights_read, self._size)

    def _check_batch(self, gradient: Gradient, epochs: int) -> None:
        (epoch, shard, index) = gradient.batch
        per_shard = self._grid.batches_per_shard
        # A partition that was restored may be an epoch behind the others.
        exists = epoch <= epochs + 1 and shard < len(per_shard) and index < per_shard[shard]
        if not exists or min(gradient.batch) < 0:
            raise PushRefusedError(
                f"the push names {gradient.batch}; expected an epoch from 0 to {epochs + 1}, a shard below "
                f"{len(per_shard)}, and an index below the number of the shard's batches"
            )
        if gradient.examples != (expected := self._grid.examples(gradient.batch)):
            raise PushRefusedError(
                f"{gradient.batch} was pushed with {counted(gradient.examples, 'example')}; it has {expected}"
            )

    def _check_name(self, gradient: Gradient) -> None:
        """Refuse a push whose name or versions do not fit into the journal's fields."""
        _, slot, number, _, _, (incarnation, updates), _, _, _, _, _, _, others, carries = gradient
        if not (0 <= slot < SLOTS and 0 <= carries < number < COUNTS):
            raise PushRefusedError(
                f"the push has number {number} of slot {slot} and carries on {carries}; expected a slot from "
                f"0 to {SLOTS - 1}, a number of 1 or more, and to carry on an earlier number or 0 for none"
            )
        fits = 0 <= incarnation < INCARNATIONS and 0 <= updates < COUNTS and len(others) + 1 == self._partitions
        if not fits or (others and not all(map(_fits_journal, others))):
            raise PushRefusedError(
                f"the push was computed from {(gradient.read, *others)}; expected the versions of {self._partitions} "
                "partitions"
            )


def _fits_journal(version: Version) -> bool:
    incarnation, updates = version
    return 0 <= incarnation < INCARNATIONS and 0 <= updates < COUNTS


def _check_encoded(encoded: Encoded, scratch: FloatArray) -> None:
    try:
        decode(encoded, scratch)
    except EncodingError as error:
        raise PushRefusedError(str(error)) from error


def _check_vector(name: str, vector: object, length: int) -> None:
    if not (isinstance(vector, np.ndarray) and vector.shape == (length,) and vector.dtype == np.float32):
        given = f"{vector.dtype} {vector.shape}" if isinstance(vector, np.ndarray) else type(vector).__name__
        raise PushRefusedError(f"the {name} of the push are {given}; expected float32 ({length},)")
