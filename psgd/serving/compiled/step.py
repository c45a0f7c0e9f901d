"""The step of every optimizer in compiled code; see `psgd.core.server.optimizers` for the formulas.

A step works on one block of values after the other. A block is so small that it stays in the fastest cache.
"""

from __future__ import annotations

from math import cos, inf, isnan, pi, sqrt
from math import pow as power
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.push_arrays import PushArrays
from psgd.serving.compiled.native import compiled
from psgd.serving.compiled.rule import ADAGRAD, ADAM, CONSTANT, DELAYED_NESTEROV, MOMENTUM, STEP
from psgd_workers.messages import FloatArray

__all__ = ["BLOCK", "all_finite", "learning_rate", "make_step"]

BLOCK = 4096  # values
INFINITE = 0x7F800000  # bits of float32's infinity; larger ones are nan
MAGNITUDE = 0x7FFFFFFF  # all bits of a float32 but its sign
DECAY_BEFORE = 1  # the weight decay of a rule: added to the gradient
DECAY_AFTER = 2  # or to the direction


@compiled
def all_finite(values: FloatArray) -> bool:
    """Return True if all values are finite. As integers, the bits of several are compared in one instruction."""
    bits = values.view(np.int32)
    largest = np.int32(0)
    for i in range(len(bits)):
        largest = max(largest, bits[i] & np.int32(MAGNITUDE))
    return bool(largest < np.int32(INFINITE))


