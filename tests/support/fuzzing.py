"""A reader under damaged files: it reads each of them or refuses it, in little time and memory."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterable

from psgd_workers.errors import InputError

__all__ = ["check_reader"]

MAX_TIME_S = 5.0  # of the processor, for one file
MAX_MEMORY = 200e6  # bytes, without those of the file itself


def check_reader(read: Callable[[bytes], object], files: Iterable[bytes]) -> tuple[int, int]:
    """Read every file. Any error but an `InputError` with a printable message passes on.

    Args:
        read: reader of a file's content, which may check the result.
        files: contents.

    Returns:
        Number of the files that were read, and of those that were refused.
    """
    num_read = 0
    num_refused = 0
    tracemalloc.start()
    try:
        for content in files:
            tracemalloc.reset_peak()
            began = time.process_time()
            try:
                read(content)
                num_read += 1
            except InputError as refusal:
                assert str(refusal).replace("\n", "").isprintable()  # noqa: PT017
                assert len(str(refusal)) < 10_000  # noqa: PT017
                num_refused += 1
            _, peak = tracemalloc.get_traced_memory()
            assert time.process_time() - began < MAX_TIME_S
            assert peak - len(content) < MAX_MEMORY
    finally:
        tracemalloc.stop()
    return num_read, num_refused
