"""A model, tried on the data before a run starts: what fails here would fail on every worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psgd_workers.data.examples import Dataset
from psgd_workers.errors import ModelError
from psgd_workers.gradients.layout import Layout
from psgd_workers.messages import FloatArray
from psgd_workers.models.evaluation import ROWS, evaluate
from psgd_workers.models.protocol import Model
from psgd_workers.spec import LossName

__all__ = ["ModelTrial", "draw_weights"]

# A NaN that no computation begins with. One that is left, also by `+=`, was never written.
UNWRITTEN = np.uint32(0x7FD5_A5A5)


def draw_weights(model: Model, seed: int) -> Mapping[str, FloatArray]:
    """Return the initial weights of a model.

    Raises:
        ModelError: they are not named arrays of finite numbers.
    """
    try:
        tensors = model.initial_weights(seed)
        if isinstance(tensors, Mapping):
            return {name: _checked(name, np.asarray(tensor)) for name, tensor in tensors.items()}
    except ModelError:
        raise
    except Exception as error:  # a model of the user's may raise anything
        raise ModelError(f"the model's initial_weights({seed}) raised {type(error).__name__}: {error}") from error
    raise ModelError(
        f"the model's initial_weights returned a {type(tensors).__name__}; expected a dict of named arrays"
    )


def _checked(name: object, values: NDArray[Any]) -> NDArray[Any]:
    if not isinstance(name, str) or values.dtype.kind not in "biuf":
        raise ModelError(
            f"the model's initial_weights returned {name!r} with dtype {values.dtype}; expected a name and an array of "
            "float32"
        )
    with np.errstate(over="ignore"):
        finite = np.isfinite(values.astype(np.float32, copy=False)).all()
    if not finite:
        raise ModelError(
            f"initial weights {name!r} hold values that are not finite in float32: initialise them (a constant such as "
            "a mask of a torch module is no weight: register_buffer(..., persistent=False))"
        )
    return values


@dataclass(frozen=True, slots=True)
class ModelTrial:
    """One model and the data it is to be trained on.

    Args:
        model: the model.
        layout: of its weights.
        weights: `[num_parameters]`, initial; they are not changed.
        dataset: the data.
        loss: loss of the model's outputs; None for a model that has its own.
    """

    model: Model
    layout: Layout
    weights: FloatArray
    dataset: Dataset
    loss: LossName | None

    def run(self, first: NDArray[np.int64], smallest: NDArray[np.int64]) -> None:
        """Predict and backpropagate two batches, and evaluate.

        Args:
            first: rows of a full batch.
            smallest: rows of the shortest batch of an epoch.

        Raises:
            ModelError: the model raised, does not keep the `Model` protocol, or its outputs do not fit the labels.
        """
        self._predict(first)
        self._backpropagate(first, f"tried on the first batch, of {_examples(len(first))}", "")
        if len(smallest) < len(first):
            where = f"tried on the smallest batch, of {_examples(len(smallest))}, the last of a shard"
            self._backpropagate(smallest, where, ". `data.drop_last: true` leaves it out; or choose another batch_size")
        self._evaluate()

    def _backpropagate(self, rows: NDArray[np.int64], where: str, advice: str) -> None:
        train = self.dataset.train
        read = self.weights.copy()
        gradient = np.empty_like(read)
        gradient.view(np.uint32)[:] = UNWRITTEN
        named = self.layout.views(read)
        written = self.layout.views(gradient)
        try:
            float(self.model.loss_and_gradient(named, train.inputs(rows), train.labels[rows], written, 0))
        except Exception as error:  # a model of the user's may raise anything
            raise ModelError(f"the model does not fit the data, {where}: {_described(error)}{advice}") from error
        self._check_written(gradient)
        self._check_unchanged(read)

    def _check_written(self, gradient: FloatArray) -> None:
        missing = gradient.view(np.uint32) == UNWRITTEN
        for name, left in self.layout.views(missing).items():
            if left.any():
                raise ModelError(
                    f"the model's loss_and_gradient wrote {left.size - left.sum()} of the {left.size} values of "
                    f"gradient {name!r}: write each one into the given array, gradient[{name!r}][...] = ... (without "
                    "[...] the assignment only replaces the array, and += adds to what was not written)"
                )

    def _check_unchanged(self, read: FloatArray) -> None:
        changed = read.view(np.uint32) != self.weights.view(np.uint32)
        for name, different in self.layout.views(changed).items():
            if different.any():
                raise ModelError(
                    f"the model's loss_and_gradient changed the weights {name!r} that it was given: copy them first. "
                    "Only the servers change weights, by the gradient"
                )

    def _predict(self, rows: NDArray[np.int64]) -> None:
        train = self.dataset.train
        try:
            outputs = self.model.predict(self.layout.views(self.weights.copy()), train.inputs(rows))
        except Exception as error:  # a model of the user's may raise anything
            raise ModelError(
                f"the model does not fit the data, asked to predict the first batch, of {_examples(len(rows))} of "
                f"shape {list(train.features.shape[1:])}: {_described(error)}"
            ) from error
        self._check_outputs(np.shape(outputs), len(rows))

    def _check_outputs(self, shape: Sequence[int], rows: int) -> None:
        needed, meaning = self._needed_outputs()
        found = shape[1] if len(shape) == 2 and shape[0] == rows else 0
        more = self.loss in ("cross_entropy", None)  # outputs for classes that the data lacks are no mistake
        sign = self.loss is None and needed == 2 and found == 1  # positive: the second class
        if found != needed and not (more and found > needed) and not sign:
            raise ModelError(
                f"the model's outputs do not fit the labels: for {_examples(rows)} their shape is {list(shape)}, "
                f"expected {[rows, needed]}, {meaning}. Give the model's last layer that many outputs, or choose "
                "another loss"
            )

    def _needed_outputs(self) -> tuple[int, str]:
        classes = self.dataset.classes
        match self.loss:
            case "mse":
                return self.dataset.train.labels.shape[1], "a value for each target"
            case "binary_cross_entropy":
                return 1, "the logit of the second class"
            case _ if classes is not None:
                return len(classes), f"a logit for each class ({_listed(classes)})"
            case _:
                return 1, "at least one value"

    def _evaluate(self) -> None:
        validation = self.dataset.validation
        if validation is None:
            return
        last = len(validation) % ROWS or min(len(validation), ROWS)  # the shortest slice that a worker predicts at once
        try:
            evaluate(self.model, self.layout.views(self.weights.copy()), validation[-last:])
        except Exception as error:  # a model of the user's may raise anything
            raise ModelError(
                f"the model does not fit the data, tried on {last} validation examples: {_described(error)}"
            ) from error


def _examples(number: int) -> str:
    return "1 example" if number == 1 else f"{number} examples"


def _described(error: Exception) -> str:
    return str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"


def _listed(classes: Sequence[str]) -> str:
    return ", ".join(classes) if len(classes) <= 4 else f"{', '.join(classes[:2])}, ..., {classes[-1]}"