@compiled
def learning_rate(rule: Any, examples: int) -> float:
    """Return the rate of the next step; see `psgd.core.server.schedules.Schedule.rate`."""
    if rule.schedule == CONSTANT and rule.ramp == 0.0:
        return rule.lr
    if rule.schedule == CONSTANT:
        shape = 1.0
    elif rule.schedule == STEP:
        shape = power(rule.step_factor, float(examples) // rule.step_examples)
    else:
        progress = min(1.0, examples / rule.cosine_examples)
        shape = rule.cosine_final + (1 - rule.cosine_final) * (1 + cos(pi * progress)) / 2
    warmup = 1.0 if examples + 1 >= rule.ramp else (examples + 1) / rule.ramp
    return rule.lr * shape * warmup


@compiled
def make_step(
    rule: Any, state: PushArrays, gradient: FloatArray, scratch: FloatArray, rate: float, scale: float, out: FloatArray
) -> None:
    """Update the weights, the optimizer's slots and the average in place. The number of updates is not changed.

    Args:
        rule: the job.
        state: arrays of the server.
        gradient: `[partition size]`, not modified.
        scratch: `[BLOCK]`, overwritten.
        rate: rate of the step.
        scale: factor of the trained values, from clipping.
        out: `[partition size]`, overwritten with the new weights while they are in the cache; `[0]`: no copy is made.
    """
    trained = rule.trained
    eta = np.float32(rate)
    factor = np.float32(scale)
    limit = np.float32(rule.clip_value)
    prepares = factor != np.float32(1) or limit != np.float32(inf) or rule.decays == DECAY_BEFORE
    begins, mean_scale, root_scale = _count_step(rule, state.steps)
    for start in range(0, trained, BLOCK):
        stop = min(start + BLOCK, trained)
        weights = state.weights[start:stop]
        values = gradient[start:stop]
        if prepares:
            values = _prepare(rule, values, weights, scratch[: stop - start], factor, limit)
        slots = (state.first[start:stop], state.second[start:stop])
        _step_block(rule, weights, values, slots, eta, begins, mean_scale, root_scale)
        if len(out):
            out[start:stop] = weights
    if not isnan(rule.ema):
        _average(rule, state.average, state.weights, state.version[1] + 1)
    for i in range(trained, len(gradient)):
        state.weights[i] -= gradient[i]
    if len(out):
        out[trained:] = state.weights[trained:]


@compiled
def _step_block(
    rule: Any,
    weights: FloatArray,
    values: FloatArray,
    slots: tuple[FloatArray, FloatArray],
    eta: np.float32,
    begins: bool,
    mean_scale: np.float32,
    root_scale: np.float32,
) -> None:
    first, second = slots
    if rule.optimizer == MOMENTUM:
        _momentum(rule, weights, values, first, eta, begins)
    elif rule.optimizer == ADAGRAD:
        _adagrad(rule, weights, values, first, eta)
    elif rule.optimizer == ADAM:
        _adam(rule, weights, values, first, second, eta, mean_scale, root_scale)
    elif rule.optimizer == DELAYED_NESTEROV:
        _delayed(rule, weights, values, first, second, eta, begins)
    else:
        for i in range(len(weights)):
            weights[i] -= values[i] * eta


@compiled
def _count_step(rule: Any, steps: NDArray[np.int64]) -> tuple[bool, np.float32, np.float32]:
    """Count the step. Return whether a momentum begins or is updated, and both scales of Adam."""
    mean_scale = np.float32(1)
    root_scale = np.float32(1)
    begins = False
    if rule.optimizer == MOMENTUM:
        steps[0] += 1
        begins = steps[0] == 1
    elif rule.optimizer == ADAM:
        steps[0] += 1
        mean_scale = np.float32(1 - power(rule.mean_beta, float(steps[0])))
        root_scale = np.float32(sqrt(1 - power(rule.square_beta, float(steps[0]))))
    elif rule.optimizer == DELAYED_NESTEROV:
        steps[0] += 1
        begins = steps[0] >= rule.every
        if begins:
            steps[0] = 0
    return begins, mean_scale, root_scale


@compiled
def _prepare(
    rule: Any, values: FloatArray, weights: FloatArray, out: FloatArray, factor: np.float32, limit: np.float32
) -> FloatArray:
    """Write the clipped gradient, with weight decay if it comes before the rule, into `out` and return it."""
    for i in range(len(out)):
        out[i] = min(max(values[i] * factor, -limit), limit)
    if rule.decays == DECAY_BEFORE:
        for i in range(len(out)):
            out[i] = weights[i] * rule.decay + out[i]
    return out


@compiled
def _momentum(
    rule: Any, weights: FloatArray, values: FloatArray, velocity: FloatArray, eta: np.float32, begins: bool
) -> None:
    if begins:
        velocity[:] = values
    elif rule.dampens:
        for i in range(len(weights)):
            velocity[i] = velocity[i] * rule.momentum + values[i] * rule.gradient_factor
    else:
        for i in range(len(weights)):
            velocity[i] = velocity[i] * rule.momentum + values[i]
    if rule.nesterov:
        for i in range(len(weights)):
            weights[i] -= (values[i] + velocity[i] * rule.momentum) * eta
    else:
        for i in range(len(weights)):
            weights[i] -= velocity[i] * eta


@compiled
def _adagrad(rule: Any, weights: FloatArray, values: FloatArray, accumulator: FloatArray, eta: np.float32) -> None:
    for i in range(len(weights)):
        accumulator[i] += values[i] * values[i]
        weights[i] -= values[i] / np.sqrt(accumulator[i] + rule.eps) * eta


@compiled
def _adam(
    rule: Any,
    weights: FloatArray,
    values: FloatArray,
    mean: FloatArray,
    square: FloatArray,
    eta: np.float32,
    mean_scale: np.float32,
    root_scale: np.float32,
) -> None:
    decay = rule.decay if rule.decays == DECAY_AFTER else np.float32(0)
    for i in range(len(weights)):
        mean[i] = mean[i] * rule.mean_kept + values[i] * rule.mean_added
        square[i] = square[i] * rule.square_kept + values[i] * values[i] * rule.square_added
        direction = mean[i] / (np.sqrt(square[i]) / root_scale + rule.eps) / mean_scale
        if rule.decays == DECAY_AFTER:
            direction += weights[i] * decay
        weights[i] -= direction * eta


@compiled
def _delayed(
    rule: Any,
    weights: FloatArray,
    values: FloatArray,
    total: FloatArray,
    velocity: FloatArray,
    eta: np.float32,
    updates: bool,
) -> None:
    every = np.float32(rule.every)
    if not updates:
        for i in range(len(weights)):
            total[i] += values[i]
            weights[i] -= values[i] / every * eta
        return
    for i in range(len(weights)):
        velocity[i] = velocity[i] * rule.momentum + (total[i] + values[i]) / every
        total[i] = np.float32(0)
        weights[i] -= (values[i] / every + velocity[i] * rule.momentum) * eta


@compiled
def _average(rule: Any, average: FloatArray, weights: FloatArray, steps: int) -> None:
    fresh = np.float32(1 - min(rule.ema, (1 + steps) / (10 + steps)))
    for i in range(len(average)):
        average[i] += (weights[i] - average[i]) * fresh
