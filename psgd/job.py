"""OpenJob: a job whose data is open and whose model was tried. Training, simulation and replay start with one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from psgd.errors import ModelError, SpecError
from psgd.spec import JobSpec
from psgd_workers.data import Dataset, open_dataset
from psgd_workers.data.shards import Shards
from psgd_workers.free_memory import free_memory
from psgd_workers.gradients.layout import Layout
from psgd_workers.messages import BatchId, FloatArray
from psgd_workers.models import Model, ModelWithBuffers, build_model
from psgd_workers.models.numpy.network import Network
from psgd_workers.models.trial import ModelTrial, draw_weights
from psgd_workers.worker import Route, Worker

__all__ = ["OpenJob", "build_shards", "build_worker"]


@dataclass(frozen=True, slots=True)
class OpenJob:
    """A job, its data and its initial weights."""

    spec: JobSpec
    dataset: Dataset
    shards: Shards
    layout: Layout
    weights: FloatArray  # [num_parameters], float32, initial

    @classmethod
    def open(cls, spec: JobSpec) -> Self:
        """Open the data, build the model and try it on two batches, so that a fault is found before workers start.

        Raises:
            InputError: the data cannot be used, or the model does not fit it.
        """
        dataset = open_dataset(spec.data, spec.seed, spec.model.loss)
        _check_target(spec, dataset)
        shards = build_shards(spec, dataset)
        model = build_model(spec.model, dataset)
        _check_memory(model)
        tensors = draw_weights(model, spec.seed)
        layout = Layout.of(tensors, model.buffers if isinstance(model, ModelWithBuffers) else ())
        job = cls(spec, dataset, shards, layout, layout.pack(tensors))
        first = shards.mini_batches(BatchId(0, 0, 0))[0]
        ModelTrial(model, layout, job.weights, dataset, spec.model.loss).run(first, shards.smallest_mini_batch())
        return job

    def warnings(self) -> list[str]:
        """Return a sentence for each choice that is allowed but probably a mistake, given the data."""
        warnings = self.spec.warnings()
        if self.shards.left_out:
            which = (
                "different ones each time" if self.spec.data.shuffle else "the same ones, because data.shuffle is false"
            )
            warnings.append(
                f"data.drop_last omits {self.shards.left_out} of {len(self.dataset.train)} training examples from each "
                f"epoch: {which}"
            )
        return warnings

    def worker(self, name: str, routes: Sequence[Route] = ()) -> Worker:
        """Return a worker of this job, with its own model."""
        return build_worker(self.spec, name, self.dataset, self.layout, routes)


def build_shards(spec: JobSpec, dataset: Dataset) -> Shards:
    """Return the assignment of a job's examples to its batches."""
    data = spec.data
    local = spec.worker_options.local
    steps = local.steps if local else 1
    return Shards(len(dataset.train), data.num_shards, data.batch_size, spec.seed, data.shuffle, steps, data.drop_last)


def build_worker(spec: JobSpec, name: str, dataset: Dataset, layout: Layout, routes: Sequence[Route] = ()) -> Worker:
    """Return a worker of a job, with its own model."""
    return Worker(
        name,
        build_model(spec.model, dataset),
        layout,
        dataset.train,
        build_shards(spec, dataset),
        spec.seed,
        spec.worker_options,
        routes,
        spec.failure.timeout_s,
        spec.scaling.pipeline,
    )


def _check_memory(model: Model) -> None:
    """Refuse a model that does not fit in memory: the system would kill this process without a message."""
    if not isinstance(model, Network):
        return  # its size is not known before its weights are drawn
    needed = 4 * 4 * model.num_parameters  # bytes: weights as drawn and as packed, and the trial's weights and gradient
    free = free_memory()
    if needed > free:
        raise ModelError(
            f"the model has {model.num_parameters:,} parameters, for which the driver needs {needed / 2**30:.1f} GiB, "
            f"and {free / 2**30:.1f} GiB are free here: make the model smaller, or start on a machine with more memory"
        )


def _check_target(spec: JobSpec, dataset: Dataset) -> None:
    target = spec.run.target
    if target is None or not target.metric.startswith("val/"):
        return
    if dataset.validation is None:
        raise SpecError(
            f"run.target asks for {target.metric}, but the data has no validation part: set data.validation_fraction"
        )
    if target.metric == "val/accuracy" and dataset.classes is None:
        raise SpecError("run.target asks for val/accuracy, but the labels are numbers, not classes: use val/loss")
