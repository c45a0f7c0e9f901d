"""The interface of a model. A user's own model is any object with these methods."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from psgd_workers.messages import FloatArray

__all__ = ["Model", "ModelWithBuffers"]


class Model(Protocol):
    """A differentiable model with named float32 tensors. It keeps no weights: every call receives them.

    Shapes: `features` is `[batch, *example_shape]` float32; `labels` is `[batch]` int64 for classes, or
    `[batch, targets]` float32 for a regression; outputs are `[batch, num_outputs]` float32.
    """

    def initial_weights(self, seed: int) -> Mapping[str, FloatArray]:
        """Return the named tensors that training starts from, a function of `seed` alone."""

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
            weights: named tensors, read-only by contract: views of memory that the next pull overwrites.
            features: the batch's examples, as a copy that the model may change in place.
            labels: the batch's labels.
            gradient: named tensors, of which every element must be overwritten: with the gradient of the batch's *mean*
                loss, or, in a buffer of the model, with the value in `weights` minus the new value.
            seed: seed of this batch for random layers, such as dropout. The same batch always has the same seed.

        Returns:
            The mean loss over the batch.
        """

    def predict(self, weights: Mapping[str, FloatArray], features: FloatArray) -> FloatArray:
        """Return the outputs, without training-time randomness: logits of classes, or values of a regression."""

    def loss(self, outputs: FloatArray, labels: NDArray[Any]) -> float:
        """Return the mean loss of outputs that `predict` returned."""


@runtime_checkable
class ModelWithBuffers(Protocol):
    """A model with buffers: tensors that change without a gradient, such as the running mean of a batch normalisation.

    A push carries b - b' for a buffer that changed from b to b', and the server subtracts it: b ← b - (b - b').
    """

    buffers: Collection[str]
