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


def _refuse_boolean(given: Any) -> Any:
    """Refuse `true`, which equals 1 in Python."""
    if isinstance(given, bool):
        raise ValueError("expected 1")  # noqa: TRY004 (pydantic wants a ValueError)
    return given


def _check_name(given: str) -> str:
    if not re.fullmatch(NAME_PATTERN, given):
        raise ValueError(
            "expected at most 63 letters, digits, dots, underscores and hyphens, beginning with a letter or a digit"
        )
    return given


class TargetConfig(Spec):
    """A metric and its value at which the run ends early."""

    metric: Literal["val/accuracy", "val/loss", "train/loss"]
    """The metric. It is measured at the end of each epoch."""
    value: float
    """The run ends when the accuracy is at least this value, or the loss is at most this value."""

    def reached(self, value: float) -> bool:
        return value >= self.value if self.metric == "val/accuracy" else value <= self.value


class RunConfig(Spec):
    """The limits at which the run ends, and the folder of its files. Give at least one of `epochs`, `max_updates` and
    `max_time_s`: the run ends at the limit that is reached first."""

    epochs: Count | None = None
    """Number of passes over the training data. null: no limit."""
    max_updates: Count | None = None
    """Number of steps that the servers take. null: no limit."""
    max_time_s: float | None = Field(default=None, gt=0)
    """Seconds of training, without the time to start. null: no limit."""
    validate_every: Whole = Field(default=1, ge=0)
    """Epochs between two validations during training; the final weights are always validated. 0: only the final
    weights. Higher: validation takes less of the workers' time, and a `target` of a validation is noticed later."""
    target: TargetConfig | None = Field(default=None, examples=[{"metric": "val/accuracy", "value": 0.97}])
    """Metric and value at which the run ends early, such as `{metric: val/accuracy, value: 0.97}`. null: no target."""
    storage: str = Field(default="runs", min_length=1)
    """Folder or fsspec URL, such as `s3://bucket/runs`, in which the run gets a directory with its name. On a
    cluster, every node must be able to read and write there."""

    @model_validator(mode="after")
    def _ends(self) -> RunConfig:
        if self.epochs is None and self.max_updates is None and self.max_time_s is None:
            raise ValueError("a run must end: give at least one of epochs, max_updates, max_time_s")
        if self.validate_every == 0 and self.target is not None and self.target.metric.startswith("val/"):
            raise ValueError(
                f"run.target is a value of {self.target.metric}, but run.validate_every is 0, so that only the final "
                "weights are validated: set run.validate_every to 1 or more"
            )
        return self


class CheckpointConfig(Spec):
    """The intervals at which the weights and the state of the run are saved. They are also saved when the run ends and
    after Ctrl-C."""

    every_s: float | None = Field(default=60.0, gt=0)
    """Seconds between two checkpoints. Lower: less work is repeated after a server is lost. null: no checkpoints
    by time."""
    every_updates: Count | None = None
    """Number of steps of the servers between two checkpoints. null: no checkpoints by number of steps."""
    keep: Count = 3
    """Number of checkpoints to keep. Older ones are deleted."""


class FailureConfig(Spec):
    """The number of failures that the run survives, and its time limits for answers and processes."""

    max_failures: Whole = Field(default=10, ge=-1)
    """Number of dead or silent workers and servers that are replaced. If there is one more, the run fails. -1: no
    limit. Processes of preempted nodes are replaced without being counted."""
    max_rejected: Whole = Field(default=10, ge=0)
    """Number of gradients with infinite or NaN values that are refused. If there is one more, the run fails as
    diverged."""
    poison: Literal["fail", "skip"] = "fail"
    """The treatment of a poison batch, which at each attempt kills its worker or gives infinite or NaN gradients.
    `fail`: the run ends and names the batch. `skip`: the run goes on without the batch and counts it as discarded."""
    poison_tries: Count = 3
    """Failed attempts after which a batch counts as poison."""
    start_timeout_s: float = Field(default=0.0, ge=0)
    """Seconds to wait until a cluster that is too small for the job has grown. 0: the job is refused at once."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Seconds to wait for an answer from a worker or a server, or for a process to start. It must be longer than a
    batch takes."""


class Settings(Spec):
    """The part of a job that `psgd set` can change while the job runs."""

    consistency: ConsistencySpec
    """The rule that decides which gradients form a step, and which workers wait for it."""
    optimizer: OptimizerSpec
    """The rule by which a step changes the weights."""


