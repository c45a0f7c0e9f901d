"""How long a simulated worker takes for one gradient, in virtual seconds.

A model of delays is written NAME:ARG,ARG,...; workers count from 1 here:

    constant:SECONDS          every gradient takes as long
    exponential:MEAN          memoryless
    lognormal:MU,SIGMA        exp(N(MU, SIGMA)): mean and standard deviation of the logarithm
    gamma:SHAPE,SCALE         mean SHAPE·SCALE; higher SHAPE → less spread
    linear:SLOPE,SPREAD       worker i takes i·SLOPE + |N(0, √(i·SPREAD))|, √ the standard deviation
    slow:FACTOR               every gradient takes 1, the last worker's FACTOR
    slow:FACTOR,NAME,ARG,...  every gradient as NAME:ARG,... says, the last worker's FACTOR times as long
    measured:PATH             of a journal with k workers, worker i draws from the times of worker (i - 1) mod k + 1

Experiment A of the literature (Zhang et al., 2016) is `gamma:100,0.01`, B (Ringmaster, 2025) `linear:1,1`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from difflib import get_close_matches
from itertools import repeat
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.journal import RecordKind
from psgd.errors import SpecError

__all__ = ["Constant", "Delays", "Exponential", "Gamma", "Linear", "Lognormal", "Measured", "Slow", "parse_delays"]

BLOCK = 256  # drawn at a time; more → cheaper draws, more of them never used
LEAST, MOST = 1e-12, 1e12  # of most parameters: what is drawn stays finite
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

    def __post_init__(self) -> None:
        _check(seconds=self.seconds)

    def source(self, worker: int, workers: int, seed: int) -> Callable[[], float]:
        del worker, workers, seed
        return repeat(self.seconds).__next__


@dataclass(frozen=True, slots=True)
class Exponential:
    """Memoryless."""

    mean: float  # seconds

    def __post_init__(self) -> None:
        _check(mean=self.mean)

    def source(self, worker: int, workers: int, seed: int) -> Callable[[], float]:
        del workers
        return _stream(worker, seed, lambda rng: rng.exponential(self.mean, BLOCK))


@dataclass(frozen=True, slots=True)
class Lognormal:
    """The logarithm is normal; the median is exp(mu)."""

    mu: float  # mean of the logarithm of the seconds
    sigma: float  # standard deviation of it; higher → longer tail

    def __post_init__(self) -> None:
        _check(-20, 20, mu=self.mu)
        _check(LEAST, 10, sigma=self.sigma)

    def source(self, worker: int, workers: int, seed: int) -> Callable[[], float]:
        del workers
        return _stream(worker, seed, lambda rng: rng.lognormal(self.mu, self.sigma, BLOCK))


@dataclass(frozen=True, slots=True)
class Gamma:
    """Mean shape·scale, standard deviation √shape·scale."""

    shape: float
    scale: float  # seconds

    def __post_init__(self) -> None:
        _check(shape=self.shape, scale=self.scale)

    def source(self, worker: int, workers: int, seed: int) -> Callable[[], float]:
        del workers
        return _stream(worker, seed, lambda rng: rng.gamma(self.shape, self.scale, BLOCK))


@dataclass(frozen=True, slots=True)
class Linear:
    """Worker i, from 1, takes i·slope + |N(0, √(i·spread))|; √(i·spread) is the standard deviation."""

    slope: float  # seconds
    spread: float  # seconds²

    def __post_init__(self) -> None:
        _check(slope=self.slope)
        _check(0, spread=self.spread)

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

    def __post_init__(self) -> None:
        _check(factor=self.factor)

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


NUMERIC: dict[str, type[Any]] = {  # models whose parameters are numbers: the fields, in their order
    "constant": Constant,
    "exponential": Exponential,
    "lognormal": Lognormal,
    "gamma": Gamma,
    "linear": Linear,
}
FORMS = {
    **{name: f"{name}:{','.join(field.name.upper() for field in fields(model))}" for name, model in NUMERIC.items()},
    "slow": "slow:FACTOR[,NAME,ARG,...]",
    "measured": "measured:PATH",
}

ReadJournal = Callable[[str], NDArray[np.void]]


def _no_journal(path: str) -> NDArray[np.void]:
    raise SpecError(f"no journal can be read here, not at {path!r} either")


def parse_delays(text: str, read_journal: ReadJournal = _no_journal) -> Delays:
    """The model of delays that `text` names, in the module's grammar.

    Args:
        text: NAME:ARG,ARG,...
        read_journal: gives the records of the journal at a path; what it raises goes through, unless a `SpecError`.

    Raises:
        SpecError: there is no such model, its parameters do not fit, or the journal holds no compute times.
    """
    name, _, arguments = text.strip().partition(":")
    try:
        return _build(name, arguments, read_journal)
    except SpecError as error:
        raise SpecError(f"delays {text!r}: {error}. The models are {', '.join(FORMS.values())}") from None


def _build(name: str, arguments: str, read_journal: ReadJournal) -> Delays:
    if name not in FORMS:
        close = get_close_matches(name, FORMS, 1)
        raise SpecError(f"there is no model {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    if name == "slow":
        first, _, others = arguments.partition(",")
        (factor,) = _numbers(name, first, 1)
        inner, _, rest = others.partition(",")
        return Slow(factor, _build(inner, rest, read_journal) if others else Constant(1.0))
    if name == "measured":
        return Measured.of(read_journal(arguments))
    model = NUMERIC[name]
    delays: Delays = model(*_numbers(name, arguments, len(fields(model))))
    return delays


def _numbers(name: str, arguments: str, count: int) -> list[float]:
    """`arguments` as that many numbers."""
    given = [argument.strip() for argument in arguments.split(",")] if arguments else []
    if len(given) != count:
        raise SpecError(f"{FORMS[name]} takes {count} number{'s' * (count > 1)}; {len(given)} were given")
    try:
        return [float(argument) for argument in given]
    except ValueError:
        raise SpecError(f"{FORMS[name]} takes numbers, not {arguments!r}") from None


def _check(least: float = LEAST, most: float = MOST, **parameters: float) -> None:
    """Refuse what lies outside, and what is no number."""
    for name, value in parameters.items():
        if not least <= value <= most:
            raise SpecError(f"{name} must be from {least:g} to {most:g}, not {value:g}")


def _stream(worker: int, seed: int, draw: Callable[[np.random.Generator], Times]) -> Callable[[], float]:
    """What gives one time after another, of blocks that `draw` makes with a generator of the worker's own."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(worker,)))

    def times() -> Iterator[float]:
        while True:
            yield from np.maximum(draw(rng), SHORTEST).tolist()

    return times().__next__
