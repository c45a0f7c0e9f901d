"""A run recomputed from its journal, to be compared bit for bit."""
