"""Replay: recomputes a run from its journal, to compare its weights bit for bit."""
