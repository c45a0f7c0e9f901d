"""The coordinator of a run, and what it decides from: events in, actions out."""
