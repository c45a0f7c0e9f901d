"""Distributions of the time that a simulated worker takes for a gradient, built from a job's `simulate.delays`.

Published experiments use `gamma:100,0.01` (Zhang et al., 2016) and `linear:1,1` (Ringmaster, 2025).
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
from psgd_workers.counting import counted

__all__ = ["Constant", "Delays", "Exponential", "Gamma", "Linear", "Lognormal", "Measured", "Slow", "build_delays"]

BLOCK = 256  # times drawn together; more → cheaper draws, and more of them are never used
SHORTEST = float(np.finfo(np.float64).tiny)  # seconds; replaces times that underflow to 0, as with a small gamma shape

Times = NDArray[np.float64]  # [number], seconds


class Delays(Protocol):
    """A distribution of the time that a gradient takes."""

    def source(self, worker: int, workers: int, seed: int) -> Callable[[], float]:
        """Return a function that draws the times of one worker, one per call.

        The stream depends only on `seed` and `worker`; `Slow` also depends on `workers`.

        Args:
            worker: number of the worker, from 0.
            workers: number of workers in the simulation.
            seed: seed that all workers share.

        Returns:
            A function that returns the next time, in virtual seconds and above 0.
        """


@dataclass(frozen=True, slots=True)
class Constant:
    """The same time for every gradient."""

    seconds: float  # virtual

    def source(self, worker: int, workers: int, seed: int) -> Callable[[], float]:
        del worker, workers, seed
        return repeat(self.seconds).__next__


@dataclass(frozen=True, slots=True)
class Exponential:
    """Exponential (memoryless) times."""

    mean: float  # seconds

    def source(self, worker: int, workers: int, seed: int) -> Callable[[], float]:
        del workers
        return _stream(worker, seed, lambda rng: rng.exponential(self.mean, BLOCK))


@dataclass(frozen=True, slots=True)
class Lognormal:
    """Times whose logarithm is normal; the median is exp(mu)."""

    mu: float  # mean of the logarithm of the seconds
    sigma: float  # standard deviation of the logarithm; higher → longer tail

    def source(self, worker: int, workers: int, seed: int) -> Callable[[], float]:
        del workers
        return _stream(worker, seed, lambda rng: rng.lognormal(self.mu, self.sigma, BLOCK))


@dataclass(frozen=True, slots=True)
class Gamma:
    """Gamma times with mean shape·scale and standard deviation √shape·scale."""

    shape: float
    scale: float  # seconds

    def source(self, worker: int, workers: int, seed: int) -> Callable[[], float]:
        del workers
        return _stream(worker, seed, lambda rng: rng.gamma(self.shape, self.scale, BLOCK))


@dataclass(frozen=True, slots=True)
class Linear:
    """Times that grow with the worker's number.

    Worker i, counted from 1, takes i·slope + |N(0, √(i·spread))|, where √(i·spread) is the standard deviation.
    """

    slope: float  # seconds
    spread: float  # seconds²

    def source(self, worker: int, workers: int, seed: int) -> Callable[[], float]:
        del workers
        least = (worker + 1) * self.slope
        deviation = np.sqrt((worker + 1) * self.spread)
        return _stream(worker, seed, lambda rng: least + np.abs(rng.normal(0.0, deviation, BLOCK)))


@dataclass(frozen=True, slots=True)
class Slow:
    """One slow worker: the last worker takes `factor` times as long as `base` says."""

    factor: float
    base: Delays

    def source(self, worker: int, workers: int, seed: int) -> Callable[[], float]:
        take = self.base.source(worker, workers, seed)
        return (lambda: self.factor * take()) if worker == workers - 1 else take


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Compute times of a recorded run's workers, drawn with replacement. Built by `of`."""

    times: tuple[Times, ...]  # one non-empty array for each recorded worker

    @classmethod
    def of(cls, records: NDArray[np.void]) -> Measured:
        """Collect the compute times in a journal, with its workers in the order of their numbers.

        Args:
            records: journal records, with the fields of `psgd.core.server.journal.RECORD`.

        Raises:
            SpecError: no record holds the compute time of a gradient.
        """
        timed = records[
            (records["kind"] == RecordKind.PUSH) & (records["compute_s"] > 0) & np.isfinite(records["compute_s"])
        ]
        names, owners = np.unique(timed["worker"], return_inverse=True)
        if not len(names):
            raise SpecError(
                f"the journal has {counted(len(records), 'record')}, none of which holds the compute time of a "
                "gradient: name a run that trained on at least one batch"
            )
        # In numerical order: worker-2 comes before worker-10.
        numbered = sorted(range(len(names)), key=lambda owner: (len(names[owner]), names[owner]))
        return cls(tuple(timed["compute_s"][owners == owner].astype(np.float64) for owner in numbered))

    def source(self, worker: int, workers: int, seed: int) -> Callable[[], float]:
        del workers
        times = self.times[worker % len(self.times)]
        return _stream(worker, seed, lambda rng: rng.choice(times, BLOCK))


ReadJournal = Callable[[str], NDArray[np.void]]


def _no_journal(path: str) -> NDArray[np.void]:
    raise SpecError(f"measured delays need the journal at {path!r}, and no journal can be read here: use other delays")


def build_delays(spec: DelaysSpec, read_journal: ReadJournal = _no_journal) -> Delays:
    """Return the distribution that a job's delays describe.

    Args:
        spec: the job's delays.
        read_journal: function that returns the records of the journal at a path; errors that it raises are passed on.

    Raises:
        SpecError: the delays are measured, and the journal holds no compute time.
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
    """Return a function that returns one time per call, from blocks drawn with the worker's own generator."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(worker,)))

    def times() -> Iterator[float]:
        while True:
            yield from np.maximum(draw(rng), SHORTEST).tolist()

    return times().__next__
