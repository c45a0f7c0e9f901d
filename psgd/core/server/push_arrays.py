"""PushArrays: the part of a server's state that a push reads and changes in the usual case, as plain arrays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.applied import Bitmap
from psgd_workers.messages import FloatArray

__all__ = ["FORK", "INCARNATION", "UPDATES", "PushArrays"]

INCARNATION, UPDATES, FORK = range(3)  # indices of `PushArrays.version`

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


class PushArrays(NamedTuple):
    """Views of a server's arrays. Each array belongs to the part of the server that its comment names.

    The compiled push path changes them in place, under the same lock as the server's own methods.
    """

    version: Integers  # ParameterServer, [3]: incarnation, updates, and updates at which the incarnation began
    sequence: Integers  # Published, [3 or more]: sequence number, incarnation and updates of the published weights
    weights: FloatArray  # ParameterServer, [partition size]
    average: FloatArray  # Average, [trained values]; [0] without an average
    first: FloatArray  # Optimizer.slots[0], [trained values] or [0]
    second: FloatArray  # Optimizer.slots[1], [trained values] or [0]
    steps: Integers  # Optimizer, [1]
    settled: Bitmap  # AppliedSet, [2, batches of an epoch]
    progress: Integers  # AppliedSet, [3]: complete epochs, and missing batches by row of `settled`
    outcomes: Integers  # Tally, [outcomes]
    counts: Integers  # Tally, [5]
    times: Floats  # Tally, [3]
    staleness: Integers  # Tally, [MAX_STALENESS]
    losses: Floats  # Tally, [2]
    loss_epochs: Integers  # Tally, [2, 2]
    means: Floats  # Rescaled, [2]; zeros for other corrections
    journal: NDArray[np.uint8]  # Journal, [records, bytes of a record]
    filled: Integers  # Journal, [1]
