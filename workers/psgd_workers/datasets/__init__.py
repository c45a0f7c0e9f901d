"""From a `DataSpec` to checked, normalised arrays."""

from psgd_workers.datasets.examples import Dataset, Examples
from psgd_workers.datasets.opening import open_dataset

__all__ = ["Dataset", "Examples", "open_dataset"]
