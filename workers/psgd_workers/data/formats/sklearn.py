"""Reads the small data sets that are part of scikit-learn."""

from __future__ import annotations

from psgd_workers.data.raw import RawArray, RawData, RawPart
from psgd_workers.errors import MissingExtraError
from psgd_workers.spec import SklearnData

__all__ = ["read_sklearn"]


def read_sklearn(spec: SklearnData) -> RawData:
    """Read one of scikit-learn's data sets, with the names of its classes.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingExtraError(
            f"data set {spec.dataset!r} is part of scikit-learn, which is not installed: pip install 'psgd[data]'"
        ) from error
    found = getattr(datasets, f"load_{spec.dataset}")()
    names = found.get("target_names")
    return RawData(
        (
            RawPart(
                RawArray(f"{spec.dataset}: features", found.data), RawArray(f"{spec.dataset}: labels", found.target)
            ),
        ),
        None if names is None else tuple(str(name) for name in names),
    )
