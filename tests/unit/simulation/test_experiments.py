"""Published results on a virtual clock: the experiments of `tests/benchmarks/experiments` in their smallest size."""

from __future__ import annotations

from collections.abc import Sequence

from tests.benchmarks.experiments import laws, minibatch, ringmaster, staleness
from tests.benchmarks.experiments.runs import Claim


def assert_all(claims: Sequence[Claim]) -> None:
    assert claims
    assert [claim for claim in claims if not claim.holds] == []


def test_a_rate_over_staleness_is_level_with_hard_sync_where_a_fixed_one_fails() -> None:
    assert_all(staleness.claims(staleness.run([0], (15, 30))))


def test_ringmaster_is_level_in_the_number_of_workers_and_the_others_are_not() -> None:
    assert_all(ringmaster.claims(ringmaster.run([0], (8, 512))))


def test_async_beats_minibatch_at_equal_time() -> None:
    assert_all(minibatch.claims(minibatch.run([0])))


def test_steps_take_as_long_as_the_laws_say() -> None:
    assert_all(laws.claims(laws.run([0], (2, 8), workers=8, steps=3000)))
