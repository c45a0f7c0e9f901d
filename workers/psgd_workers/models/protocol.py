"""The port that every model implements. A user's own model is any object with these methods."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from psgd_workers.messages import FloatArray

__all__ = ["Model", "ModelWithBuffers"]


class Model(Protocol):
    """A differentiable model over named float32 tensors. It keeps no weights.

    Shapes: `features` is `[batch, *example_shape]` float32; `labels` is `[batch]` int64 for classes, or
    `[batch, targets]` float32 for a regression; outputs are `[batch, num_outputs]` float32.
    """

    def initial_weights(self, seed: int) -> Mapping[str, FloatArray]:
        """Return the named tensors that training starts from. They must be a function of `seed` alone."""

    def loss_and_gradient(
        self,
        weights: Mapping[str, FloatArray],
        features: FloatArray,
        labels: NDArray[Any],
        gradient: Mapping[str, FloatArray],
        seed: int,
    ) -> float:
        """Backpropagate one batch.

        Args:
            weights: named tensors, not to be written to: they are views of a buffer that the next pull overwrites.
            features: the batch's examples, as a copy that the model may change in place.
            labels: the batch's labels.
            gradient: named tensors to overwrite with the gradient of the batch's *mean* loss, every element of every
                tensor. For a buffer of the model: the value read minus the new value.
            seed: seed of this batch for layers that draw at random. The same batch always has the same seed.

        Returns:
            The mean loss over the batch.
        """

    def predict(self, weights: Mapping[str, FloatArray], features: FloatArray) -> FloatArray:
        """Return the outputs without training-time randomness: logits for a classifier, values for a regression."""

    def loss(self, outputs: FloatArray, labels: NDArray[Any]) -> float:
        """Return the mean loss of outputs that `predict` returned."""


@runtime_checkable
class ModelWithBuffers(Protocol):
    """A model with buffers: tensors that change without a gradient. A push moves a buffer b to its new value b' by
    b ← b - (b - b')."""

    buffers: Collection[str]
