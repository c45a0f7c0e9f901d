"""The coordinator of a run and the records on which it bases its decisions: events in, actions out."""
