"""The measurement that a contender prints: gradients applied per second, without start-up."""

from __future__ import annotations

import json
import signal
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from time import monotonic
from typing import NamedTuple

__all__ = ["Measurement", "Span", "measured_for", "repeat", "seconds_parser"]


class Span(NamedTuple):
    """Updates one process made, and when; the clock is the machine's, so spans of two processes compare."""

    updates: int
    first: float  # seconds, at the end of the first update
    last: float  # seconds, at the end of the last update

    @property
    def seconds(self) -> float:
        return self.last - self.first

    @classmethod
    def over(cls, spans: Iterable[Span]) -> Span:
        """All processes' updates, from the first of any to the last of any."""
        updates, first, last = zip(*spans, strict=True)
        return cls(sum(updates), min(first), max(last))


@dataclass(frozen=True, slots=True)
class Measurement:
    """One contender's run."""

    name: str
    updates_per_s: float  # gradients of one batch each, applied per second
    updates: int
    seconds: float  # from the first update to the last
    val_accuracy: float  # of the final weights on the 10,000 test images
    details: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, span: Span, val_accuracy: float, **details: float) -> Measurement:
        rate = (span.updates - 1) / span.seconds
        return cls(name, rate, span.updates, span.seconds, val_accuracy, details)

    def show(self) -> None:
        """Print the measurement as one line of JSON."""
        print(json.dumps(asdict(self)), flush=True)


def repeat(update: Callable[[], None], going: Callable[[Span], bool]) -> Span:
    """Call `update` once, and again as long as `going` says so of the span until now."""
    update()
    span = Span(1, now := monotonic(), now)
    while going(span):
        update()
        span = Span(span.updates + 1, span.first, monotonic())
    return span


def measured_for(measure: Callable[[float], Measurement], what: str | None) -> None:
    """A peer's command line: `--seconds`, answered with one line of JSON."""
    arguments = seconds_parser(what).parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what the peer started is ended too
    measure(arguments.seconds).show()


def seconds_parser(what: str | None) -> ArgumentParser:
    """One that knows `--seconds`."""
    parser = ArgumentParser(description=what)
    parser.add_argument("--seconds", type=float, default=6.0, help="how long to measure, start-up not counted")
    return parser
