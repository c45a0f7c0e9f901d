"""MNIST in memory for every peer, so that none is faster because of its data loading."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from psgd_workers.messages import FloatArray
from tests.benchmarks.setting import BATCH_SIZE

__all__ = ["Batches", "Mnist", "mnist_path"]


def mnist_path() -> Path:
    """Return the path of `mnist.npz`: in `$PSGD_TEST_DATA`, or else in `shared/data` beside the repository."""
    folder = os.environ.get("PSGD_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")
    return Path(folder).resolve() / "mnist.npz"


@dataclass(frozen=True, slots=True)
class Mnist:
    """The training and the test part of MNIST."""

    train_features: FloatArray  # [60000, 784], in [0, 1]
    train_labels: NDArray[np.int64]  # [60000]
    test_features: FloatArray  # [10000, 784], in [0, 1]
    test_labels: NDArray[np.int64]  # [10000]

    @classmethod
    def load(cls) -> Mnist:
        """Read the file of `mnist_path`."""
        with np.load(mnist_path()) as arrays:
            return cls(
                _unit(arrays["x_train"]),
                arrays["y_train"].astype(np.int64),
                _unit(arrays["x_test"]),
                arrays["y_test"].astype(np.int64),
            )


class Batches:
    """Endless batches of the training examples; the order of each epoch depends only on the seed and the epoch."""

    def __init__(self, data: Mnist, seed: int, size: int = BATCH_SIZE) -> None:
        self._data = data
        self._seed = seed
        self._size = size
        self._per_epoch = -(-len(data.train_labels) // size)
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def __getitem__(self, index: int) -> tuple[FloatArray, NDArray[np.int64]]:
        """Return a batch's features and labels. Batches are counted through all epochs; an epoch's last is shorter."""
        epoch, position = divmod(index, self._per_epoch)
        if epoch != self._epoch:
            self._order = np.random.default_rng((self._seed, epoch)).permutation(len(self._data.train_labels))
            self._epoch = epoch
        rows = self._order[position * self._size : (position + 1) * self._size]
        return self._data.train_features[rows], self._data.train_labels[rows]


def _unit(images: NDArray[np.uint8]) -> FloatArray:
    return images.reshape(len(images), -1).astype(np.float32) / np.float32(255)
