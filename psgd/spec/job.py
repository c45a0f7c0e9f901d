"""JobSpec: a whole training job, accepted or refused before any process starts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from psgd.jsontext import to_json
from psgd.spec.combinations import faults
from psgd.spec.consistency import AsyncConsistency, ConsistencySpec, RingmasterConsistency
from psgd.spec.correction import CorrectionSpec, NoCorrection
from psgd.spec.optimizer import OptimizerSpec
from psgd.spec.scaling import ScalingConfig
from psgd.spec.simulate import SimulateConfig, expand_modes
from psgd_workers.spec import (
    CompressionSpec,
    Count,
    DataSpec,
    ModelSpec,
    NoCompression,
    Spec,
    TorchModel,
    Whole,
    WorkerOptions,
)

__all__ = ["NAME_PATTERN", "CheckpointConfig", "FailureConfig", "JobSpec", "RunConfig", "Settings", "TargetConfig"]

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"

IDENTITY = {"version", "seed", "model", "data", "optimizer", "consistency", "correction", "compression"}


def _one(given: Any) -> Any:
    """Refuse true, which Python takes for 1."""
    if isinstance(given, bool):
        raise ValueError("expected 1")  # noqa: TRY004 (pydantic wants a ValueError)
    return given


def _run_name(given: str) -> str:
    if not re.fullmatch(NAME_PATTERN, given):
        raise ValueError(
            "expected at most 63 letters, digits, dots, underscores and hyphens, beginning with a letter or a digit"
        )
    return given


class TargetConfig(Spec):
    """A value of a metric at which the run ends early."""

    metric: Literal["val/accuracy", "val/loss", "train/loss"]
    """The metric, measured at the end of each epoch."""
    value: float
    """The run ends when an accuracy is at least this value, or a loss at most this value."""

    def reached(self, value: float) -> bool:
        return value >= self.value if self.metric == "val/accuracy" else value <= self.value


class RunConfig(Spec):
    """When the run ends, and where its files are kept. At least one of `epochs`, `max_updates` and `max_time_s` must be
    given; the run ends at the limit that is reached first."""

    epochs: Count | None = None
    """Number of passes over the training data. null: no limit."""
    max_updates: Count | None = None
    """Number of optimizer steps. null: no limit."""
    max_time_s: float | None = Field(default=None, gt=0)
    """Seconds of training, not counting the start. null: no limit."""
    target: TargetConfig | None = Field(default=None, examples=[{"metric": "val/accuracy", "value": 0.97}])
    """Metric and value at which the run ends early, such as `{metric: val/accuracy, value: 0.97}`. null: none."""
    storage: str = Field(default="runs", min_length=1)
    """Folder or fsspec URL, such as `s3://bucket/runs`, in which the run gets a directory of its name. On a cluster
    every node must reach it."""

    @model_validator(mode="after")
    def _ends(self) -> RunConfig:
        if self.epochs is None and self.max_updates is None and self.max_time_s is None:
            raise ValueError("a run must end: give at least one of epochs, max_updates, max_time_s")
        return self


class CheckpointConfig(Spec):
    """How often the weights and the state of the run are saved. The run's end and Ctrl-C always save them."""

    every_s: float | None = Field(default=60.0, gt=0)
    """Seconds between checkpoints. Lower: less work is repeated when a server is lost. null: not by time."""
    every_updates: Count | None = None
    """Optimizer steps between checkpoints. null: not by steps."""
    keep: Count = 3
    """Number of checkpoints that are kept. Older ones are deleted."""


class FailureConfig(Spec):
    """How many failures the run survives, and the time limits of its waits."""

    max_failures: Whole = Field(default=10, ge=-1)
    """Number of workers and servers that are replaced after they died; after one more the run fails. -1: no limit.
    Preempted nodes are not counted."""
    max_rejected: Whole = Field(default=10, ge=0)
    """Number of gradients with infinite or NaN values that are left out; after one more the run fails as diverged."""
    poison: Literal["fail", "skip"] = "fail"
    """What to do with a poison batch, which kills its worker or gives infinite or NaN gradients at each attempt.
    `fail`: end the run and name the batch. `skip`: go on without the batch and count it as discarded."""
    poison_tries: Count = 3
    """Failed attempts after which a batch counts as poison."""
    start_timeout_s: float = Field(default=0.0, ge=0)
    """Seconds to wait for a cluster that is too small for the job to grow. 0: refuse the job at once."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Seconds to wait for an answer of a worker or server, or for a process to start. Raise it if a batch takes
    longer."""


