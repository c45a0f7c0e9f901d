"""Times that imaginary workers take for a gradient, in virtual seconds; built from a job's `simulate.delays`.

Experiment A of the literature (Zhang et al., 2016) is `gamma:100,0.01`, B (Ringmaster, 2025) `linear:1,1`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.journal import RecordKind
from psgd.errors import SpecError
from psgd.spec import (
    ConstantDelays,
    DelaysSpec,
    ExponentialDelays,
    GammaDelays,
    LinearDelays,
    LognormalDelays,
    MeasuredDelays,
    SlowDelays,
)

__all__ = ["Constant", "Delays", "Exponential", "Gamma", "Linear", "Lognormal", "Measured", "Slow", "build_delays"]

BLOCK = 256  # drawn at a time; more → cheaper draws, more of them never used
SHORTEST = float(np.finfo(np.float64).tiny)  # seconds; for what underflows, as a gamma of a small shape does

Times = NDArray[np.float64]  # [number], seconds


class Delays(Protocol):
    """How long gradients take."""

    def source(self, worker: int, workers: int, seed: int) -> Callable[[], float]:
        """The times of one worker, one per call.

        The stream depends on `seed` and `worker` alone; only `slow` looks at `workers`.

        Args:
            worker: from 0.
            workers: how many there are.
            seed: of all streams together.

        Returns:
            What gives the next time, in seconds; above 0.
        """


@dataclass(frozen=True, slots=True)
class Constant:
    """Every gradient takes as long."""

    seconds: float

    def source(self, worker: int, workers: int, seed: int) -> Callable[[], float]:
        del worker, workers, seed
        return repeat(self.seconds).__next__


@dataclass(frozen=True, slots=True)
class Exponential:
    """Memoryless."""

    mean: float  # seconds

    def source(self, worker: int, workers: int, seed: int) -> Callable[[], float]:
        del workers
        return _stream(worker, seed, lambda rng: rng.exponential(self.mean, BLOCK))


@dataclass(frozen=True, slots=True)
class Lognormal:
    """The logarithm is normal; the median is exp(mu)."""

    mu: float  # mean of the logarithm of the seconds
    sigma: float  # standard deviation of it; higher → longer tail

    def source(self, worker: int, workers: int, seed: int) -> Callable[[], float]:
        del workers
        return _stream(worker, seed, lambda rng: rng.lognormal(self.mu, self.sigma, BLOCK))


@dataclass(frozen=True, slots=True)
class Gamma:
    """Mean shape·scale, standard deviation √shape·scale."""

    shape: float
    scale: float  # seconds

    def source(self, worker: int, workers: int, seed: int) -> Callable[[], float]:
        del workers
        return _stream(worker, seed, lambda rng: rng.gamma(self.shape, self.scale, BLOCK))


@dataclass(frozen=True, slots=True)
class Linear:
    """Worker i, from 1, takes i·slope + |N(0, √(i·spread))|; √(i·spread) is the standard deviation."""

    slope: float  # seconds
    spread: float  # seconds²

    def source(self, worker: int, workers: int, seed: int) -> Callable[[], float]:
        del workers
        least = (worker + 1) * self.slope
        deviation = np.sqrt((worker + 1) * self.spread)
        return _stream(worker, seed, lambda rng: least + np.abs(rng.normal(0.0, deviation, BLOCK)))


@dataclass(frozen=True, slots=True)
class Slow:
    """The last worker takes `factor` times as long as `base` says."""

    factor: float
    base: Delays

    def source(self, worker: int, workers: int, seed: int) -> Callable[[], float]:
        take = self.base.source(worker, workers, seed)
        return (lambda: self.factor * take()) if worker == workers - 1 else take


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """What a run's workers took, drawn with replacement; made by `of`."""

    times: tuple[Times, ...]  # of each recorded worker; none is empty

    @classmethod
    def of(cls, records: NDArray[np.void]) -> Measured:
        """The compute times in a journal; its workers in the order of their numbers.

        Args:
            records: of dtype `psgd.core.server.journal.RECORD`.

        Raises:
            SpecError: no gradient's time is among them.
        """
        timed = records[
            (records["kind"] == RecordKind.PUSH) & (records["compute_s"] > 0) & np.isfinite(records["compute_s"])
        ]
        names, owners = np.unique(timed["worker"], return_inverse=True)
        if not len(names):
            raise SpecError(f"no gradient's compute time is among the {len(records)} records of the journal")
        numbered = sorted(range(len(names)), key=lambda owner: (len(names[owner]), names[owner]))  # 2 before 10
        return cls(tuple(timed["compute_s"][owners == owner].astype(np.float64) for owner in numbered))

    def source(self, worker: int, workers: int, seed: int) -> Callable[[], float]:
        del workers
        times = self.times[worker % len(self.times)]
        return _stream(worker, seed, lambda rng: rng.choice(times, BLOCK))


ReadJournal = Callable[[str], NDArray[np.void]]


def _no_journal(path: str) -> NDArray[np.void]:
    raise SpecError(f"no journal can be read here, so none at {path!r}")


def build_delays(spec: DelaysSpec, read_journal: ReadJournal = _no_journal) -> Delays:
    """Return the times that a job's delays describe.

    Args:
        spec: the delays.
        read_journal: returns the records of the journal at a path. Its errors are passed on.

    Raises:
        SpecError: the journal holds no compute times.
    """
    if isinstance(spec, SlowDelays):
        return Slow(spec.factor, build_delays(spec.base, read_journal))
    if isinstance(spec, MeasuredDelays):
        return Measured.of(read_journal(spec.path))
    return _BUILDERS[type(spec)](spec)


_BUILDERS: Mapping[type[Any], Callable[[Any], Delays]] = {
    ConstantDelays: lambda spec: Constant(spec.seconds),
    ExponentialDelays: lambda spec: Exponential(spec.mean),
    LognormalDelays: lambda spec: Lognormal(spec.mu, spec.sigma),
    GammaDelays: lambda spec: Gamma(spec.shape, spec.scale),
    LinearDelays: lambda spec: Linear(spec.slope, spec.spread),
}


def _stream(worker: int, seed: int, draw: Callable[[np.random.Generator], Times]) -> Callable[[], float]:
    """What gives one time after another, of blocks that `draw` makes with a generator of the worker's own."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(worker,)))

    def times() -> Iterator[float]:
        while True:
            yield from np.maximum(draw(rng), SHORTEST).tolist()

    return times().__next__
