"""What people look at: the run directory, metrics, progress."""
