"""Models in NumPy, with backward passes of our own."""
