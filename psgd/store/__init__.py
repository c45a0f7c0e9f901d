"""Files of a run, on disk or in an object store: its directory, its events, its checkpoints."""
