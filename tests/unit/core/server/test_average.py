from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from psgd.core.server.average import Average
from psgd.core.server.optimizers import BLOCK


def walk(size: int, steps: int) -> list[np.ndarray[tuple[int], np.dtype[np.float32]]]:
    """Return random weights after each step."""
    rng = np.random.default_rng(0)
    return list(np.cumsum(rng.standard_normal((steps, size), dtype=np.float32), axis=0))


@pytest.mark.parametrize("size", [1, 6, BLOCK + 7])
def test_it_is_torchs_once_the_start_is_forgotten(size: int) -> None:
    start, *path = walk(size, 40)
    late = 890  # from step (10 d - 1) / (1 - d) on, the decay is d itself
    ours = Average(0.99, start)
    module = torch.nn.Linear(size, 1, bias=False)
    decay = get_ema_avg_fn(0.99)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(start))
        theirs: Any = AveragedModel(module, avg_fn=decay)
        theirs.update_parameters(module)  # the first update copies the weights
        for steps, weights in enumerate(path, late):
            ours.update(weights, steps)
            module.weight.copy_(torch.from_numpy(weights))
            theirs.update_parameters(module)
    expected = theirs.module.weight.detach().numpy()[0]
    np.testing.assert_allclose(ours.values, expected, rtol=1e-5, atol=1e-5)


def test_early_steps_weigh_more_than_the_start() -> None:
    start, *path = walk(6, 10)
    average = Average(0.99, start)
    expected = start.copy()
    for steps, weights in enumerate(path, 1):
        average.update(weights, steps)
        decay = (1 + steps) / (10 + steps)
        expected = decay * expected + (1 - decay) * weights
    np.testing.assert_allclose(average.values, expected, rtol=1e-5, atol=1e-6)


def test_it_begins_as_a_copy() -> None:
    start = np.ones(3, np.float32)
    average = Average(0.5, start)
    start[:] = 9
    np.testing.assert_array_equal(average.values, [1, 1, 1])
