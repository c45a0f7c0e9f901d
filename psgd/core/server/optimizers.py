"""Update rules on a flat slice of the weights: each says the direction u of the step w ← w - η·u, made in place.

The rate η is the caller's: it follows a schedule, and the consistency mode may scale it.

A step goes block by block and finishes one block before it looks at the next. What one operation leaves to the next
stays in the cache, and a step takes as long as reading and writing each array once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from psgd.core.server.state import Vectors
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

BLOCK = 32_768  # values, 128 kB of each array. Lower: fits a smaller cache. Higher: fewer calls of NumPy, 0.5 µs each

Watch = Callable[[slice, FloatArray], None]  # is shown a block's part of the vector and its direction, only to be read


class Block(NamedTuple):
    """A part of a vector, and memory of its length to work in, which all blocks share."""

    part: slice
    scratch: FloatArray
    spare: FloatArray


Rule = Callable[[Block, FloatArray], FloatArray]  # a block's gradient -> its direction: the gradient, state, or scratch


def in_blocks(size: int) -> list[Block]:
    """The blocks of a vector of `size` values, in order; the last may be shorter."""
    scratch, spare = np.empty((2, min(size, BLOCK)), np.float32)
    parts = [slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]
    return [Block(part, scratch[: part.stop - part.start], spare[: part.stop - part.start]) for part in parts]


class Optimizer(ABC):
    """Steps by gradients, and can be saved and restored.

    Args:
        size: length of the slice.
        weight_decay: λ in g ← g + λ·w, before the rule.
        decoupled: decay by u ← u + λ·w instead, after the rule.
    """

    def __init__(self, size: int, weight_decay: float = 0.0, decoupled: bool = False) -> None:
        self._blocks = in_blocks(size)
        self._rate = _scalar(0)
        self._decay = _scalar(weight_decay)
        self._decays_before = weight_decay > 0 and not decoupled
        self._decays_after = weight_decay > 0 and decoupled

    def step(self, weights: FloatArray, gradient: FloatArray, rate: float, watch: Watch | None = None) -> None:
        """w ← w - η·u, in place.

        Args:
            weights: `[size]`.
            gradient: `[size]`, left as it is: it may be shared, read-only memory.
            rate: η.
            watch: is shown each block's u, before the block's weights change.
        """
        rule = self._begin()
        several = len(self._blocks) > 1
        self._rate[()] = rate
        for block in self._blocks:
            part, scratch, spare = block
            w, g = (weights[part], gradient[part]) if several else (weights, gradient)  # small ones feel the slicing
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
        """Do what is done once in a step, and give the rule for its blocks."""

    @abstractmethod
    def vectors(self) -> Vectors:
        """Return how many vectors the rule keeps."""

    @abstractmethod
    def state(self) -> dict[str, NDArray[Any]]:
        """The arrays that, loaded, make the next step the same. The optimizer goes on writing to them."""

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take over the arrays of `state()`, copied."""
        for name, array in self.state().items():
            np.copyto(array, state[name])


