"""The core run for real; the only place that imports Ray."""
