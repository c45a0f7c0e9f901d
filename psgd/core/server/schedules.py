"""Learning-rate schedules: the rate as a function of the number of examples that a partition has applied or skipped.

This number is saved with the weights, so all partitions agree on the rate, also after a restart.
"""

from __future__ import annotations

from math import cos, pi

from psgd.spec import ConstantSchedule, CosineSchedule, ScheduleSpec, StepSchedule

__all__ = ["Schedule", "build_schedule"]


class Schedule:
    """A learning-rate schedule.

    The rate is η = lr · shape(e) · min(1, (examples + 1) / (warmup · num_examples)), where e = examples / num_examples
    is the time in epochs. Without a warm-up, the last factor is 1. The + 1 keeps the rate of the first step above 0.

    Args:
        spec: shape of the schedule and length of its warm-up.
        lr: base rate η₀, which the shape and the warm-up multiply.
        num_examples: number of examples in one epoch.
    """

    def __init__(self, spec: ScheduleSpec, lr: float, num_examples: int) -> None:
        assert num_examples > 0, num_examples
        self._spec = spec
        self._lr = lr
        self._num_examples = num_examples
        self._constant = isinstance(spec, ConstantSchedule) and not spec.warmup

    def rate(self, examples: int) -> float:
        """Return the rate η of the next step.

        Args:
            examples: number of examples applied or skipped so far.
        """
        if self._constant:
            return self._lr
        return self._lr * self._shape(examples) * self._warmup(examples)

    def _shape(self, examples: int) -> float:
        match self._spec:
            case ConstantSchedule():
                return 1.0
            case StepSchedule(every=every, factor=factor):
                return float(factor ** (examples // (every * self._num_examples)))
            case CosineSchedule(epochs=epochs, final=final):
                progress = min(1.0, examples / (epochs * self._num_examples))
                return final + (1 - final) * (1 + cos(pi * progress)) / 2

    def _warmup(self, examples: int) -> float:
        ramp = self._spec.warmup * self._num_examples  # examples
        return 1.0 if examples + 1 >= ramp else (examples + 1) / ramp


def build_schedule(spec: ScheduleSpec, lr: float, num_examples: int) -> Schedule:
    """Build the schedule of a job whose epochs have `num_examples` examples."""
    return Schedule(spec, lr, num_examples)
