"""From a `DataSpec` to checked, normalised arrays."""
