"""What a model must answer. A user's own model is any object that keeps this protocol."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from psgd_workers.messages import FloatArray

__all__ = ["Model", "ModelWithBuffers"]


class Model(Protocol):
    """A differentiable model over named float32 tensors; it keeps no weights of its own.

    Shapes: `features` is `[batch, *example_shape]` float32; `labels` is `[batch]` int64 for classes, or
    `[batch, targets]` float32 for a regression; outputs are `[batch, num_outputs]` float32.
    """

    def initial_weights(self, seed: int) -> Mapping[str, FloatArray]:
        """The named tensors that training starts from: a function of `seed` alone."""

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
            weights: the tensors, read-only in spirit: views of a buffer that the next pull overwrites.
            features: the batch's examples.
            labels: the batch's labels.
            gradient: where the gradient of the batch's *mean* loss is written, every element of every tensor.
                For a buffer of the model: the value read minus the new value.
            seed: of this batch, for layers that draw at random; the same batch always has the same seed.

        Returns:
            The mean loss over the batch.
        """

    def predict(self, weights: Mapping[str, FloatArray], features: FloatArray) -> FloatArray:
        """Outputs without training-time randomness: logits for a classifier, values for a regression."""

    def loss(self, outputs: FloatArray, labels: NDArray[Any]) -> float:
        """The mean loss of outputs that `predict` returned."""


@runtime_checkable
class ModelWithBuffers(Protocol):
    """A model some of whose tensors change without a gradient: each push moves them by rate 1, b <- b - (b - b')."""

    buffers: Collection[str]
