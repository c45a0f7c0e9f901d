"""Parameter-server SGD on Ray.

Example:
    >>> import psgd
    >>> result = psgd.train(psgd.JobSpec(...))
    >>> weights = psgd.load_weights(result.path)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psgd.cluster.run import train
    from psgd.result import Result
    from psgd.spec import JobSpec
    from psgd.store.checkpoints import load_weights

__all__ = ["JobSpec", "Result", "__version__", "load_weights", "train"]

_HOMES = {
    "JobSpec": "psgd.spec",
    "Result": "psgd.result",
    "load_weights": "psgd.store.checkpoints",
    "train": "psgd.cluster.run",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `psgd --help` loads neither Ray nor pydantic."""
    if name == "__version__":
        from importlib.metadata import version

        return version("psgd")
    if name not in _HOMES:
        raise AttributeError(f"module 'psgd' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