class Settings(Spec):
    """The part of a job that `psgd set` can change while it runs."""

    consistency: ConsistencySpec
    """Which gradients form a step, and which workers wait for it."""
    optimizer: OptimizerSpec
    """The update rule of the servers."""


class JobSpec(Spec):
    """A training job. A job file is this in YAML."""

    version: Annotated[Literal[1], BeforeValidator(_one)] = 1
    """Version of the format of job files."""
    name: Annotated[str, AfterValidator(_run_name), Field(json_schema_extra={"pattern": NAME_PATTERN})] | None = None
    """Name of the run and of its directory. null: the job file's name without its ending, and with hyphens for
    characters that a name cannot have."""
    seed: Whole = Field(default=0, ge=0, lt=2**63)
    """Seed of the initial weights, of the validation part and of the order of the examples in every epoch."""
    model: ModelSpec = Field(examples=[{"kind": "mlp", "hidden": [64]}])
    """The model to train."""
    data: DataSpec = Field(examples=[{"format": "csv", "path": "data.csv"}])
    """The data to train on."""
    optimizer: OptimizerSpec = Field(examples=[{"name": "sgd", "lr": 0.1}])
    """The update rule of the servers."""
    consistency: ConsistencySpec = Field(default=AsyncConsistency(), examples=[{"mode": "async"}])
    """Which gradients form a step of the servers, and which workers wait for it. The staleness of a gradient is the
    number of steps between reading the weights that it was computed from and applying it."""
    correction: CorrectionSpec = Field(default=NoCorrection(), examples=[{"name": "staleness_lr"}])
    """How a gradient is changed because it is stale."""
    compression: CompressionSpec = Field(default=NoCompression(), examples=[{"name": "fp16"}])
    """How gradients are compressed on their way to the servers."""
    scaling: ScalingConfig = Field(default=ScalingConfig(), examples=[{"workers": 4}])
    """The number of workers and servers, and their resources."""
    run: RunConfig = Field(examples=[{"epochs": 10}])
    """When the run ends, and where its files are kept."""
    checkpoint: CheckpointConfig = Field(default=CheckpointConfig(), examples=[{"every_s": 60}])
    """How often the weights and the state of the run are saved."""
    failure: FailureConfig = Field(default=FailureConfig(), examples=[{"max_failures": 10}])
    """How many failures the run survives, and the time limits of its waits."""
    simulate: SimulateConfig | None = Field(default=None, examples=[{"delays": "lognormal:0,1", "modes": "async,bsp"}])
    """Imaginary workers for `psgd simulate`, and the modes to compare. Training ignores it. null: the defaults."""

    @field_validator("simulate", mode="before")
    @classmethod
    def _own_mode_keeps_its_fields(cls, given: Any, info: ValidationInfo) -> Any:
        """Return the section with the job's fields in modes in short form."""
        if not isinstance(given, Mapping) or "modes" not in given:
            return given
        return dict(given) | {"modes": expand_modes(given["modes"], info.data.get("consistency"))}

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
        """Options of the job's workers besides model and data."""
        return WorkerOptions(
            local=self.consistency.local_steps,
            compression=self.compression,
            sends_weights=self.correction.reads_weights,
            stop_at=self.consistency.stop_at,
        )

    @property
    def settings(self) -> Settings:
        """The part of the job that `psgd set` can change."""
        return Settings(consistency=self.consistency, optimizer=self.optimizer)

    def warnings(self) -> list[str]:
        """Return a sentence for each choice that is allowed but probably a mistake."""
        found = []
        if isinstance(self.consistency, RingmasterConsistency) and self.data.num_shards > 1 and not self.data.shuffle:
            found.append(
                "mode ringmaster refuses the gradients of slow workers, and shards that are cut without shuffling may "
                "differ: within an epoch, the weights lean towards the data of fast workers. Set data.shuffle or "
                "data.num_shards 1, or use mode ringleader"
            )
        return found

    def identity(self) -> dict[str, Any]:
        """Return the part of the job that decides the weights, which a resumed run may not change.

        Data is compared by its content, through its fingerprint: the path to it may change.
        """
        return self.model_dump(mode="json", include=IDENTITY, exclude={"data": {"path"}})

    def identity_hash(self) -> str:
        """Return the SHA-256 of `identity()`, in hex."""
        return hashlib.sha256(to_json(self.identity(), sort_keys=True).encode()).hexdigest()
