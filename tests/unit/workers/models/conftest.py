"""Fixtures for the tests of models."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


def central_differences(function: Callable[[], float], at: NDArray[Any], step: float = 1e-6) -> Doubles:
    """Return ∂function/∂at by central differences: each element of `at` is moved in place and restored."""
    slopes = np.empty(at.shape)
    for index in np.ndindex(at.shape):
        middle = at[index]
        at[index] = middle + step
        above = function()
        at[index] = middle - step
        slopes[index] = (above - function()) / (2 * step)
        at[index] = middle
    return slopes


@pytest.fixture
def numerical_gradient() -> Callable[[Callable[[], float], NDArray[Any]], Doubles]:
    return central_differences


@pytest.fixture
def users_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An importable module `users_own.models`. Tests set model factories as its attributes."""
    module = ModuleType("users_own.models")
    monkeypatch.setitem(sys.modules, "users_own", ModuleType("users_own"))
    monkeypatch.setitem(sys.modules, "users_own.models", module)
    return module
