"""A simulation's imaginary workers, and the jobs that it compares."""

from __future__ import annotations

from dataclasses import dataclass

from psgd.simulation.delays import Constant, Delays
from psgd.spec import ContenderConfig, JobSpec, SimulateConfig
from psgd.spec.changes import override_spec
from psgd.spec.reader import parse_spec

__all__ = ["Scenario", "contenders"]


@dataclass(frozen=True, slots=True)
class Scenario:
    """Imaginary workers. Every time is in virtual seconds."""

    workers: int
    delays: Delays = Constant(1.0)  # noqa: RUF009 (frozen)
    link_s: float = 0.0  # a gradient to its server, and the weights back
    crash_s: float | None = None  # mean time between two crashes of some worker; None: none crashes
    join_s: float = 0.0  # mean time until a worker joins, at first and after a crash
    seed: int = 0

    @classmethod
    def of(cls, section: SimulateConfig, workers: int, delays: Delays) -> Scenario:
        """Return the workers that a job's simulate section describes."""
        return cls(workers, delays, section.link_s, section.crash_s, section.join_s, section.seed)


def contenders(spec: JobSpec, workers: int) -> dict[str, JobSpec]:
    """Return the jobs to simulate by name: one for each of the section's modes, or the job itself.

    Args:
        spec: the job.
        workers: number of imaginary workers.

    Raises:
        SpecError: a mode does not go with the rest of the job.
    """
    # Times of the spec are of the real world, and mean nothing on a virtual clock.
    timeless = [
        f"scaling.workers={workers}",
        "checkpoint={every_s: null}",
        "failure={timeout_s: 1e12, max_failures: -1, max_rejected: 1000000}",
        "simulate=null",
    ]
    modes = spec.simulate.modes if spec.simulate else None
    if modes is None:
        return {spec.consistency.mode: override_spec(spec, timeless)}
    neutral = override_spec(spec, [*timeless, "consistency={mode: async}", "correction={name: none}"])
    return {mode.label: _contender(neutral, mode) for mode in modes}


def _contender(neutral: JobSpec, mode: ContenderConfig) -> JobSpec:
    tree = neutral.model_dump(mode="json", exclude_unset=True)
    tree["consistency"] = mode.consistency.model_dump(mode="json")
    if mode.correction is not None:
        tree["correction"] = mode.correction.model_dump(mode="json")
    if mode.lr is not None:
        tree["optimizer"] = tree["optimizer"] | {"lr": mode.lr}
    return parse_spec(tree, f"mode {mode.label}: the job")
