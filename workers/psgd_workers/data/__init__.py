"""From a `DataSpec` to checked, normalised arrays."""

from psgd_workers.data.examples import Dataset, Examples
from psgd_workers.data.opening import open_dataset

__all__ = ["Dataset", "Examples", "open_dataset"]
