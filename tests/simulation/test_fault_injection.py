from __future__ import annotations

from collections import Counter
from typing import Any, Self

import numpy as np
import pytest
from numpy.typing import NDArray

from psgd.core.driver.events import Action, Note
from psgd.core.driver.ledger import Ledger
from psgd.core.server.applied import AppliedSet
from psgd.core.server.live_worker import LiveWorker
from psgd.core.server.parameter_server import ParameterServer
from psgd.errors import RunError
from psgd.simulation.cluster import VirtualCluster
from psgd.simulation.observer import ClusterObserver
from psgd_workers.messages import FloatArray, Gradient, Outcome, Version
from tests.simulation.fault_injection import FAULTS, describe_failure, draw_run, run_with_faults
from tests.simulation.invariants import ViolationError

SEEDS = 500
CHUNK = 50


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_every_run_ends_and_keeps_the_invariants_whatever_fails(first: int) -> None:
    failures = [failure for seed in range(first, first + CHUNK) if (failure := describe_failure(seed))]
    assert not failures, "\n".join(failures)


def test_a_run_is_a_function_of_its_seed() -> None:
    for seed in range(10):
        one = run_with_faults(seed)
        other = run_with_faults(seed)
        assert one.cluster.now == other.cluster.now
        assert one.cluster.status.ledger == other.cluster.status.ledger
        versions = [
            {number: auditor.notes.versions for number, auditor in run.audit.auditors.items()} for run in (one, other)
        ]
        assert versions[0] == versions[1]


def test_everything_that_can_fail_does() -> None:
    runs = [draw_run(seed) for seed in range(SEEDS)]
    assert {kind for run in runs for _, kind in run.faults} == FAULTS.keys()
    assert len({run.spec.consistency.mode for run in runs}) == 12
    assert {run.spec.scaling.servers for run in runs} == {1, 2, 3}
    assert {run.spec.scaling.pipeline for run in runs} == {0, 1, 2}


def test_what_failures_do_is_met_often() -> None:
    """The drawn faults are frequent enough to test the recovery from each of them."""
    notes = Counter[str]()
    failures = Counter[str]()
    outcomes = Counter[str]()

    class NoteCounter(ClusterObserver):
        def acted(self, cluster: VirtualCluster, action: Action) -> None:
            if isinstance(action, Note):
                notes[action.event] += 1

    for seed in range(200):
        cluster = run_with_faults(seed, observers=[NoteCounter()]).cluster
        failures += cluster.status.failures
        for server in cluster.servers.values():
            outcomes += Counter(server.report().pushes)
    assert notes.keys() >= {"server_restored", "epoch_reopened", "worker_recovered", "poison_skipped", "taken_over"}
    assert failures.keys() >= {"server_lost", "worker_lost", "worker_silent", "lane_failed", "preempted", "save_failed"}
    assert outcomes.keys() >= {"applied", "duplicate", "requeued", "discarded", "rejected"}


# Servers and ledgers with a fault, which the checks must find


class AppliesTwice(ParameterServer):
    """Uses a gradient of a batch that its state already contains."""

    def _admit(self, gradient: Gradient) -> Outcome:
        outcome = super()._admit(gradient)
        return Outcome.BUFFERED if outcome is Outcome.DUPLICATE else outcome

    def _collect(self, gradient: Gradient, values: FloatArray, worker: LiveWorker | None) -> None:
        settled = self._settled
        if gradient.batch in settled:
            self._settled = AppliedSet(self.grid, gradient.batch.epoch)
        super()._collect(gradient, values, worker)
        self._settled = settled


class LosesAppliedSet(ParameterServer):
    """Restores the weights without their applied set."""

    @classmethod
    def restore(cls, *arguments: Any, **options: Any) -> Self:
        server = super().restore(*arguments, **options)
        server._settled = AppliedSet(server.grid, server.epochs)
        return server


class LosesWeights(ParameterServer):
    """Restores the applied set without the weights."""

    @classmethod
    def restore(cls, *arguments: Any, **options: Any) -> Self:
        server = super().restore(*arguments, **options)
        server._weights[:] = 0
        return server


class AdmitsLostVersions(ParameterServer):
    """Admits gradients that were computed from versions that are not in its history."""

    def _in_history(self, read: Version) -> bool:
        return True


@pytest.mark.parametrize("server", [AppliesTwice, LosesAppliedSet, LosesWeights, AdmitsLostVersions])
def test_a_server_that_breaks_an_invariant_is_found_out(server: type[ParameterServer]) -> None:
    def is_found_out(seed: int) -> bool:
        try:
            run_with_faults(seed, server)
        except ViolationError:
            return True
        except RunError:
            return False
        return False

    assert any(is_found_out(seed) for seed in range(300))


class NeverRequeues(Ledger):
    """Does not lease lost batches again."""

    def _recall(self, positions: NDArray[np.int64]) -> None:
        pass


class NeverSettles(Ledger):
    """Never learns which batches of an ended lease were applied."""

    def _settled_by(self, partition: int, asked: int) -> list[int]:
        return []


@pytest.mark.parametrize("ledger", [NeverRequeues, NeverSettles])
def test_a_ledger_with_which_no_run_ends_is_found_out(monkeypatch: pytest.MonkeyPatch, ledger: type[Ledger]) -> None:
    monkeypatch.setattr("psgd.core.driver.coordinator.Ledger", ledger)
    failures = [failure for seed in range(20) if (failure := describe_failure(seed))]
    assert any("did not end within" in failure for failure in failures)
