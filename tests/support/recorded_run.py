"""Runs on a virtual clock that write a run directory, as runs on Ray do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psgd.core.driver.events import Action, Commit
from psgd.core.server.state import ServerState
from psgd.job import OpenJob
from psgd.simulation.cluster import VirtualCluster
from psgd.simulation.observer import ClusterObserver
from psgd.spec import JobSpec
from psgd.store.checkpoint_part import Part, write_part
from psgd.store.checkpoints import Checkpoints
from psgd.store.manifest import Manifest
from psgd.store.run_directory import RunDirectory
from psgd.store.storage import Storage
from psgd_workers.messages import BatchId, FloatArray
from tests.support.in_process import InProcess, VirtualCheckpoint

__all__ = ["RecordedRun", "digits", "record", "run_directory"]

SOON_S = 0.2  # time from a commit to a server's death; some pushes arrive in it that no checkpoint contains


def digits(**sections: Any) -> JobSpec:
    """Return a job of 3 workers on digits, saved every 10 updates; `sections` replace those of the spec."""
    plain = {
        "model": {"kind": "mlp", "hidden": [8]},
        "data": {"format": "sklearn", "dataset": "digits", "batch_size": 64, "num_shards": 2, "normalize": "unit"},
        "optimizer": {"lr": 0.1, "momentum": 0.9},
        "scaling": {"workers": 3},
        "run": {"epochs": 2},
        "checkpoint": {"every_s": None, "every_updates": 10, "keep": 2},
    }
    return JobSpec.model_validate(plain | sections)


def run_directory(folder: Path, name: str = "run") -> RunDirectory:
    """Return the run directory of that name in a folder."""
    return RunDirectory(Storage(str(folder)).folder(name))


def record(run: RunDirectory, spec: JobSpec, **options: Any) -> RecordedRun:
    """Run a job to its end; resume from the newest checkpoint in the directory if there is one."""
    checkpoint = Checkpoints(run.storage).newest(refused=lambda _: None)
    if checkpoint is None:
        return RecordedRun(run, OpenJob.open(spec), None, **options).run()
    manifest = checkpoint.manifest
    number = Checkpoints(run.storage).next_number() - 1
    states = tuple(checkpoint.state(partition) for partition in range(manifest.partitions))
    resume = VirtualCheckpoint(states, number, manifest.updates, manifest.requeued)
    spec = spec.model_copy(update=dict(manifest.settings))
    return RecordedRun(run, OpenJob.open(spec), manifest.name, resume=resume, **options).run()


def _uneven(worker: str, batch: BatchId) -> float:
    return float(0.01 + 0.2 * np.random.default_rng([int(worker[-1]), *batch]).random())


class RecordedRun(InProcess):
    """One process of a run. Events, journal and checkpoints are written as `psgd.cluster` writes them.

    Args:
        run: the run directory.
        job: the job to run.
        resumed: name of the checkpoint that the run is resumed from; None for a new run.
        losses: number of deaths of the first server, each soon after a checkpoint.
        dying: pairs (number of a checkpoint, partition); that server dies after it wrote its part, before the commit.
        options: further arguments of `InProcess`.
    """

    def __init__(
        self,
        run: RunDirectory,
        job: OpenJob,
        resumed: str | None,
        *,
        losses: int = 0,
        dying: Collection[tuple[int, int]] = (),
        **options: Any,
    ) -> None:
        self._worker = job.worker("all")
        writer = _DirectoryWriter(run, job, resumed, losses, dying)
        super().__init__(
            job.spec,
            job.shards.grid,
            job.weights,
            self.gradient,
            observers=[writer],
            incarnation=writer.incarnation - 1,
            **{"compute_s": _uneven} | options,
        )

    def gradient(self, batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
        """Write the gradient of a batch into `out` and return the loss, as the job's own worker does."""
        return self._worker.gradient(batch, weights, out)


class _DirectoryWriter(ClusterObserver):
    """Writes a run's events, journal and checkpoints into its directory."""

    def __init__(
        self, run: RunDirectory, job: OpenJob, resumed: str | None, losses: int, dying: Collection[tuple[int, int]]
    ) -> None:
        self._run = run
        self._job = job
        self._records: dict[int, list[NDArray[np.void]]] = defaultdict(list)
        self._losses = losses  # deaths that are still to come
        self._death_scheduled = False
        self._dying = dying
        self._newest = resumed  # name of the checkpoint that a server would be restored from
        self._started: set[int] = set()
        self._number = -1  # number of the newest checkpoint that was begun
        self._written: dict[int, Part] = {}  # parts of that checkpoint, by partition
        self.incarnation = run.own().incarnation
        run.begin(job.spec)
        scaling = job.spec.scaling
        run.event(
            "started",
            incarnation=self.incarnation,
            resumed=resumed,
            workers=scaling.model_dump()["workers"],
            pipeline=scaling.pipeline,
        )

    def started(self, cluster: VirtualCluster, partition: int) -> None:
        if partition in self._started:
            self._records[partition] = []  # records that were not saved are lost
            self._death_scheduled = False
            self.incarnation = self._run.next_incarnation()
            assert cluster.servers[partition].version.incarnation == self.incarnation
            self._run.event(
                "server_started", partition=partition, incarnation=self.incarnation, checkpoint=self._newest
            )
        self._started.add(partition)

    def journalled(self, cluster: VirtualCluster, partition: int, records: NDArray[np.void]) -> None:
        self._records[partition].append(records)

    def saved(self, cluster: VirtualCluster, partition: int, checkpoint: int, state: ServerState) -> None:
        if checkpoint != self._number:
            self._number = checkpoint
            self._written = {}
        records = np.concatenate([*self._records[partition], cluster.servers[partition].journal.take()])
        self._records[partition] = []
        self._written[partition] = write_part(self._run.storage, self._name(checkpoint), state, records)
        if (checkpoint, partition) in self._dying:
            cluster.after(
                0.0, cluster.kill_server, partition, 0.0
            )  # the driver learns of the death before it can commit

    def _name(self, number: int) -> str:
        return f"{number:06d}-{self.incarnation}"

    def acted(self, cluster: VirtualCluster, action: Action) -> None:
        if isinstance(action, Commit):
            self._commit(action)
            if self._losses and not self._death_scheduled:
                self._losses -= 1
                self._death_scheduled = True
                cluster.after(SOON_S, cluster.kill_server, 0)

    def _commit(self, commit: Commit) -> None:
        checkpoints = Checkpoints(self._run.storage)
        layout = self._job.layout
        parts = self._written.values()
        manifest = Manifest(
            format=1,
            name=self._name(commit.checkpoint),
            incarnation=self.incarnation,
            updates=commit.updates,
            epochs=commit.epochs,
            seed=self._job.spec.seed,
            spec_hash=self._job.spec.identity_hash(),
            settings=next(iter(self._written.values())).settings,
            data_fingerprint=self._job.dataset.fingerprint,
            names=layout.names,
            shapes=layout.shapes,
            num_trainable=layout.num_trainable,
            partitions=len(parts),
            requeued=0,
            files={name: checksum for part in parts for name, checksum in part.files.items()},
            journal={name: checksum for part in parts for name, checksum in part.journal.items()},
        )
        checkpoints.commit(manifest)
        self._newest = manifest.name
        deleted = checkpoints.prune(self._job.spec.checkpoint.keep)
        self._run.event("checkpoint", name=manifest.name, updates=commit.updates, deleted=deleted)
