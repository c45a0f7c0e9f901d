"""The shortest job spec, and the shortest section of every mode."""

from __future__ import annotations

from typing import Any

from psgd.spec import JobSpec

__all__ = ["MINIMAL", "MODES", "mode", "spec"]

MINIMAL: dict[str, Any] = {
    "model": {"kind": "linear"},
    "data": {"format": "sklearn", "dataset": "iris"},
    "optimizer": {"lr": 0.1},
    "run": {"epochs": 1},
    "scaling": {"workers": 4},
}
MODES: dict[str, dict[str, Any]] = {
    "async": {},
    "bsp": {},
    "k_sync": {"k": 2},
    "backup": {"b": 1},
    "ssp": {"s": 1},
    "softsync": {"s": 2},
    "ringmaster": {"r": 2},
    "rennala": {"s": 3},
    "malenia": {"s": 3},
    "ringleader": {},
    "buffered": {"k": 2},
    "local": {"h": 4, "lr": 0.1},
}


def spec(**changes: Any) -> JobSpec:
    """Return the shortest job spec with some sections replaced."""
    return JobSpec.model_validate(MINIMAL | changes)


def mode(name: str, **fields: Any) -> dict[str, Any]:
    """Return the `consistency` section of a mode with some fields replaced."""
    return {"mode": name} | MODES[name] | fields
