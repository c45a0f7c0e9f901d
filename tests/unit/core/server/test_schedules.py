from __future__ import annotations

from collections.abc import Callable
from math import cos, pi

import pytest
import torch

from psgd.core.server.schedules import build_schedule
from psgd.spec import ConstantSchedule, CosineSchedule, ScheduleSpec, StepSchedule

LR = 0.3
EPOCH = 100  # examples
SCHEDULES: list[ScheduleSpec] = [
    ConstantSchedule(),
    ConstantSchedule(warmup=0.5),
    StepSchedule(name="step", every=0.7, factor=0.5, warmup=2),
    CosineSchedule(name="cosine", epochs=4, final=0.1, warmup=1),
]


def rates(spec: ScheduleSpec, steps: int, num_examples: int = 1) -> list[float]:
    """Return the rates after 0, 1, … examples."""
    schedule = build_schedule(spec, LR, num_examples)
    return [schedule.rate(examples) for examples in range(steps)]


def torch_rates(
    build: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler], steps: int
) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    scheduler = build(optimizer)
    seen = []
    for _ in range(steps):
        seen.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return [float(rate) for rate in seen]


def test_a_constant_rate_is_lr_to_the_bit() -> None:
    assert set(rates(ConstantSchedule(), 500, EPOCH)) == {LR}


def test_step_is_that_of_torch() -> None:
    theirs = torch_rates(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.5), 50)
    assert rates(StepSchedule(name="step", every=7, factor=0.5), 50) == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("every", [0.1, 0.25, 0.5, 1.0, 1.5])
def test_step_falls_at_fractions_of_an_epoch_too(every: float) -> None:
    schedule = build_schedule(StepSchedule(name="step", every=every, factor=0.5), LR, EPOCH)
    for drops in range(1, 5):
        edge = round(drops * every * EPOCH)
        assert schedule.rate(edge - 1) == LR * 0.5 ** (drops - 1)
        assert schedule.rate(edge) == LR * 0.5**drops


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_cosine_is_that_of_torch_until_its_end(final: float) -> None:
    theirs = torch_rates(
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=LR * final), 41
    )
    ours = rates(CosineSchedule(name="cosine", epochs=40, final=final), 41)
    assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_cosine_falls_over_its_epochs_and_stays_at_the_end(final: float) -> None:
    schedule = build_schedule(CosineSchedule(name="cosine", epochs=2.5, final=final), LR, EPOCH)
    assert schedule.rate(0) == pytest.approx(LR)
    assert schedule.rate(100) == pytest.approx(LR * (final + (1 - final) * (1 + cos(pi * 0.4)) / 2))
    assert schedule.rate(125) == pytest.approx(LR * (1 + final) / 2)
    for examples in (250, 251, 500, 10**9):
        assert schedule.rate(examples) == pytest.approx(LR * final, abs=1e-15)


def test_warm_up_is_torchs_linear_one() -> None:
    theirs = torch_rates(
        lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 20, total_iters=19), 40
    )
    assert rates(ConstantSchedule(warmup=20), 40) == pytest.approx(theirs, rel=1e-9)


def test_warm_up_starts_above_0_and_ends_at_lr_to_the_bit() -> None:
    schedule = build_schedule(ConstantSchedule(warmup=1.5), LR, EPOCH)
    assert schedule.rate(0) == pytest.approx(LR / 150)
    assert schedule.rate(74) == pytest.approx(LR / 2)
    assert schedule.rate(148) < LR
    assert schedule.rate(149) == schedule.rate(10**6) == LR


@pytest.mark.parametrize("spec", SCHEDULES, ids=repr)
def test_warm_up_multiplies_whatever_the_schedule_says(spec: ScheduleSpec) -> None:
    warm = rates(spec, 500, EPOCH)
    cold = rates(spec.model_copy(update={"warmup": 0.0}), 500, EPOCH)
    factors = [min(1.0, (examples + 1) / (spec.warmup * EPOCH)) if spec.warmup else 1.0 for examples in range(500)]
    assert warm == pytest.approx([rate * factor for rate, factor in zip(cold, factors, strict=True)])


@pytest.mark.parametrize("spec", SCHEDULES, ids=repr)
def test_a_rate_depends_on_nothing_but_the_count(spec: ScheduleSpec) -> None:
    forwards = rates(spec, 500, EPOCH)
    schedule = build_schedule(spec, LR, EPOCH)
    assert [schedule.rate(examples) for examples in reversed(range(500))] == forwards[::-1]
