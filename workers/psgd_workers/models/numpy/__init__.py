"""Models in NumPy: layers, losses and their backward passes."""