class Sgd(Optimizer):
    """Stochastic gradient descent, equal to `torch.optim.SGD`.

    g ← g + λ·w;  v ← μ·v + (1 - dampening)·g, the first v being g itself;  u = v, or g + μ·v with nesterov.

    Args:
        spec: the hyperparameters.
        size: length of the slice.
    """

    def __init__(self, spec: SgdOptimizer, size: int) -> None:
        super().__init__(size, spec.weight_decay)
        self._spec = spec
        self._momentum = _scalar(spec.momentum)
        self._share = _scalar(1 - spec.dampening)
        self._velocity = np.empty(size if spec.momentum else 0, np.float32)
        self._moving = False  # whether there is a velocity yet

    def _begin(self) -> Rule:
        if not self._spec.momentum:
            return _plain
        moving, self._moving = self._moving, True
        return self._accelerate if moving else self._start

    def _start(self, block: Block, gradient: FloatArray) -> FloatArray:
        velocity = self._velocity[block.part]
        velocity[:] = gradient
        return self._ahead(velocity, gradient, block.scratch)

    def _accelerate(self, block: Block, gradient: FloatArray) -> FloatArray:
        velocity = self._velocity[block.part]
        velocity *= self._momentum
        velocity += np.multiply(gradient, self._share, out=block.scratch) if self._spec.dampening else gradient
        return self._ahead(velocity, gradient, block.scratch)

    def _ahead(self, velocity: FloatArray, gradient: FloatArray, scratch: FloatArray) -> FloatArray:
        if not self._spec.nesterov:
            return velocity
        return np.add(gradient, np.multiply(velocity, self._momentum, out=scratch), out=scratch)

    def vectors(self) -> Vectors:
        """The velocity, with momentum."""
        kept = 1 if self._spec.momentum else 0
        return Vectors(kept, kept)

    def state(self) -> dict[str, NDArray[Any]]:
        """`velocity` `[size]`, once there is one."""
        return {"velocity": self._velocity} if self._moving else {}

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take over the arrays of `state()`, copied."""
        self._moving = self._spec.momentum > 0 and "velocity" in state
        super().load(state)


class Adagrad(Optimizer):
    """Adagrad (Duchi et al., 2011), as Downpour SGD's servers run it (Dean et al., 2012).

    g ← g + λ·w;  s ← s + g²;  u = g / √(s + ε).

    ε is inside the root, as in Keras; `torch.optim.Adagrad` has g / (√s + ε).

    Args:
        spec: the hyperparameters.
        size: length of the slice.
    """

    def __init__(self, spec: AdagradOptimizer, size: int) -> None:
        super().__init__(size, spec.weight_decay)
        self._eps = _scalar(spec.eps)
        self._accumulator = np.full(size, spec.initial_accumulator_value, np.float32)

    def _begin(self) -> Rule:
        return self._normalize

    def _normalize(self, block: Block, gradient: FloatArray) -> FloatArray:
        accumulator = self._accumulator[block.part]
        u = block.scratch
        accumulator += np.multiply(gradient, gradient, out=u)
        np.add(accumulator, self._eps, out=u)
        np.sqrt(u, out=u)
        return np.divide(gradient, u, out=u)

    def vectors(self) -> Vectors:
        """The accumulator."""
        return Vectors(1, 1)

    def state(self) -> dict[str, NDArray[Any]]:
        """`accumulator` `[size]`: s."""
        return {"accumulator": self._accumulator}


class Adam(Optimizer):
    """Adam and AdamW, equal to `torch.optim.Adam` and `torch.optim.AdamW`.

    m ← β₁·m + (1 - β₁)·g;  v ← β₂·v + (1 - β₂)·g²;  u = (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε), at the t-th step.
    Adam decays the gradient, g ← g + λ·w, before all that; AdamW the weights, u ← u + λ·w, after it.

    Args:
        spec: the hyperparameters.
        size: length of the slice.

    References:
        Kingma & Ba, 2015: Adam. Loshchilov & Hutter, 2019: Decoupled weight decay regularization.
    """

    def __init__(self, spec: AdamOptimizer | AdamwOptimizer, size: int) -> None:
        super().__init__(size, spec.weight_decay, decoupled=isinstance(spec, AdamwOptimizer))
        self._betas = spec.betas
        self._eps = _scalar(spec.eps)
        self._mean_kept, self._square_kept = (_scalar(beta) for beta in spec.betas)
        self._mean_added, self._square_added = (_scalar(1 - beta) for beta in spec.betas)
        self._steps = np.zeros(1, np.int64)
        self._mean = np.zeros(size, np.float32)
        self._square = np.zeros(size, np.float32)
        self._mean_weight, self._root_weight = _scalar(1), _scalar(1)  # of what was averaged so far

    def _begin(self) -> Rule:
        self._steps += 1
        steps = int(self._steps[0])
        mean_weight, square_weight = (1 - beta**steps for beta in self._betas)
        self._mean_weight[()] = mean_weight
        self._root_weight[()] = sqrt(square_weight)
        return self._normalize

    def _normalize(self, block: Block, gradient: FloatArray) -> FloatArray:
        """The bias-corrected mean over the root of the bias-corrected square."""
        (mean, square) = self._average(block, gradient)
        u = block.scratch
        np.sqrt(square, out=u)
        u /= self._root_weight
        u += self._eps
        np.divide(mean, u, out=u)
        u /= self._mean_weight
        return u

    def _average(self, block: Block, gradient: FloatArray) -> tuple[FloatArray, FloatArray]:
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

    def vectors(self) -> Vectors:
        """Both means."""
        return Vectors(2, 2)

    def state(self) -> dict[str, NDArray[Any]]:
        """`mean` and `square` `[size]`: m and v; `steps` `[1]`, int64: t."""
        return {"mean": self._mean, "square": self._square, "steps": self._steps}


class DelayedNesterov(Optimizer):
    """Delayed Nesterov: the momentum moves on every N-th push only, by the mean of the last N gradients.

    u = g / N;  on each N-th push also m ← β·m + ḡ and u ← u + β·m.

    With N = 1 it is `Sgd` with nesterov.

    Args:
        spec: the hyperparameters.
        size: length of the slice.

    References:
        Liu et al., 2024: Asynchronous Local-SGD training for language modeling (algorithm 3, with c = 0).
    """

    def __init__(self, spec: DelayedNesterovOptimizer, size: int) -> None:
        super().__init__(size)
        self._spec = spec
        self._momentum = _scalar(spec.momentum)
        self._every = _scalar(spec.every)
        self._pushes = np.zeros(1, np.int64)
        self._sum = np.zeros(size, np.float32)
        self._velocity = np.zeros(size, np.float32)

    def _begin(self) -> Rule:
        self._pushes += 1
        if self._pushes[0] < self._spec.every:
            return self._share
        self._pushes[:] = 0
        return self._accelerate

    def _share(self, block: Block, gradient: FloatArray) -> FloatArray:
        total = self._sum[block.part]
        total += gradient
        return np.divide(gradient, self._every, out=block.scratch)

    def _accelerate(self, block: Block, gradient: FloatArray) -> FloatArray:
        u = self._share(block, gradient)
        total = self._sum[block.part]
        velocity = self._velocity[block.part]
        total /= self._every
        velocity *= self._momentum
        velocity += total
        u += np.multiply(velocity, self._momentum, out=total)
        total[:] = 0
        return u

    def vectors(self) -> Vectors:
        """The velocity and the sum."""
        return Vectors(2, 2)

    def state(self) -> dict[str, NDArray[Any]]:
        """`velocity` and `sum` `[size]`: m and Σg since it moved; `pushes` `[1]`, int64: how many those are."""
        return {"velocity": self._velocity, "sum": self._sum, "pushes": self._pushes}


def _plain(_: Block, gradient: FloatArray) -> FloatArray:
    return gradient


def _scalar(value: float) -> FloatArray:
    """`[]`, float32: NumPy multiplies by one in half the time that a Python float takes it to read."""
    return np.array(value, np.float32)


def build_optimizer(spec: OptimizerSpec, size: int) -> Optimizer:
    """The optimizer that a job asks for, for a slice of `size` values."""
    match spec:
        case SgdOptimizer():
            return Sgd(spec, size)
        case AdagradOptimizer():
            return Adagrad(spec, size)
        case AdamOptimizer() | AdamwOptimizer():
            return Adam(spec, size)
        case DelayedNesterovOptimizer():
            return DelayedNesterov(spec, size)
