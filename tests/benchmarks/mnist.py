"""MNIST as every peer sees it, so that none is faster for its data loading."""

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
    """Where `mnist.npz` lies: in `$PSGD_TEST_DATA`, or in `shared/data` beside the repository."""
    folder = os.environ.get("PSGD_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")
    return Path(folder).resolve() / "mnist.npz"


@dataclass(frozen=True, slots=True)
class Mnist:
    """Both parts of the data set, in memory."""

    train_features: FloatArray  # [60000, 784], in [0, 1]
    train_labels: NDArray[np.int64]  # [60000]
    test_features: FloatArray  # [10000, 784], in [0, 1]
    test_labels: NDArray[np.int64]  # [10000]

    @classmethod
    def load(cls) -> Mnist:
        with np.load(mnist_path()) as arrays:
            return cls(
                _unit(arrays["x_train"]),
                arrays["y_train"].astype(np.int64),
                _unit(arrays["x_test"]),
                arrays["y_test"].astype(np.int64),
            )


class Batches:
    """The training examples in batches, without end; each epoch is one shuffle of them all, f(seed, epoch)."""

    def __init__(self, data: Mnist, seed: int, size: int = BATCH_SIZE) -> None:
        self._data = data
        self._seed = seed
        self._size = size
        self._per_epoch = -(-len(data.train_labels) // size)
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def __getitem__(self, index: int) -> tuple[FloatArray, NDArray[np.int64]]:
        """Features and labels of a batch, counted from 0 through all epochs; an epoch's last one may be short."""
        epoch, place = divmod(index, self._per_epoch)
        if epoch != self._epoch:
            self._order = np.random.default_rng((self._seed, epoch)).permutation(len(self._data.train_labels))
            self._epoch = epoch
        rows = self._order[place * self._size : (place + 1) * self._size]
        return self._data.train_features[rows], self._data.train_labels[rows]


def _unit(images: NDArray[np.uint8]) -> FloatArray:
    return images.reshape(len(images), -1).astype(np.float32) / np.float32(255)
