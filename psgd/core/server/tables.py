"""Tables of gradient sums, one sum for each worker, and the aggregators that collect their rounds in such tables."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.aggregators import BaseAggregator, Contribution, Step, StepMember, scale_into
from psgd.core.server.state import VectorCounts
from psgd_workers.messages import FloatArray

__all__ = ["RingleaderTables", "Table", "TableMean"]


class Table:
    """A sum of gradients for each worker.

    Its mean is (1/n) Σᵢ (1/Bᵢ) Σⱼ gᵢⱼ: all n workers have the same weight, whatever their numbers of gradients Bᵢ.

    Args:
        size: number of values of the partition.
        trainable: number of them before the first buffer.

    Attributes:
        counts: worker -> number of its gradients, Bᵢ.
        pending: the gradients that are in no step yet.
    """

    def __init__(self, size: int, trainable: int) -> None:
        self._size = size
        self._trainable = trainable
        self._sums: dict[str, FloatArray] = {}
        self._weight = 0.0
        self._mean = np.empty(size, np.float32)
        self._scratch = np.empty(size, np.float32)
        self.counts: dict[str, int] = {}
        self.pending: list[StepMember] = []

    def add(self, contribution: Contribution) -> None:
        """Add the gradient to the sum of its worker."""
        worker, _, member, values, scale, weight = contribution
        if worker not in self._sums:
            self._sums[worker] = np.zeros(self._size, np.float32)
        self._sums[worker] += scale_into(self._scratch, values, self._trainable, scale, weight)
        self._weight += weight
        self.counts[worker] = self.counts.get(worker, 0) + 1
        self.pending.append(member)

    def step(self) -> Step:
        """Return a step on the mean. The table keeps its sums for further steps."""
        self._mean[:] = 0
        for worker, total in self._sums.items():
            self._mean += np.divide(total, self.counts[worker], out=self._scratch)
        self._mean /= len(self._sums)
        members = self.pending
        self.pending = []
        return Step(self._mean, self._weight / sum(self.counts.values()), members)

    def clear(self) -> None:
        """Remove all sums."""
        self._sums = {}
        self.counts = {}
        self._weight = 0.0
        self.pending = []

    def state(self, prefix: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Return the sum of each worker, `[partition size]`, as the array `PREFIX.WORKER`; and the counts."""
        arrays = {f"{prefix}.{worker}": total.copy() for worker, total in self._sums.items()}
        return arrays, {
            "counts": dict(self.counts),
            "weight": self._weight,
            "fresh": [list(member) for member in self.pending],
        }

    def load(self, prefix: str, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
        """Restore the sums from the arrays `PREFIX.WORKER` and the counts."""
        self.counts = {worker: int(count) for worker, count in metadata["counts"].items()}
        # In the order of `counts`: storage returns arrays in any order, and a mean's last bits depend on the order.
        self._sums = {worker: arrays[f"{prefix}.{worker}"].astype(np.float32) for worker in self.counts}
        self._weight = float(metadata["weight"])
        self.pending = [StepMember(*member) for member in metadata["fresh"]]


class TableMean(BaseAggregator):
    """The mean of the workers' means: one step on each table.

    Attributes:
        table: sums of the open round.
    """

    def __init__(self, size: int, trainable: int) -> None:
        self.table = Table(size, trainable)

    def __len__(self) -> int:
        return len(self.table.pending)

    def add(self, contribution: Contribution) -> None:
        """Add the gradient to the sum of its worker."""
        self.table.add(contribution)

    def close(self) -> Step:
        """Return the mean, and empty the table."""
        step = self.table.step()
        self.table.clear()
        return step

    def vectors(self, workers: int, scaled: bool) -> VectorCounts:
        """Count a sum for each worker, which a state contains, the mean, and a scratch vector."""
        return VectorCounts(workers + 2, workers)

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Return the sums and counts of the table."""
        return self.table.state("table")

    def load(self, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
        """Restore the table."""
        self.table.load("table", arrays, metadata)


class RingleaderTables(BaseAggregator):
    """Ringleader's two tables (Maranjyan and Richtárik, 2026).

    1. The present table collects gradients until every live worker has one in it.
    2. Then each live worker is owed one step on that table. The worker that completed the table gets its step at once;
       each other worker gets its step with its next gradient, which is added to the present table.
    3. Meanwhile, gradients of workers that are owed no step go to the next table.
    4. When no worker is owed a step any more, the next table becomes the present one.
    """

    def __init__(self, size: int, trainable: int) -> None:
        self._table = Table(size, trainable)
        self._next = Table(size, trainable)
        self._owed: set[str] = set()  # workers that are still owed a step on the present table
        self._last_worker = ""  # the worker that pushed last
        self._step_due = False

    def __len__(self) -> int:
        return len(self._table.pending) + len(self._next.pending)

    @property
    def _collecting(self) -> bool:
        return not self._owed and not self._step_due

    def add(self, contribution: Contribution) -> None:
        """Add the gradient to the present table or to the next one, and note whether it makes a step due."""
        self._last_worker = contribution.worker
        if self._collecting:
            self._table.add(contribution)
        elif contribution.worker in self._owed:
            self._owed.remove(contribution.worker)
            self._table.add(contribution)
            self._step_due = True
        else:
            self._next.add(contribution)

    def owes_step(self) -> bool:
        """Return True if a step on the present table is due now."""
        return self._step_due

    def set_live(self, live: AbstractSet[str]) -> None:
        """Drop the steps owed to workers that are gone. Begin the steps if all live workers are in the table."""
        if self._owed:
            self._owed.intersection_update(live)
            if self._collecting:
                self._swap_tables()
        if self._collecting and self._table.counts and live <= self._table.counts.keys():
            self._owed = set(live) - {self._last_worker}
            self._step_due = True

    def close(self) -> Step:
        """Return a step on the present table.

        At an epoch's end no step is due: the step then is on the table that has pending gradients.
        """
        if not self._step_due and self._next.pending:
            self._owed = set()
            self._swap_tables()
        step = self._table.step()
        flushed = not self._step_due
        self._step_due = False
        if flushed or not self._owed:
            self._swap_tables()
        return step

    def _swap_tables(self) -> None:
        self._table.clear()
        self._table, self._next = self._next, self._table

    def vectors(self, workers: int, scaled: bool) -> VectorCounts:
        """Count the sums of two tables, which a state contains, and a mean and a scratch vector for each table.

        There is one sum less than two for each worker: the worker that gets the last step on the present table has no
        sum in the next one.
        """
        sums = 2 * workers - 1
        return VectorCounts(sums + 4, sums)

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Return both tables, the workers that are owed a step, and the worker that pushed last."""
        arrays, table = self._table.state("table")
        next_arrays, next_table = self._next.state("next")
        metadata = {"table": table, "next": next_table, "owed": sorted(self._owed), "last": self._last_worker}
        return arrays | next_arrays, metadata

    def load(self, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
        """Restore both tables."""
        self._table.load("table", arrays, metadata["table"])
        self._next.load("next", arrays, metadata["next"])
        self._owed = set(metadata["owed"])
        self._last_worker = str(metadata["last"])
