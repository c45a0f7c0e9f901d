"""A job whose data is open and whose model was tried on it: what every way of running it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from psgd.errors import ModelError, SpecError
from psgd.spec import JobSpec
from psgd_workers.data import Dataset, open_dataset
from psgd_workers.data.shards import Shards
from psgd_workers.gradients.layout import Layout
from psgd_workers.messages import BatchId, FloatArray
from psgd_workers.models import Model, ModelWithBuffers, build_model
from psgd_workers.models.numpy.network import Network
from psgd_workers.models.trial import ModelTrial, draw_weights
from psgd_workers.transport.memory import free_memory
from psgd_workers.worker import Route, Worker

__all__ = ["OpenJob", "build_shards", "build_worker"]


@dataclass(frozen=True, slots=True)
class OpenJob:
    """A job, its data, and the weights it starts from."""

    spec: JobSpec
    dataset: Dataset
    shards: Shards
    layout: Layout
    weights: FloatArray  # [num_parameters], initial

    @classmethod
    def open(cls, spec: JobSpec) -> Self:
        """Open the data, build the model, and try one batch: what fails here would fail on every worker.

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
        """Return one sentence for each thing that is allowed, and may not be wanted, of the job on its data."""
        found = self.spec.warnings()
        if self.shards.left_out:
            which = "others each time" if self.spec.data.shuffle else "the same each time, as data.shuffle is false"
            found.append(
                f"data.drop_last leaves {self.shards.left_out} of {len(self.dataset.train)} training examples out of "
                f"each epoch, {which}"
            )
        return found

    def worker(self, name: str, routes: Sequence[Route] = ()) -> Worker:
        """A worker of this job, with a model of its own."""
        return build_worker(self.spec, name, self.dataset, self.layout, routes)


def build_shards(spec: JobSpec, dataset: Dataset) -> Shards:
    """Which examples make which batch of a job."""
    data = spec.data
    local = spec.worker_options.local
    steps = local.steps if local else 1
    return Shards(len(dataset.train), data.num_shards, data.batch_size, spec.seed, data.shuffle, steps, data.drop_last)


def build_worker(spec: JobSpec, name: str, dataset: Dataset, layout: Layout, routes: Sequence[Route] = ()) -> Worker:
    """A worker of a job, with a model of its own."""
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
    """Drawing initial weights that do not fit would have this process killed instead of refused."""
    if not isinstance(model, Network):
        return  # only its own code knows how large it is
    needed, free = 4 * 4 * model.num_parameters, free_memory()  # drawn, packed, and a trial's weights and gradient
    if needed > free:
        raise ModelError(
            f"the model has {model.num_parameters:,} parameters, for which the driver needs {needed / 2**30:.1f} GiB, "
            f"and {free / 2**30:.1f} GiB are free here: make it smaller, or drive from a larger machine"
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
        raise SpecError("run.target asks for val/accuracy, but the labels are no classes: use val/loss")
