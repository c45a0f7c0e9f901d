"""Cost of one slow worker: `python -m tests.benchmarks.stragglers`.

Four workers sleep 20 ms for each batch; then one of them sleeps 200 ms. If no worker waits for the slow one, the speed
of 3.1 workers remains, 3.1 / 4 of the full speed. Measured are psgd, async, on a real Ray, within one long epoch and
over two epochs of 9 seconds, at whose ends all wait for the last batches of the slow worker; and PyTorch's DDP on gloo,
whose processes step together and take their batches from a shared counter.
"""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch
from torch import nn

import psgd
from tests.benchmarks.command import begin, conclude, parser
from tests.benchmarks.findings import Finding, ratio
from tests.benchmarks.measurement import Span
from tests.benchmarks.mnist import Batches, Mnist, mnist_path
from tests.benchmarks.network import backpropagate
from tests.benchmarks.peers.ddp_gloo import World, in_lock_step
from tests.benchmarks.peers.psgd_job import check_lanes
from tests.benchmarks.process_group import run_process_group
from tests.benchmarks.setting import LEARNING_RATE, SIZES

__all__ = ["findings", "main"]

WORKERS = 4
SLEEP_S = 0.02
SLOW_S = 0.2
LEFT = (WORKERS - 1 + SLEEP_S / SLOW_S) / WORKERS  # remaining share of the speed if no worker waits for the slow one
TARGET = 0.95 * LEFT
HIDDEN = 32
BATCH_SIZES = {"long": 8, "short": 32}  # make epochs of 38 s and of 9 s
EPOCHS = 2  # short epochs in a run
COMPARED = "examples/s with one of 4 workers 10 × slower ÷ with none"


def main() -> int:
    """Measure, print the table, write the document."""
    made = parser("stragglers", __doc__)
    made.add_argument(
        "--seconds",
        type=float,
        default=8.0,
        help="seconds of each run that stays within one epoch (default: %(default)s)",
    )
    arguments = made.parse_args()
    begin()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with TemporaryDirectory(prefix="s") as folder:
        ray.init(address="local", num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        try:
            turns = _turns(arguments)
        finally:
            ray.shutdown()
    return conclude("one of four workers ten times slower", findings(turns), arguments, turns)


def findings(turns: Mapping[str, Sequence[float]]) -> list[Finding]:
    """Return the figures.

    Args:
        turns: examples per second in each turn, by method, without (`even`) and with one `slow` worker.
    """
    psgd_, epochs, ddp = ((turns[f"{way} slow"], turns[f"{way} even"]) for way in ("psgd", "psgd epochs", "ddp"))
    return [
        ratio(f"{COMPARED}, psgd async", *psgd_, at_least=TARGET),
        ratio(f"{COMPARED}, psgd async over {EPOCHS} epochs of 9 s", *epochs),
        ratio(f"{COMPARED}, PyTorch DDP on gloo", *ddp),
    ]


def _turns(arguments: Namespace) -> dict[str, list[float]]:
    ways: dict[str, Callable[[float], float]] = {
        "psgd": partial(_psgd, BATCH_SIZES["long"], {"max_time_s": arguments.seconds}),
        "psgd epochs": partial(_psgd, BATCH_SIZES["short"], {"epochs": EPOCHS}),
        "ddp": partial(_ddp, arguments.seconds),
    }
    found: dict[str, list[float]] = {f"{way} {speed}": [] for way in ways for speed in ("even", "slow")}
    for _ in range(arguments.repeats):
        for way, measure in ways.items():
            for speed, slow_s in (("even", SLEEP_S), ("slow", SLOW_S)):
                found[f"{way} {speed}"].append(measure(slow_s))
                print(f"{way}, {speed}: {found[f'{way} {speed}'][-1]:.0f} examples/s", flush=True)
    return found


def _psgd(batch_size: int, limit: dict[str, float], slow_s: float) -> float:
    """Return the examples per second of psgd, from the first applied gradient to the last."""
    with TemporaryDirectory() as folder:
        barrier = Path(folder, "barrier")
        barrier.mkdir()
        kwargs = {
            "inputs": SIZES[0],
            "hidden": HIDDEN,
            "sleep_s": SLEEP_S,
            "slow_s": slow_s,
            "workers": WORKERS,
            "barrier": str(barrier),
        }
        tree: dict[str, Any] = {
            "name": "stragglers",
            "model": {"kind": "python", "path": "tests.benchmarks.sleeping_models:OneSlowWorker", "kwargs": kwargs},
            "data": {"format": "npz", "path": str(mnist_path()), "batch_size": batch_size, "normalize": "unit"},
            "optimizer": {"lr": LEARNING_RATE},
            "scaling": {"workers": WORKERS},
            "checkpoint": {"every_s": None},
            "failure": {"timeout_s": 300.0},  # the first worker waits for the last
            "run": limit | {"storage": folder},
        }
        result = psgd.train(psgd.JobSpec.model_validate(tree), progress=False)
        check_lanes(Path(result.path))
    rate = result.metrics["perf/samples_per_s"]
    assert rate is not None
    return rate


def _ddp(seconds: float, slow_s: float) -> float:
    """Return the examples per second of DDP, from the first step to the last."""
    with TemporaryDirectory() as folder:
        spans = run_process_group(WORKERS, _train, World.of(WORKERS, folder), slow_s, seconds)
    span = Span.over(spans)
    return BATCH_SIZES["long"] * (span.updates - WORKERS) / span.seconds


def _train(rank: int, world: World, slow_s: float, seconds: float) -> Span:
    torch.set_num_threads(1)
    batches = Batches(Mnist.load(), seed=0, size=BATCH_SIZES["long"])
    model = nn.Sequential(nn.Linear(SIZES[0], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, SIZES[-1]))
    sleep_s = slow_s if rank == 0 else SLEEP_S

    def backward(model: nn.Module, batch: int) -> None:
        time.sleep(sleep_s)
        backpropagate(model, *batches[batch])

    return in_lock_step(rank, world, seconds, model, backward)


if __name__ == "__main__":
    sys.exit(main())
