from __future__ import annotations

import sys

import pytest

from psgd.serving.turns import TURN_S, take_short_turns


def test_threads_take_shorter_turns() -> None:
    before = sys.getswitchinterval()
    try:
        take_short_turns()
        assert sys.getswitchinterval() == pytest.approx(TURN_S)
    finally:
        sys.setswitchinterval(before)
