"""Splits the examples into a training part and a validation part."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from psgd_workers.data.examples import Examples
from psgd_workers.data.memory import check_memory
from psgd_workers.errors import DataError

__all__ = ["split_validation"]

SPAWN_KEY = (0,)  # distinguishes this random stream from those of `Shards`, whose keys have another length


def split_validation(examples: Examples, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """Draw a validation part at random from the examples. Both parts keep the order of the file.

    Args:
        examples: at least two examples.
        fraction: share of the examples in the validation part, in (0, 1), rounded so that neither part is empty.
        seed: seed of the job, not negative.

    Returns:
        The training part and the validation part.

    Raises:
        DataError: there is only one example, or a copy of the examples does not fit into memory.
    """
    if len(examples) < 2:
        raise DataError("the data has one example, which cannot be split: drop validation_fraction, or give more data")
    check_memory("the data, split into two parts,", examples.features.nbytes + examples.labels.nbytes)
    size = min(max(round(fraction * len(examples)), 1), len(examples) - 1)
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=SPAWN_KEY))
    chosen = np.zeros(len(examples), np.bool_)
    chosen[generator.permutation(len(examples))[:size]] = True
    return _select(examples, ~chosen), _select(examples, chosen)


def _select(examples: Examples, mask: NDArray[np.bool_]) -> Examples:
    return replace(examples, features=examples.features[mask], labels=examples.labels[mask])
