"""The turns that threads take in Python, in a process whose threads answer workers."""

from __future__ import annotations

import sys

__all__ = ["TURN_S", "take_short_turns"]

TURN_S = 0.0005  # seconds


def take_short_turns() -> None:
    """Let a thread that runs Python pass on the interpreter after half a millisecond, instead of five.

    A push that compiled code leaves to Python needs the interpreter several times. If other connections keep it busy,
    each time costs one turn of each of them.
    """
    sys.setswitchinterval(TURN_S)
