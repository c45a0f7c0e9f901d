"""Models: NumPy layers and their backward passes, and adapters for the user's own."""