class JobSpec(Spec):
    """A training job. A job file holds these fields in YAML.

    Workers are processes that read the weights from the servers, compute the gradient of the loss on a batch of
    examples and push it to the servers. Servers are processes that hold the weights of the model and change them in
    steps; a step is made of one or more gradients. While a worker computes, the servers may take steps with gradients
    of other workers: the number of these steps is the staleness of the gradient. A gradient with a staleness above 0 is
    stale.
    """

    version: Annotated[Literal[1], BeforeValidator(_refuse_boolean)] = 1
    """Version of the job file format."""
    name: Annotated[str, AfterValidator(_check_name), Field(json_schema_extra={"pattern": NAME_PATTERN})] | None = None
    """Name of the run and of its directory. null: the name of the job file without its extension, in which hyphens
    replace characters that a name cannot have."""
    seed: Whole = Field(default=0, ge=0, lt=2**63)
    """Seed of the random numbers that choose the initial weights, the validation examples and the order of the examples
    in each epoch."""
    model: ModelSpec = Field(examples=[{"kind": "mlp", "hidden": [64]}])
    """The model to train."""
    data: DataSpec = Field(examples=[{"format": "csv", "path": "data.csv"}])
    """The data to train on."""
    optimizer: OptimizerSpec = Field(examples=[{"name": "sgd", "lr": 0.1}])
    """The rule by which a step of the servers changes the weights."""
    consistency: ConsistencySpec = Field(default=AsyncConsistency(), examples=[{"mode": "async"}])
    """The rule that decides which gradients form a step of the servers, and which workers wait for it."""
    correction: CorrectionSpec = Field(default=NoCorrection(), examples=[{"name": "staleness_lr"}])
    """The change of a stale gradient, or of its learning rate, before the gradient is applied."""
    compression: CompressionSpec = Field(default=NoCompression(), examples=[{"name": "fp16"}])
    """The compression of gradients that are sent to the servers."""
    scaling: ScalingConfig = Field(default=ScalingConfig(), examples=[{"workers": 4}])
    """The number of workers and servers, and their resources."""
    run: RunConfig = Field(examples=[{"epochs": 10}])
    """The limits at which the run ends, and the folder of its files."""
    checkpoint: CheckpointConfig = Field(default=CheckpointConfig(), examples=[{"every_s": 60}])
    """The intervals at which the weights and the state of the run are saved."""
    failure: FailureConfig = Field(default=FailureConfig(), examples=[{"max_failures": 10}])
    """The number of failures that the run survives, and its time limits for answers and processes."""
    simulate: SimulateConfig | None = Field(default=None, examples=[{"delays": "lognormal:0,1", "modes": "async,bsp"}])
    """Simulated workers and modes to compare, for `psgd simulate`. Training ignores this section. null: its
    defaults."""

    @field_validator("simulate", mode="before")
    @classmethod
    def _own_mode_keeps_its_fields(cls, given: Any, info: ValidationInfo) -> Any:
        """Expand modes in short form; the job's own mode keeps the fields that the job gives it."""
        if not isinstance(given, Mapping) or "modes" not in given:
            return given
        return dict(given) | {"modes": expand_modes(given["modes"], info.data.get("consistency"))}

    @model_validator(mode="after")
    def _cuda_needs_a_gpu(self) -> JobSpec:
        if isinstance(self.model, TorchModel) and self.model.device == "cuda" and self.scaling.gpus_per_worker == 0:
            raise ValueError(
                "model.device is cuda, but scaling.gpus_per_worker is 0: give each worker a GPU, or a share of one"
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
        warnings = []
        if isinstance(self.consistency, RingmasterConsistency) and self.data.num_shards > 1 and not self.data.shuffle:
            warnings.append(
                "mode ringmaster refuses gradients of slow workers, and without data.shuffle the shards may differ: "
                "within an epoch, the weights fit the shards of fast workers better. Set data.shuffle or "
                "data.num_shards 1, or use mode ringleader"
            )
        return warnings

    def identity(self) -> dict[str, Any]:
        """Return the part of the job that decides the weights, and that must be the same when a run is resumed.

        The path of the data is left out: resuming compares the content of the data by its fingerprint.
        """
        return self.model_dump(mode="json", include=IDENTITY, exclude={"data": {"path"}})

    def identity_hash(self) -> str:
        """Return the SHA-256 of `identity()`, in hexadecimal."""
        return hashlib.sha256(to_json(self.identity(), sort_keys=True).encode()).hexdigest()
