from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

SIZE = 1 << 20
THREADS = 8
PROGRAM = f"""
import os, sys, threading
import numpy as np
from psgd.serving.malloc import return_large_blocks

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def copy():
    large = np.ones({SIZE}, np.uint8)
    barrier.wait()
    del large
    barrier.wait()

if sys.argv[1] == "returned":
    return_large_blocks()
for _ in range(2):  # when the first one is freed, the C library begins to keep such blocks
    np.ones({SIZE}, np.uint8)
before = resident()
barrier = threading.Barrier({THREADS} + 1)
threads = [threading.Thread(target=copy) for _ in range({THREADS})]
for thread in threads:
    thread.start()
barrier.wait()
barrier.wait()
print(resident() - before)
for thread in threads:
    thread.join()
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no such setting")
@pytest.mark.parametrize(("how", "returned"), [("returned", True), ("kept", False)])
def test_large_blocks_are_given_back_when_they_are_freed(how: str, returned: bool) -> None:
    # Settings of malloc in the environment would outrank those that are tested.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROGRAM, how]
    grown = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60)
    assert (int(grown.stdout) < SIZE * THREADS / 4) is returned
