"""Tests of what is read from /proc, on this process and on made-up texts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.benchmarks.processes import Memory, descendants, memory, parent, title

ROLLUP = """5581c9a5b000-7ffd3c5f3000 ---p 00000000 00:00 0                          [rollup]
Rss:               10000 kB
Pss:                5000 kB
Pss_Anon:           2000 kB
Pss_File:           2500 kB
Pss_Shmem:           500 kB
"""


def test_a_name_with_blanks_and_brackets_does_not_hide_the_parent() -> None:
    assert parent("17 (ray::IDLE (a) b) S 4 17 17 0") == 4


def test_memory_is_read_in_megabytes() -> None:
    found = Memory.of_rollup(ROLLUP)
    assert found == pytest.approx((10.24, 5.12, 2.56))


def test_this_process_holds_memory_of_its_own_and_shares_some() -> None:
    found = memory(os.getpid())
    assert 0 < found.own < found.pss <= found.rss


def test_a_child_is_found_by_its_parent_and_its_title() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert child.pid in descendants(os.getpid())
        assert title(child.pid) == sys.executable
        child.communicate(b"\n")
    assert child.pid not in descendants(os.getpid())
    assert title(child.pid) == ""
