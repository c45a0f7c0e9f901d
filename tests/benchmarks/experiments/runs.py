"""Shared parts of the experiments: jobs for the simulator, runs timed from their first gradient, and claims."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from psgd.core.server.report import Report
from psgd.simulation.cluster import VirtualCluster
from psgd.simulation.delays import build_delays
from psgd.simulation.problem import Problem, Timing
from psgd.spec import JobSpec, SimulateConfig
from psgd_workers.messages import BatchId, FloatArray

__all__ = ["Claim", "End", "TimedRun", "job", "spread"]

# A gradient takes about 1 s in all experiments. Calls cost almost nothing beside it, and no worker waits for a report
# or a lease. The papers call a computation off while it runs; a real worker of psgd cannot.
TIMING = Timing(call_s=1e-6, poll_s=10.0, interrupts=True)
LEASE_S = 50.0


class Claim(NamedTuple):
    """A claim of a paper beside the observed value."""

    text: str
    observed: str
    holds: bool


class End(NamedTuple):
    """The state of a run at its end; batches that are still in workers' hands do not count."""

    elapsed_s: float
    weights: FloatArray  # [num_parameters]
    report: Report


class TimedRun(VirtualCluster):
    """One run on virtual time.

    Args:
        spec: the job; the problem must have enough batches, so that it does not end before `until` is true.
        problem: the problem to train.
        delays: delays of the workers, in the short form of a job's `simulate.delays`.
        seed: seed of the delays.
        until: called after each step; returns True when the run may end.

    Attributes:
        reached: True if `until` returned True.
    """

    def __init__(
        self, spec: JobSpec, problem: Problem, delays: str, seed: int, until: Callable[[TimedRun], bool]
    ) -> None:
        workers = spec.scaling.most_workers
        model = build_delays(SimulateConfig.model_validate({"delays": delays}).delays)
        self._sources = {f"worker-{i}": model.source(i, workers, seed) for i in range(workers)}
        self._until = until
        self._began: float | None = None
        self._end: End | None = None
        super().__init__(spec, problem, self._draw, timing=TIMING, lease_s=LEASE_S)

    @property
    def elapsed_s(self) -> float:
        """Virtual seconds since the first gradient began."""
        return 0.0 if self._began is None else self.now - self._began

    @property
    def updates(self) -> int:
        """Steps taken."""
        return self.servers[0].version.updates

    @property
    def current_weights(self) -> FloatArray:
        """The weights `[num_parameters]`; the next step changes them in place."""
        return self.servers[0].published

    @property
    def reached(self) -> bool:
        return self._end is not None

    @property
    def end(self) -> End:
        """The state at the moment when `until` returned True, or the present state if it did not."""
        return self._end or self._present_state()

    def _draw(self, worker: str, batch: BatchId) -> float:
        if self._began is None:
            self._began = self.now
        return self._sources[worker]()

    def stepped(self) -> None:
        """Stop the run as soon as `until` returns True."""
        super().stepped()
        if self._end is None and self._until(self):
            self._end = self._present_state()
            self.stop()

    def _present_state(self) -> End:
        return End(self.elapsed_s, self.current_weights.copy(), self.servers[0].report())


def job(workers: int, lr: float, consistency: dict[str, Any], correction: str = "none", **sections: Any) -> JobSpec:
    """Return a job for the simulator; `sections` replace those of the spec, such as its unused model and data."""
    plain = {
        "model": {"kind": "linear"},
        "data": {"format": "sklearn", "dataset": "iris"},
        "optimizer": {"lr": lr},
        "consistency": consistency,
        "correction": {"name": correction},
        "scaling": {"workers": workers},
        "run": {"epochs": 1},
        "checkpoint": {"every_s": None},
        "failure": {"timeout_s": 1e9},
    }
    return JobSpec.model_validate(plain | sections)


def spread(values: list[float], form: str = ".1f") -> str:
    """Return the range of the values as text; one number if both ends read the same."""
    low = f"{min(values):{form}}"
    high = f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"
