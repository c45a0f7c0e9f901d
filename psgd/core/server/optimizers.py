"""Optimizers on a flat slice of the weights. A step changes the weights in place: w ← w - η·u.

Each optimizer has its own rule for the direction u. The caller gives the rate η, because η follows a schedule and the
consistency mode may scale it.

A step works on one block of values after the other. A block is so small that it stays in the processor's cache between
two operations. So a step takes only as long as it takes to read and write each array once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.state import VectorCounts
from psgd.spec import (
    AdagradOptimizer,
    AdamOptimizer,
    AdamwOptimizer,
    DelayedNesterovOptimizer,
    OptimizerSpec,
    SgdOptimizer,
)
from psgd_workers.messages import FloatArray

__all__ = [
    "Adagrad",
    "Adam",
    "Block",
    "DelayedNesterov",
    "Optimizer",
    "Sgd",
    "Watch",
    "build_optimizer",
    "in_blocks",
]

BLOCK = 32_768  # values, 128 kB of each array. Lower → fits a smaller cache. Higher → fewer NumPy calls, 0.5 µs each

Watch = Callable[[slice, FloatArray], None]  # called with the slice of a block and the block's direction, read-only


class Block(NamedTuple):
    """A part of a vector, and two scratch arrays of its length. All blocks use the same scratch memory."""

    part: slice
    scratch: FloatArray
    spare: FloatArray


NO_SLOT: FloatArray = np.empty(0, np.float32)

# Computes a block's direction from its gradient. It returns the gradient itself, a part of the state, or the scratch.
Rule = Callable[[Block, FloatArray], FloatArray]


def in_blocks(size: int) -> list[Block]:
    """Return the blocks of a vector of `size` values, in order. The last one may be shorter."""
    scratch, spare = np.empty((2, min(size, BLOCK)), np.float32)
    parts = [slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]
    return [Block(part, scratch[: part.stop - part.start], spare[: part.stop - part.start]) for part in parts]


class Optimizer(ABC):
    """Base of the update rules: applies weight decay and the rate, block by block.

    Args:
        size: number of trained values.
        weight_decay: λ of g ← g + λ·w, which is computed before the rule. Higher → smaller weights.
        decoupled: True to decay by u ← u + λ·w after the rule instead.

    Attributes:
        slots: the two vectors of the state, `[size]`, float32; `[0]` for a vector that the rule does not have.
        steps: `[1]`, int64: number of steps that the rule counts.
    """

    slots: tuple[FloatArray, FloatArray]

    def __init__(self, size: int, weight_decay: float = 0.0, decoupled: bool = False) -> None:
        self.slots = (NO_SLOT, NO_SLOT)
        self.steps = np.zeros(1, np.int64)
        self._blocks = in_blocks(size)
        self._rate = _scalar(0)
        self._decay = _scalar(weight_decay)
        self._decays_before = weight_decay > 0 and not decoupled
        self._decays_after = weight_decay > 0 and decoupled

    def step(self, weights: FloatArray, gradient: FloatArray, rate: float, watch: Watch | None = None) -> None:
        """Update the weights in place: w ← w - η·u.

        Args:
            weights: `[size]`, overwritten.
            gradient: `[size]`, not modified: it may be shared, read-only memory.
            rate: η of this step.
            watch: function to be called with each block's u before the weights of the block change; None: no calls.
        """
        rule = self._begin()
        several = len(self._blocks) > 1
        self._rate[()] = rate
        for block in self._blocks:
            part, scratch, spare = block
            w = weights[part] if several else weights  # for a small vector, slicing takes a noticeable part of the time
            g = gradient[part] if several else gradient
            if self._decays_before:
                g = np.add(np.multiply(w, self._decay, out=spare), g, out=spare)
            u = rule(block, g)
            if self._decays_after:
                u = np.add(u, np.multiply(w, self._decay, out=spare), out=scratch)
            if watch is not None:
                watch(part, u)
            w -= np.multiply(u, self._rate, out=scratch)

    @abstractmethod
    def _begin(self) -> Rule:
        """Update the state that changes once per step, and return the rule for its blocks."""

    @abstractmethod
    def vectors(self) -> VectorCounts:
        """Return the number of vectors that the rule keeps."""

    @abstractmethod
    def state(self) -> dict[str, NDArray[Any]]:
        """Return the arrays of the state by name. They are not copies: the next step modifies them."""

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore the state: copy the arrays that `state()` returned."""
        for name, array in self.state().items():
            np.copyto(array, state[name])


