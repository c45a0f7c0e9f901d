"""Groups of processes that start and end together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from typing import Concatenate, ParamSpec, TypeVar

__all__ = ["ONE_THREAD", "SPAWN", "process_group", "run_process_group", "take"]

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
SPAWN = get_context("spawn")

Given = ParamSpec("Given")
Answer = TypeVar("Answer")
Work = Callable[Concatenate[int, Given], Answer]


@contextmanager
def process_group(
    size: int, work: Work[Given, Answer], *args: Given.args, **kwargs: Given.kwargs
) -> Iterator[Callable[[], list[Answer]]]:
    """Run `work(rank, ...)` in a process for each rank, with one thread for BLAS, while the block lasts.

    Yields:
        A function that waits for the answers and returns them by rank. It raises SystemExit if a process ended without
        an answer; the stderr of that process says why.
    """
    os.environ.update(ONE_THREAD)  # BLAS reads these variables when a process loads NumPy
    with ExitStack() as stack:
        ends = [SPAWN.Pipe(duplex=False) for _ in range(size)]
        for rank, (_, answer) in enumerate(ends):
            process = SPAWN.Process(target=_answer, args=(answer, work, rank, args, kwargs), daemon=True)
            process.start()
            stack.callback(process.join)
            stack.callback(process.terminate)
            answer.close()  # so that `recv` raises EOFError if the process dies

        def answers() -> list[Answer]:
            try:
                return [answer.recv() for answer, _ in ends]
            except EOFError:
                raise SystemExit(1) from None

        yield answers


def run_process_group(size: int, work: Work[Given, Answer], *args: Given.args, **kwargs: Given.kwargs) -> list[Answer]:
    """Run `work(rank, ...)` in a process for each rank as `process_group` does, and return the answers by rank."""
    with process_group(size, work, *args, **kwargs) as answers:
        return answers()


def take(counter: Synchronized[int]) -> int:
    """Return the next number of a counter; each number is given to one process only."""
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    return number


def _answer(
    answer: Connection, work: Callable[..., object], rank: int, args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    answer.send(work(rank, *args, **kwargs))
