"""What a run leaves on disk or in an object store: its directory, events, checkpoints and storage."""
