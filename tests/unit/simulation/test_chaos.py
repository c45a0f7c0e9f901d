from __future__ import annotations

from collections import Counter
from typing import Any, Self

import pytest

from psgd.core.driver.events import Note
from psgd.core.server.applied import AppliedSet
from psgd.errors import RunError
from psgd.simulation.chaos import STRIKES, Chaos, draw_plan, run_chaos
from psgd.simulation.invariants import ViolationError, WatchedServer
from psgd_workers.messages import Gradient, Outcome, Version
from tests.chaos import fault

SEEDS = 500
CHUNK = 50


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_every_run_ends_and_keeps_the_invariants_whatever_befalls_it(first: int) -> None:
    faults = [found for seed in range(first, first + CHUNK) if (found := fault(seed))]
    assert not faults, "\n".join(faults)


def test_a_run_is_a_function_of_its_seed() -> None:
    for seed in range(10):
        one = run_chaos(seed)
        other = run_chaos(seed)
        assert (one.now, one.status.ledger) == (other.now, other.status.ledger)
        assert {number: server.versions for number, server in watched(one).items()} == {
            number: server.versions for number, server in watched(other).items()
        }


def watched(cluster: Chaos) -> dict[int, WatchedServer]:
    return {number: server for number, server in cluster.servers.items() if isinstance(server, WatchedServer)}


def test_all_that_can_befall_a_run_does() -> None:
    plans = [draw_plan(seed) for seed in range(SEEDS)]
    assert {kind for plan in plans for _, kind in plan.strikes} == STRIKES.keys()
    assert len({plan.spec.consistency.mode for plan in plans}) == 12
    assert {plan.spec.scaling.servers for plan in plans} == {1, 2, 3}
    assert {plan.spec.scaling.pipeline for plan in plans} == {0, 1, 2}


def test_what_failures_do_is_met_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A calm that nobody noticed would be worth nothing."""
    notes = Counter[str]()
    failures = Counter[str]()
    outcomes = Counter[str]()
    act = Chaos.act

    def noted(cluster: Chaos, action: Any) -> None:
        if isinstance(action, Note):
            notes[action.event] += 1
        act(cluster, action)

    monkeypatch.setattr(Chaos, "act", noted)
    for seed in range(200):
        cluster = run_chaos(seed)
        failures += cluster.status.failures
        for server in cluster.servers.values():
            outcomes += Counter(server.report().pushes)
    assert notes.keys() >= {"server_restored", "epoch_reopened", "worker_recovered", "poison_skipped", "taken_over"}
    assert failures.keys() >= {"server_lost", "worker_lost", "worker_silent", "lane_failed", "preempted", "save_failed"}
    assert outcomes.keys() >= {"applied", "duplicate", "requeued", "discarded", "rejected"}


# The checks can fail


class Repeating(WatchedServer):
    """Takes in again what it contains."""

    def _admit(self, gradient: Gradient) -> Outcome:
        outcome = super()._admit(gradient)
        return Outcome.BUFFERED if outcome is Outcome.DUPLICATE else outcome

    def _collect(self, gradient: Gradient) -> None:
        settled = self._settled
        if gradient.batch in settled:
            self._settled = AppliedSet(self._grid)
        super()._collect(gradient)
        self._settled = settled


class Forgetful(WatchedServer):
    """Restores the weights without their applied set."""

    @classmethod
    def restore(cls, *arguments: Any, **options: Any) -> Self:
        server = super().restore(*arguments, **options)
        server._settled = AppliedSet(server._grid, server.epochs)
        return server


class Hollow(WatchedServer):
    """Restores the applied set without the weights."""

    @classmethod
    def restore(cls, *arguments: Any, **options: Any) -> Self:
        server = super().restore(*arguments, **options)
        server._weights[:] = 0
        return server


class Credulous(WatchedServer):
    """Admits what was read in a past that is no more."""

    def _in_history(self, read: Version) -> bool:
        return True


@pytest.mark.parametrize("server", [Repeating, Forgetful, Hollow, Credulous])
def test_a_server_that_breaks_an_invariant_is_found_out(server: type[WatchedServer]) -> None:
    def is_found_out(seed: int) -> bool:
        try:
            run_chaos(seed, server)
        except ViolationError:
            return True
        except RunError:
            return False
        return False

    assert any(is_found_out(seed) for seed in range(300))
