"""What a simulation is asked: which workers, which modes, and when to stop; and the same, read from a command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from psgd.errors import SpecError
from psgd.simulation.delays import Constant, Delays
from psgd.spec import JobSpec
from psgd.spec.reader import override_spec, parse_spec, parse_value

__all__ = ["Scenario", "Target", "contenders", "parse_target"]

METRICS = {"excess": False, "train/loss": False, "val/loss": False, "val/accuracy": True}  # metric -> higher is better
ITEM = re.compile(r"(?P<key>[a-z_.]+)=(?P<value>.*)")


@dataclass(frozen=True, slots=True)
class Target:
    """A metric that is good enough."""

    metric: str
    value: float

    def reached(self, value: float) -> bool:
        return value >= self.value if METRICS[self.metric] else value <= self.value


@dataclass(frozen=True, slots=True)
class Scenario:
    """Workers that are not there; every time is in virtual seconds."""

    workers: int
    delays: Delays = Constant(1.0)  # noqa: RUF009 (frozen)
    link_s: float = 0.0  # a gradient to its server, and the weights back
    crash_s: float | None = None  # mean time between two crashes of some worker; None: none crashes
    join_s: float = 0.0  # mean time until a worker joins, at first and after a crash
    seed: int = 0

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise SpecError(f"{self.workers} workers cannot train: give at least 1")
        for name in ("link_s", "join_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise SpecError(f"{name} is {getattr(self, name)}: give a number of seconds from 0 on")
        if self.crash_s is not None and not 0 < self.crash_s < float("inf"):
            raise SpecError(f"crashes every {self.crash_s} s on average: give a number of seconds above 0")


def parse_target(text: str) -> Target:
    """A target from `METRIC=VALUE`.

    Raises:
        SpecError: there is no such metric, or the value is no number.
    """
    metric, _, value = text.partition("=")
    number = parse_value(value, f"--until {text}")
    if metric not in METRICS or isinstance(number, bool) or not isinstance(number, int | float):
        raise SpecError(f"--until {text!r}: expected METRIC=NUMBER, with one of {', '.join(METRICS)}")
    return Target(metric, float(number))


def contenders(spec: JobSpec, workers: int, modes: str | None) -> dict[str, JobSpec]:
    """The jobs to simulate, by name: the job itself, or one for each of `modes`.

    Args:
        spec: the job.
        workers: how many it is given.
        modes: such as `async,ringmaster:r=32,rennala:s=8:lr=0.75,async:correction=delay_adaptive`: modes with their
            fields, and, where they differ from the job's, the rate and the correction. The job's own mode keeps the
            job's fields.

    Raises:
        SpecError: a mode is none, or does not go with the rest of the job.
    """
    # Times of the spec are of the real world, and mean nothing on a virtual clock.
    timeless = [
        f"scaling.workers={workers}",
        "checkpoint={every_s: null}",
        "failure={timeout_s: 1e12, max_failures: -1, max_rejected: 1000000}",
    ]
    if modes is None:
        return {spec.consistency.mode: override_spec(spec, timeless)}
    neutral = override_spec(spec, [*timeless, "consistency={mode: async}", "correction={name: none}"])
    return {text: _contender(spec, neutral, text) for text in _split(modes)}


def _split(modes: str) -> Sequence[str]:
    texts = [text.strip() for text in modes.split(",")]
    if not all(texts) or len(set(texts)) < len(texts):
        raise SpecError(f"--modes {modes!r}: expected different modes, such as async,ringmaster:r=32,bsp")
    return texts


def _contender(spec: JobSpec, neutral: JobSpec, text: str) -> JobSpec:
    name, *items = text.split(":")
    own = spec.consistency.model_dump() if spec.consistency.mode == name else {}
    tree = neutral.model_dump(mode="json", exclude_unset=True)
    fields: dict[str, Any] = own | {"mode": name}
    for item in items:
        match = ITEM.fullmatch(item)
        if match is None:
            raise SpecError(f"--modes {text!r}: {item!r} is no FIELD=VALUE, such as r=32")
        key = match["key"]
        value = parse_value(match["value"], f"--modes {text}")
        if key == "lr" and name != "local":
            tree["optimizer"] = tree["optimizer"] | {"lr": value}
            tree["optimizer"].pop("learning_rate", None)
        elif key == "correction":
            tree["correction"] = {"name": value}
        else:
            fields[key] = value
    tree["consistency"] = fields
    return parse_spec(tree, f"--modes {text!r}: the job")
