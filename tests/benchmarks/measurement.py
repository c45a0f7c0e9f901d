"""A contender's measurement, which it prints: gradients applied per second, without start-up."""

from __future__ import annotations

import json
import signal
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from time import monotonic
from typing import NamedTuple

__all__ = ["Measurement", "Span", "repeat", "run_command_line", "seconds_parser"]


class Span(NamedTuple):
    """The updates of one process and their time on the machine's clock, which all processes share."""

    updates: int
    first: float  # seconds, at the end of the first update
    last: float  # seconds, at the end of the last update

    @property
    def seconds(self) -> float:
        return self.last - self.first

    @classmethod
    def over(cls, spans: Iterable[Span]) -> Span:
        """Return the updates of all processes as one span, from the first of any to the last of any."""
        updates, first, last = zip(*spans, strict=True)
        return cls(sum(updates), min(first), max(last))


@dataclass(frozen=True, slots=True)
class Measurement:
    """The result of one contender's run."""

    name: str
    updates_per_s: float  # gradients of one batch each, applied per second
    updates: int
    seconds: float  # from the first update to the last
    val_accuracy: float  # of the final weights on the 10,000 test images
    details: dict[str, float] = field(default_factory=dict)  # further figures by name

    @classmethod
    def of(cls, name: str, span: Span, val_accuracy: float, **details: float) -> Measurement:
        """Return the measurement of a span; the first update only starts the clock."""
        rate = (span.updates - 1) / span.seconds
        return cls(name, rate, span.updates, span.seconds, val_accuracy, details)

    def show(self) -> None:
        """Print the measurement as one line of JSON."""
        print(json.dumps(asdict(self)), flush=True)


def repeat(update: Callable[[], None], going: Callable[[Span], bool]) -> Span:
    """Call `update` once, and again while `going` returns True for the span so far."""
    update()
    now = monotonic()
    span = Span(1, now, now)
    while going(span):
        update()
        span = Span(span.updates + 1, span.first, monotonic())
    return span


def run_command_line(measure: Callable[[float], Measurement], description: str | None) -> None:
    """Run a peer's command line: measure for `--seconds`, and print the measurement as one line of JSON."""
    arguments = seconds_parser(description).parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the processes of the peer are ended, too
    measure(arguments.seconds).show()


def seconds_parser(description: str | None) -> ArgumentParser:
    """Return a parser with the option `--seconds`."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--seconds", type=float, default=6.0, help="duration of the measurement, without start-up")
    return parser
