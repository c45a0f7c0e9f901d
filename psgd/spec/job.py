"""JobSpec: everything a job says, accepted or refused before any process starts."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import Field, model_validator

from psgd.spec.combinations import faults
from psgd.spec.consistency import AsyncConsistency, ConsistencySpec, LocalConsistency, RingmasterConsistency
from psgd.spec.correction import CorrectionSpec, NoCorrection
from psgd.spec.optimizer import OptimizerSpec
from psgd.spec.scaling import ScalingConfig
from psgd_workers.spec import (
    CompressionSpec,
    DataSpec,
    LocalSteps,
    ModelSpec,
    NoCompression,
    Spec,
    TorchModel,
    WorkerOptions,
)

__all__ = ["CheckpointConfig", "FailureConfig", "JobSpec", "RunConfig", "Settings", "TargetConfig"]


IDENTITY = {"version", "seed", "model", "data", "optimizer", "consistency", "correction", "compression"}


class TargetConfig(Spec):
    """End the run once an epoch's metric is this good."""

    metric: Literal["val/accuracy", "val/loss", "train/loss"]
    """Which metric."""
    value: float
    """Accuracy: at least this. A loss: at most this."""

    def reached(self, value: float) -> bool:
        return value >= self.value if self.metric == "val/accuracy" else value <= self.value


class RunConfig(Spec):
    """When the run ends and where it is kept. It ends with whichever limit comes first."""

    epochs: int | None = Field(default=None, ge=1)
    """Passes over the training data."""
    max_updates: int | None = Field(default=None, ge=1)
    """Optimizer steps."""
    max_time_s: float | None = Field(default=None, gt=0)
    """Seconds of training, start-up left out."""
    target: TargetConfig | None = None
    """Stop early once a metric is good enough."""
    storage: str = Field(default="runs", min_length=1)
    """Folder or fsspec URL that holds the run's directory; on a cluster, one that every node reaches."""

    @model_validator(mode="after")
    def _ends(self) -> RunConfig:
        if self.epochs is None and self.max_updates is None and self.max_time_s is None:
            raise ValueError("a run must end: give at least one of epochs, max_updates, max_time_s")
        return self


class CheckpointConfig(Spec):
    """How often the state is saved. A run's end and Ctrl-C always save."""

    every_s: float | None = Field(default=60.0, gt=0)
    """Seconds between checkpoints; null: not by time. What a lost server costs at most."""
    every_updates: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; null: not by steps."""
    keep: int = Field(default=3, ge=1)
    """Newest checkpoints kept; older ones are deleted."""


class FailureConfig(Spec):
    """What is borne, and how long things are waited for."""

    max_failures: int = Field(default=10, ge=-1)
    """Deaths of workers and servers made good before the run fails; -1: any number. Preemptions are not counted."""
    max_rejected: int = Field(default=10, ge=0)
    """Gradients that are not finite before the run fails as diverged."""
    poison: Literal["fail", "skip"] = "fail"
    """What to do about a batch that again and again kills its worker or gives no finite gradient: end the run and name
    it, or do without it and count it as discarded."""
    poison_tries: int = Field(default=3, ge=1)
    """Tries after which it is one."""
    start_timeout_s: float = Field(default=0.0, ge=0)
    """Seconds to wait for a cluster that is too small to grow. 0: refuse at once."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Seconds any one answer may take: a receipt, a report, a process's start. Raise it for longer batches."""


class Settings(Spec):
    """The part of a job that `psgd set` can change while it runs."""

    consistency: ConsistencySpec
    """How workers wait for each other."""
    optimizer: OptimizerSpec
    """How a server steps."""


class JobSpec(Spec):
    """One training job."""

    version: Literal[1] = 1
    """Of this format."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """The run's name, and its directory's. Default: the job file's name without its ending."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides the initial weights, the split, the shards and every epoch's order."""
    model: ModelSpec
    """What is trained."""
    data: DataSpec
    """What it is trained on."""
    optimizer: OptimizerSpec
    """How a server steps."""
    consistency: ConsistencySpec = AsyncConsistency()
    """How workers wait for each other."""
    correction: CorrectionSpec = NoCorrection()
    """What staleness does to a gradient."""
    compression: CompressionSpec = NoCompression()
    """How gradients travel."""
    scaling: ScalingConfig = ScalingConfig()
    """How many workers and servers."""
    run: RunConfig
    """When the run ends, and where it is kept."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """How often the state is saved."""
    failure: FailureConfig = FailureConfig()
    """What is borne."""

    @model_validator(mode="after")
    def _cuda_needs_a_gpu(self) -> JobSpec:
        if isinstance(self.model, TorchModel) and self.model.device == "cuda" and self.scaling.gpus_per_worker == 0:
            raise ValueError(
                "model.device is cuda, but scaling.gpus_per_worker is 0: give each worker a GPU, or a share"
            )
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> JobSpec:
        if found := faults(self.consistency, self.correction, self.optimizer, self.scaling):
            raise ValueError("; ".join(found))
        return self

    @property
    def worker_options(self) -> WorkerOptions:
        """What its workers are told."""
        mode = self.consistency
        return WorkerOptions(
            local=LocalSteps(steps=mode.h, lr=mode.lr) if isinstance(mode, LocalConsistency) else None,
            compression=self.compression,
            sends_weights=self.correction.reads_weights,
            stop_at=self._stop_at,
        )

    @property
    def _stop_at(self) -> int | None:
        if not getattr(self.consistency, "stop", False):
            return None
        # The other modes that refuse admit nothing stale at all.
        return self.consistency.r if isinstance(self.consistency, RingmasterConsistency) else 1

    @property
    def settings(self) -> Settings:
        """What `psgd set` can change."""
        return Settings(consistency=self.consistency, optimizer=self.optimizer)

    def warnings(self) -> list[str]:
        """What is allowed, and probably not wanted."""
        found = []
        if isinstance(self.consistency, RingmasterConsistency) and self.data.num_shards > 1 and not self.data.shuffle:
            found.append(
                "mode ringmaster refuses the gradients of slow workers, and shards that are cut without shuffling may "
                "differ: within an epoch, the weights lean towards the data of fast workers. Set data.shuffle or "
                "data.num_shards 1, or use mode ringleader"
            )
        return found

    def identity(self) -> dict[str, Any]:
        """Return the part of a job that a resumed run may not change: what its weights are a function of.

        Data is compared by content, by its fingerprint; the path to it may change.
        """
        return self.model_dump(mode="json", include=IDENTITY, exclude={"data": {"path"}})

    def identity_hash(self) -> str:
        """SHA-256 of `identity()`, in hex."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()