class Sgd(Optimizer):
    """Stochastic gradient descent, equal to `torch.optim.SGD`.

    g ← g + λ·w;  v ← μ·v + (1 - dampening)·g;  u = v, or u = g + μ·v with `nesterov`. The first v is g itself.

    Args:
        spec: hyperparameters.
        size: number of trained values.
    """

    def __init__(self, spec: SgdOptimizer, size: int) -> None:
        super().__init__(size, spec.weight_decay)
        self._spec = spec
        self._momentum = _scalar(spec.momentum)
        self._gradient_factor = _scalar(1 - spec.dampening)
        self._velocity = np.zeros(size if spec.momentum else 0, np.float32)
        self.slots = (self._velocity, NO_SLOT)

    def _begin(self) -> Rule:
        if not self._spec.momentum:
            return _gradient_itself
        self.steps += 1
        return self._start_velocity if self.steps[0] == 1 else self._update_velocity

    def _start_velocity(self, block: Block, gradient: FloatArray) -> FloatArray:
        velocity = self._velocity[block.part]
        velocity[:] = gradient
        return self._direction(velocity, gradient, block.scratch)

    def _update_velocity(self, block: Block, gradient: FloatArray) -> FloatArray:
        velocity = self._velocity[block.part]
        velocity *= self._momentum
        velocity += (
            np.multiply(gradient, self._gradient_factor, out=block.scratch) if self._spec.dampening else gradient
        )
        return self._direction(velocity, gradient, block.scratch)

    def _direction(self, velocity: FloatArray, gradient: FloatArray, scratch: FloatArray) -> FloatArray:
        if not self._spec.nesterov:
            return velocity
        return np.add(gradient, np.multiply(velocity, self._momentum, out=scratch), out=scratch)

    def vectors(self) -> VectorCounts:
        """Count the velocity, if there is momentum."""
        kept = 1 if self._spec.momentum else 0
        return VectorCounts(kept, kept)

    def state(self) -> dict[str, NDArray[Any]]:
        """Return `velocity` `[size]`: v, after the first step with momentum."""
        return {"velocity": self._velocity} if self.steps[0] else {}

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore the velocity, if the state has one. It has none before the first step with momentum."""
        self.steps[0] = self._spec.momentum > 0 and "velocity" in state
        super().load(state)


class Adagrad(Optimizer):
    """Adagrad (Duchi et al., 2011), as on the servers of Downpour SGD (Dean et al., 2012).

    g ← g + λ·w;  s ← s + g²;  u = g / √(s + ε).

    ε is inside the root, as in Keras; `torch.optim.Adagrad` computes g / (√s + ε).

    Args:
        spec: hyperparameters.
        size: number of trained values.
    """

    def __init__(self, spec: AdagradOptimizer, size: int) -> None:
        super().__init__(size, spec.weight_decay)
        self._eps = _scalar(spec.eps)
        self._accumulator = np.full(size, spec.initial_accumulator_value, np.float32)
        self.slots = (self._accumulator, NO_SLOT)

    def _begin(self) -> Rule:
        return self._normalize

    def _normalize(self, block: Block, gradient: FloatArray) -> FloatArray:
        accumulator = self._accumulator[block.part]
        u = block.scratch
        accumulator += np.multiply(gradient, gradient, out=u)
        np.add(accumulator, self._eps, out=u)
        np.sqrt(u, out=u)
        return np.divide(gradient, u, out=u)

    def vectors(self) -> VectorCounts:
        """Count the accumulator."""
        return VectorCounts(1, 1)

    def state(self) -> dict[str, NDArray[Any]]:
        """Return `accumulator` `[size]`: s."""
        return {"accumulator": self._accumulator}


class Adam(Optimizer):
    """Adam and AdamW, equal to `torch.optim.Adam` and `torch.optim.AdamW`.

    m ← β₁·m + (1 - β₁)·g;  v ← β₂·v + (1 - β₂)·g²;  u = (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε) at step t.

    Weight decay: Adam begins with g ← g + λ·w; AdamW ends with u ← u + λ·w.

    Args:
        spec: hyperparameters.
        size: number of trained values.

    References:
        Kingma & Ba, 2015: Adam. Loshchilov & Hutter, 2019: Decoupled weight decay regularization.
    """

    def __init__(self, spec: AdamOptimizer | AdamwOptimizer, size: int) -> None:
        super().__init__(size, spec.weight_decay, decoupled=isinstance(spec, AdamwOptimizer))
        self._betas = spec.betas
        self._eps = _scalar(spec.eps)
        self._mean_kept, self._square_kept = (_scalar(beta) for beta in spec.betas)
        self._mean_added, self._square_added = (_scalar(1 - beta) for beta in spec.betas)
        self._mean = np.zeros(size, np.float32)
        self._square = np.zeros(size, np.float32)
        self.slots = (self._mean, self._square)
        self._mean_scale = _scalar(1)  # 1 - β₁ᵗ
        self._root_scale = _scalar(1)  # √(1 - β₂ᵗ)

    def _begin(self) -> Rule:
        self.steps += 1
        steps = int(self.steps[0])
        mean_scale, square_scale = (1 - beta**steps for beta in self._betas)
        self._mean_scale[()] = mean_scale
        self._root_scale[()] = sqrt(square_scale)
        return self._normalize

    def _normalize(self, block: Block, gradient: FloatArray) -> FloatArray:
        """Return the bias-corrected mean, divided by the root of the bias-corrected mean square."""
        mean, square = self._update_means(block, gradient)
        u = block.scratch
        np.sqrt(square, out=u)
        u /= self._root_scale
        u += self._eps
        np.divide(mean, u, out=u)
        u /= self._mean_scale
        return u

    def _update_means(self, block: Block, gradient: FloatArray) -> tuple[FloatArray, FloatArray]:
        mean = self._mean[block.part]
        square = self._square[block.part]
        scratch = block.scratch
        mean *= self._mean_kept
        mean += np.multiply(gradient, self._mean_added, out=scratch)
        np.multiply(gradient, gradient, out=scratch)
        scratch *= self._square_added
        square *= self._square_kept
        square += scratch
        return mean, square

    def vectors(self) -> VectorCounts:
        """Count both means."""
        return VectorCounts(2, 2)

    def state(self) -> dict[str, NDArray[Any]]:
        """Return `mean` and `square` `[size]`: m and v; and `steps` `[1]`, int64: t."""
        return {"mean": self._mean, "square": self._square, "steps": self.steps}


class DelayedNesterov(Optimizer):
    """Delayed Nesterov: every step moves by a share of its gradient; the momentum is updated on every N-th step only.

    u = g / N. On every N-th step also m ← β·m + ḡ and u ← u + β·m, where ḡ is the mean of the last N gradients.

    With N = 1 it equals `Sgd` with `nesterov`.

    Args:
        spec: hyperparameters.
        size: number of trained values.

    References:
        Liu et al., 2024: Asynchronous Local-SGD training for language modeling (algorithm 3, with c = 0).
    """

    def __init__(self, spec: DelayedNesterovOptimizer, size: int) -> None:
        super().__init__(size)
        self._spec = spec
        self._momentum = _scalar(spec.momentum)
        self._every = _scalar(spec.every)
        self._sum = np.zeros(size, np.float32)
        self._velocity = np.zeros(size, np.float32)
        self.slots = (self._sum, self._velocity)

    def _begin(self) -> Rule:
        self.steps += 1  # since the momentum was updated
        if self.steps[0] < self._spec.every:
            return self._step_by_share
        self.steps[0] = 0
        return self._step_with_momentum

    def _step_by_share(self, block: Block, gradient: FloatArray) -> FloatArray:
        total = self._sum[block.part]
        total += gradient
        return np.divide(gradient, self._every, out=block.scratch)

    def _step_with_momentum(self, block: Block, gradient: FloatArray) -> FloatArray:
        u = self._step_by_share(block, gradient)
        total = self._sum[block.part]
        velocity = self._velocity[block.part]
        total /= self._every
        velocity *= self._momentum
        velocity += total
        u += np.multiply(velocity, self._momentum, out=total)
        total[:] = 0
        return u

    def vectors(self) -> VectorCounts:
        """Count the velocity and the sum."""
        return VectorCounts(2, 2)

    def state(self) -> dict[str, NDArray[Any]]:
        """Return `velocity` `[size]`, `sum` `[size]` and `pushes` `[1]`, int64.

        `velocity` is m. `sum` and `pushes` are the sum and the number of the gradients since m was updated.
        """
        return {"velocity": self._velocity, "sum": self._sum, "pushes": self.steps}


def _gradient_itself(_: Block, gradient: FloatArray) -> FloatArray:
    return gradient


def _scalar(value: float) -> FloatArray:
    """Return a float32 array of shape `[]`: NumPy multiplies by it in half the time that a Python float takes."""
    return np.array(value, np.float32)


def build_optimizer(spec: OptimizerSpec, size: int) -> Optimizer:
    """Build the optimizer of a job for `size` trained values."""
    match spec:
        case SgdOptimizer():
            return Sgd(spec, size)
        case AdagradOptimizer():
            return Adagrad(spec, size)
        case AdamOptimizer() | AdamwOptimizer():
            return Adam(spec, size)
        case DelayedNesterovOptimizer():
            return DelayedNesterov(spec, size)
