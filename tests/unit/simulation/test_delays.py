from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from math import exp, pi, sqrt

import numpy as np
import pytest
from numpy.typing import NDArray

from psgd.core.server.journal import RECORD, RecordKind
from psgd.errors import RunNotFoundError, SpecError
from psgd.simulation.delays import (
    Constant,
    Delays,
    Exponential,
    Gamma,
    Linear,
    Lognormal,
    Measured,
    Slow,
    build_delays,
)
from psgd.spec import SimulateConfig

CONSTANT: list[Delays] = [Constant(2.5), Slow(20, Constant(1))]
MODELS: list[Delays] = [
    *CONSTANT,
    Exponential(0.3),
    Lognormal(-1.0, 0.5),
    Gamma(100, 0.01),
    Linear(1, 1),
    Slow(3, Exponential(1)),
]
by_name = pytest.mark.parametrize("delays", MODELS, ids=str)


def build(text: str, *reader: Callable[[str], NDArray[np.void]]) -> Delays:
    return build_delays(SimulateConfig.model_validate({"delays": text}).delays, *reader)


def take(delays: Delays, number: int, worker: int = 0, workers: int = 8, seed: int = 5) -> list[float]:
    """Return the first times of a worker."""
    return list(islice(iter(delays.source(worker, workers, seed), None), number))


def journal(*pushes: tuple[bytes, float], kind: RecordKind = RecordKind.PUSH) -> NDArray[np.void]:
    """Return journal records of one kind, each from (worker, compute_s)."""
    records = np.zeros(len(pushes), RECORD)
    records["kind"] = kind
    for record, (worker, compute_s) in zip(records, pushes, strict=True):
        record["worker"] = worker
        record["compute_s"] = compute_s
    return records


@pytest.mark.parametrize(
    ("delays", "worker", "mean", "deviation"),
    [
        (Constant(2.5), 0, 2.5, 0),
        (Exponential(0.3), 0, 0.3, 0.3),
        (Lognormal(-1, 0.5), 0, exp(-1 + 0.125), exp(-1 + 0.125) * sqrt(exp(0.25) - 1)),
        (Gamma(100, 0.01), 0, 1.0, 0.1),
        (Linear(1, 1), 3, 4 + 2 * sqrt(2 / pi), 2 * sqrt(1 - 2 / pi)),
        (Linear(2, 0), 3, 8, 0),
        (Slow(20, Constant(1)), 7, 20, 0),
        (Slow(20, Constant(1)), 6, 1, 0),
        (Slow(3, Exponential(1)), 7, 3, 3),
    ],
    ids=str,
)
def test_mean_and_deviation_are_those_of_the_distribution(
    delays: Delays, worker: int, mean: float, deviation: float
) -> None:
    times = np.array(take(delays, 40_000, worker))
    assert abs(times.mean() - mean) <= 4 * deviation / sqrt(len(times))
    assert times.std() == pytest.approx(deviation, rel=0.05, abs=1e-12)


@by_name
def test_the_seed_and_the_worker_decide_the_times(delays: Delays) -> None:
    assert take(delays, 600) == take(delays, 600)
    assert take(delays, 600, workers=8) == take(delays, 600, workers=1000)


@pytest.mark.parametrize("delays", [delays for delays in MODELS if delays not in CONSTANT], ids=str)
def test_workers_and_seeds_are_independent(delays: Delays) -> None:
    mine = take(delays, 5000)
    others = [take(delays, 5000, worker=1), take(delays, 5000, seed=6)]
    for other in others:
        assert not set(mine) & set(other)
        assert abs(np.corrcoef(mine, other)[0, 1]) < 4 / sqrt(5000)


def test_workers_take_turns_without_changing_each_others_times() -> None:
    delays = Exponential(1)
    first = delays.source(0, 2, 5)
    second = delays.source(1, 2, 5)
    turns = [(first(), second()) for _ in range(600)]
    assert [mine for mine, _ in turns] == take(delays, 600)


@pytest.mark.parametrize("delays", [*MODELS, Gamma(1e-3, 1), Lognormal(-20, 10), Lognormal(20, 10)], ids=str)
def test_times_are_positive_and_finite(delays: Delays) -> None:
    times = np.array(take(delays, 5000, worker=7))
    assert (times > 0).all()
    assert np.isfinite(times).all()


@pytest.mark.parametrize(
    ("text", "delays"),
    [
        ("constant:1", Constant(1)),
        ("exponential:.5", Exponential(0.5)),
        ("lognormal:0,1", Lognormal(0, 1)),
        ("gamma:100,0.01", Gamma(100, 0.01)),
        ("linear:1,0", Linear(1, 0)),
        ("slow:20", Slow(20, Constant(1))),
        ("slow:20,exponential,1", Slow(20, Exponential(1))),
    ],
)
def test_each_distribution_is_built(text: str, delays: Delays) -> None:
    assert build(text) == delays


def test_measured_draws_what_the_recorded_worker_took() -> None:
    recorded = journal((b"worker-10", 0.5), (b"worker-2", 0.25), (b"worker-2", 0.75), (b"worker-2", 0.75))
    delays = Measured.of(recorded)
    times = [take(delays, 3000, worker) for worker in range(4)]
    assert [set(taken) for taken in times] == [{0.25, 0.75}, {0.5}, {0.25, 0.75}, {0.5}]
    assert times[0].count(0.75) == pytest.approx(2000, abs=4 * sqrt(3000 * 2 / 9))
    assert times[0] != times[2]


def test_measured_leaves_out_what_is_no_gradients_time() -> None:
    joins = journal((b"worker-0", 9.0), kind=RecordKind.JOIN)
    zero = journal((b"worker-0", 0.0), (b"worker-3", np.nan))
    delays = Measured.of(np.concatenate([joins, zero, journal((b"worker-1", 0.125))]))
    assert set(take(delays, 300)) == {0.125}
    with pytest.raises(
        SpecError, match="the journal has 3 records, none of which holds the compute time of a gradient"
    ):
        Measured.of(np.concatenate([joins, zero]))


def test_measured_asks_for_the_journal_at_the_path() -> None:
    asked: list[str] = []

    def read(path: str) -> NDArray[np.void]:
        asked.append(path)
        return journal((b"worker-1", 0.5))

    assert take(build("measured:s3://runs/a,b:1", read), 2) == [0.5, 0.5]
    assert take(build("slow:2,measured,runs/a", read), 1, worker=7) == [1.0]
    assert asked == ["s3://runs/a,b:1", "runs/a"]


def test_a_run_that_is_not_there_is_said_as_the_reader_says_it() -> None:
    def read(path: str) -> NDArray[np.void]:
        raise RunNotFoundError(f"there is no run in {path}")

    with pytest.raises(RunNotFoundError, match="there is no run in runs/a"):
        build("measured:runs/a", read)


def test_a_journal_is_read_only_where_one_can_be() -> None:
    with pytest.raises(SpecError, match="need the journal at 'runs/a', and no journal can be read here"):
        build("measured:runs/a")
