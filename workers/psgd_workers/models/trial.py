"""Tries a model on the data before a run starts, because a failure here would repeat on every worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psgd_workers.counting import counted
from psgd_workers.data.examples import Dataset
from psgd_workers.errors import ModelError
from psgd_workers.gradients.layout import Layout
from psgd_workers.messages import FloatArray
from psgd_workers.models.evaluation import ROWS_AT_ONCE, evaluate
from psgd_workers.models.protocol import Model
from psgd_workers.spec import LossName

__all__ = ["ModelTrial", "draw_weights"]

# A NaN whose bits no computation produces by itself. `+=` keeps these bits, so it does not count as writing.
UNWRITTEN = np.uint32(0x7FD5_A5A5)


def draw_weights(model: Model, seed: int) -> Mapping[str, FloatArray]:
    """Return the initial weights of a model, checked.

    Args:
        model: model that gives the weights.
        seed: seed of the job.

    Raises:
        ModelError: `initial_weights` raised, or its result is not a mapping from names to arrays of finite numbers.
    """
    try:
        tensors = model.initial_weights(seed)
        if isinstance(tensors, Mapping):
            return {name: _checked(name, np.asarray(tensor)) for name, tensor in tensors.items()}
    except ModelError:
        raise
    except Exception as error:  # the user's model may raise any exception
        raise ModelError(f"the model's initial_weights({seed}) raised {type(error).__name__}: {error}") from error
    raise ModelError(
        f"the model's initial_weights returned a {type(tensors).__name__}; expected a dict of named arrays"
    )


def _checked(name: object, values: NDArray[Any]) -> NDArray[Any]:
    if not isinstance(name, str) or values.dtype.kind not in "biuf":
        raise ModelError(
            f"the model's initial_weights returned {name!r} with dtype {values.dtype}; expected a string as "
            "the name, and an array of float32"
        )
    with np.errstate(over="ignore"):
        finite = np.isfinite(values.astype(np.float32, copy=False)).all()
    if not finite:
        raise ModelError(
            f"the initial weights {name!r} have values that are not finite in float32: initialise them. If they are a "
            "constant of a torch module, such as a mask, call register_buffer(..., persistent=False)"
        )
    return values


@dataclass(frozen=True, slots=True)
class ModelTrial:
    """A trial of a model on the data that it is going to be trained on.

    Args:
        model: model to try.
        layout: layout of the model's weights.
        weights: initial weights, `[num_parameters]`, not changed.
        dataset: data of the job.
        loss: loss of the model's outputs; None for a model with a loss of its own.
    """

    model: Model
    layout: Layout
    weights: FloatArray
    dataset: Dataset
    loss: LossName | None

    def run(self, first: NDArray[np.int64], smallest: NDArray[np.int64]) -> None:
        """Predict the first batch, backpropagate the first and the smallest batch, and evaluate.

        Args:
            first: rows of a full batch.
            smallest: rows of the smallest batch of an epoch.

        Raises:
            ModelError: the model raised, violates the `Model` protocol, or its outputs do not fit the labels.
        """
        self._predict(first)
        self._backpropagate(first, f"the first batch ({counted(len(first), 'example')})", "")
        if len(smallest) < len(first):
            batch = f"the smallest batch ({counted(len(smallest), 'example')}, the last batch of a shard)"
            self._backpropagate(
                smallest, batch, ". Leave it out by `data.drop_last: true`, or choose another batch_size"
            )
        self._evaluate()

    def _backpropagate(self, rows: NDArray[np.int64], batch: str, advice: str) -> None:
        train = self.dataset.train
        weights = self.weights.copy()
        gradient = np.empty_like(weights)
        gradient.view(np.uint32)[:] = UNWRITTEN
        weight_views = self.layout.views(weights)
        gradient_views = self.layout.views(gradient)
        try:
            float(self.model.loss_and_gradient(weight_views, train.inputs(rows), train.labels[rows], gradient_views, 0))
        except Exception as error:  # the user's model may raise any exception
            raise ModelError(f"the model failed to train on {batch}: {_describe(error)}{advice}") from error
        self._check_written(gradient)
        self._check_unchanged(weights)

    def _check_written(self, gradient: FloatArray) -> None:
        missing = gradient.view(np.uint32) == UNWRITTEN
        for name, unwritten in self.layout.views(missing).items():
            if unwritten.any():
                raise ModelError(
                    f"the model's loss_and_gradient wrote {unwritten.size - unwritten.sum()} of the {unwritten.size} "
                    f"values of gradient {name!r}: write every value into the given array, by "
                    f"gradient[{name!r}][...] = ... (without [...] the assignment only replaces the array in the dict, "
                    "and += adds to undefined values)"
                )

    def _check_unchanged(self, weights: FloatArray) -> None:
        changed = weights.view(np.uint32) != self.weights.view(np.uint32)
        for name, different in self.layout.views(changed).items():
            if different.any():
                raise ModelError(
                    f"the model's loss_and_gradient changed the weights {name!r} that it was given: copy them first. "
                    "Only the servers change weights, from the gradients"
                )

    def _predict(self, rows: NDArray[np.int64]) -> None:
        train = self.dataset.train
        try:
            outputs = self.model.predict(self.layout.views(self.weights.copy()), train.inputs(rows))
        except Exception as error:  # the user's model may raise any exception
            raise ModelError(
                f"the model failed to predict the first batch ({counted(len(rows), 'example')} of shape "
                f"{list(train.features.shape[1:])}): {_describe(error)}"
            ) from error
        self._check_outputs(np.shape(outputs), len(rows))

    def _check_outputs(self, shape: Sequence[int], rows: int) -> None:
        needed, meaning = self._needed_outputs()
        found = shape[1] if len(shape) == 2 and shape[0] == rows else 0
        may_have_more = self.loss in ("cross_entropy", None)  # outputs for classes that are not in the data
        is_one_logit = self.loss is None and needed == 2 and found == 1  # above 0: the second class
        if found != needed and not (may_have_more and found > needed) and not is_one_logit:
            raise ModelError(
                f"the model's outputs do not fit the labels: for {counted(rows, 'example')} their shape is "
                f"{list(shape)}, expected {[rows, needed]}, {meaning}. Give the model's last layer that many outputs, "
                "or choose another loss"
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
        # The fewest rows that `evaluate` predicts at a time.
        last = len(validation) % ROWS_AT_ONCE or min(len(validation), ROWS_AT_ONCE)
        try:
            evaluate(self.model, self.layout.views(self.weights.copy()), validation[-last:])
        except Exception as error:  # the user's model may raise any exception
            raise ModelError(
                f"the model failed to evaluate {counted(last, 'example')} of the validation part: {_describe(error)}"
            ) from error


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"


def _listed(classes: Sequence[str]) -> str:
    return ", ".join(classes) if len(classes) <= 4 else f"{', '.join(classes[:2])}, ..., {classes[-1]}"
