"""Processes that start together and are gone together."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Concatenate, ParamSpec, TypeVar

from tests.benchmarks.setting import NUM_WORKERS

__all__ = ["ONE_THREAD", "SPAWN", "run_crew"]

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
SPAWN = get_context("spawn")

Given = ParamSpec("Given")
Answer = TypeVar("Answer")
Work = Callable[Concatenate[int, Given], Answer]


def run_crew(work: Work[Given, Answer], *args: Given.args, **kwargs: Given.kwargs) -> list[Answer]:
    """Run `work(rank, ...)` in a process for each rank, with one thread for BLAS, and collect the answers by rank.

    Raises:
        SystemExit: a process ended without an answer; why is on stderr.
    """
    os.environ.update(ONE_THREAD)  # BLAS reads it when a process first loads NumPy
    with ExitStack() as stack:
        ends = [SPAWN.Pipe(duplex=False) for _ in range(NUM_WORKERS)]
        for rank, (_, answer) in enumerate(ends):
            process = SPAWN.Process(target=_answer, args=(answer, work, rank, args, kwargs), daemon=True)
            process.start()
            stack.callback(process.join)
            stack.callback(process.terminate)
            answer.close()  # so that reading meets the end of the file if the process dies
        try:
            return [answer.recv() for answer, _ in ends]
        except EOFError:
            raise SystemExit(1) from None


def _answer(
    answer: Connection, work: Callable[..., object], rank: int, args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    answer.send(work(rank, *args, **kwargs))
