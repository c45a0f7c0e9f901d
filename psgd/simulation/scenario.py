"""The simulated workers of `psgd simulate`, and the jobs that it compares."""

from __future__ import annotations

from dataclasses import dataclass

from psgd.simulation.delays import Constant, Delays
from psgd.spec import ContenderConfig, JobSpec, SimulateConfig
from psgd.spec.changes import override_spec
from psgd.spec.reader import parse_spec

__all__ = ["Scenario", "jobs_to_simulate"]


@dataclass(frozen=True, slots=True)
class Scenario:
    """A description of the simulated workers. Durations are in virtual seconds."""

    workers: int  # number of workers
    delays: Delays = Constant(1.0)  # noqa: RUF009 - Constant is frozen
    link_s: float = 0.0  # transfer of a gradient to the server; the same again for the weights on their way back
    crash_s: float | None = None  # mean time between two crashes, over all workers; None: no worker crashes
    join_s: float = 0.0  # mean time until a worker joins, at the start and after a crash
    seed: int = 0  # seed of the delays, crashes and joins

    @classmethod
    def of(cls, section: SimulateConfig, workers: int, delays: Delays) -> Scenario:
        """Build the scenario that a job's `simulate` section describes."""
        return cls(workers, delays, section.link_s, section.crash_s, section.join_s, section.seed)


def jobs_to_simulate(spec: JobSpec, workers: int) -> dict[str, JobSpec]:
    """Return the jobs to simulate, by name: one for each mode of the `simulate` section, or only the job's own mode.

    Args:
        spec: the job.
        workers: number of simulated workers.

    Raises:
        SpecError: a mode cannot be combined with the rest of the job.
    """
    # Time limits of the job are in real seconds, which mean nothing on a virtual clock.
    without_limits = [
        f"scaling.workers={workers}",
        "checkpoint={every_s: null}",
        "failure={timeout_s: 1e12, max_failures: -1, max_rejected: 1000000}",
        "simulate=null",
    ]
    modes = spec.simulate.modes if spec.simulate else None
    if modes is None:
        return {spec.consistency.mode: override_spec(spec, without_limits)}
    neutral = override_spec(spec, [*without_limits, "consistency={mode: async}", "correction={name: none}"])
    return {mode.label: _job_with_mode(neutral, mode) for mode in modes}


def _job_with_mode(neutral: JobSpec, mode: ContenderConfig) -> JobSpec:
    tree = neutral.model_dump(mode="json", exclude_unset=True)
    tree["consistency"] = mode.consistency.model_dump(mode="json")
    if mode.correction is not None:
        tree["correction"] = mode.correction.model_dump(mode="json")
    if mode.lr is not None:
        tree["optimizer"] = tree["optimizer"] | {"lr": mode.lr}
    return parse_spec(tree, f"mode {mode.label}: the job")
