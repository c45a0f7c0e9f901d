"""What a job says about how its servers step: the optimizer, and how its rate changes over the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Discriminator, Field, Tag, model_validator

from psgd_workers.spec import Spec

__all__ = [
    "AdagradOptimizer",
    "AdamOptimizer",
    "AdamwOptimizer",
    "ConstantSchedule",
    "CosineSchedule",
    "DelayedNesterovOptimizer",
    "OptimizerSpec",
    "ScheduleSpec",
    "SgdOptimizer",
    "StepSchedule",
]

# Far smaller ones are 0 in float32, and a gradient of 0 would become 0 / 0.
Eps = Annotated[float, Field(ge=1e-37)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _by_name(default: str) -> Discriminator:
    """Tells the members of a union by their `name`; a job that says none means `default`."""

    def name(given: Any) -> str:
        return str(given.get("name", default) if isinstance(given, Mapping) else getattr(given, "name", default))

    return Discriminator(name)


class _Schedule(Spec):
    warmup: float = Field(default=0.0, ge=0)
    """Epochs of linear warm-up: the rate is multiplied by min(1, (examples so far + 1) / (warmup · examples an epoch)),
    never by 0. The rest of the schedule does not wait for it. Longer: a steadier start, at the price of time."""


class ConstantSchedule(_Schedule):
    """η stays lr."""

    name: Literal["constant"] = "constant"
    """Which schedule."""


class StepSchedule(_Schedule):
    """η = lr · factor^⌊e / every⌋ after e epochs, equal to `torch.optim.lr_scheduler.StepLR`."""

    name: Literal["step"]
    """Which schedule."""
    every: float = Field(gt=0)
    """Epochs between two changes of the rate, a fraction if need be. Lower: the rate falls sooner."""
    factor: float = Field(default=0.1, gt=0)
    """What the rate is multiplied by at each change. Lower: it falls further; above 1 it grows."""


class CosineSchedule(_Schedule):
    """η = lr · (final + (1 - final) · (1 + cos(π · e / epochs)) / 2) after e epochs, and lr · final from `epochs` on.

    Equal to `torch.optim.lr_scheduler.CosineAnnealingLR` with its eta_min = lr · final, up to `epochs`.
    """

    name: Literal["cosine"]
    """Which schedule."""
    epochs: float = Field(gt=0)
    """Epochs over which the rate falls, usually the run's. Higher: it stays high for longer."""
    final: float = Field(default=0.0, ge=0, le=1)
    """Share of lr that is left at the end. 0: a run that goes on after `epochs` learns nothing more."""


ScheduleSpec = Annotated[
    Annotated[ConstantSchedule, Tag("constant")]
    | Annotated[StepSchedule, Tag("step")]
    | Annotated[CosineSchedule, Tag("cosine")],
    _by_name("constant"),
]


class _Optimizer(Spec):
    lr: float = Field(gt=0, validation_alias=AliasChoices("lr", "learning_rate"))
    """Learning rate η, per step. Asynchronous runs bear a lower one: staleness acts like added momentum."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Longer gradients are shortened to this Euclidean norm, each by itself, before any averaging. Lower: outliers
    weigh less, and from some point on every gradient is shortened."""
    clip_value: float | None = Field(default=None, gt=0)
    """Each value of a gradient is clipped to [-clip_value, clip_value], before any averaging. Lower: outliers weigh
    less, and the gradient's direction is bent more."""
    schedule: ScheduleSpec = ConstantSchedule()
    """How the rate changes over the run, as a function of the examples counted."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay d of an exponential moving average of the weights, avg ← d·avg + (1 - d)·w after each step, which is then
    what is validated. Higher: smoother, and slower to follow. Workers compute on the weights themselves."""


class SgdOptimizer(_Optimizer):
    """Stochastic gradient descent on the servers, equal to `torch.optim.SGD`."""

    name: Literal["sgd"] = "sgd"
    """Which optimizer."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """μ in v ← μ·v + (1 - dampening)·g. Lower it as workers are added."""
    dampening: float = Field(default=0.0, ge=0, lt=1)
    """Share of a gradient kept out of the momentum."""
    nesterov: bool = False
    """Step by g + μ·v instead of v."""
    weight_decay: float = Field(default=0.0, ge=0)
    """λ in g ← g + λ·w. Higher: smaller weights."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SgdOptimizer:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                f"nesterov needs momentum above 0 and dampening 0, not {self.momentum} and {self.dampening}"
            )
        return self


class AdagradOptimizer(_Optimizer):
    """Each weight's rate falls with the squares of its gradients so far (Duchi et al., 2011), as in Downpour SGD."""

    name: Literal["adagrad"]
    """Which optimizer."""
    eps: Eps = 1e-10
    """ε in g / √(s + ε): inside the root, as in Keras; torch has it outside. Higher: smaller first steps."""
    initial_accumulator_value: float = Field(default=0.0, ge=0)
    """Where the sum of squares s starts. Higher: smaller first steps; 0: the first step is about η·sign(g)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """λ in g ← g + λ·w. Higher: smaller weights."""


class _Adam(_Optimizer):
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Shares of the running means of g and of g² that one step keeps. Higher: steadier, slower to follow. Staleness
    acts like a higher first one."""
    eps: Eps = 1e-8
    """ε in m̂ / (√v̂ + ε). Higher: weights with small gradients move less."""


class AdamOptimizer(_Adam):
    """Steps by the running mean of g over the root of that of g² (Kingma & Ba, 2015), equal to `torch.optim.Adam`."""

    name: Literal["adam"]
    """Which optimizer."""
    weight_decay: float = Field(default=0.0, ge=0)
    """λ in g ← g + λ·w. Higher: smaller weights."""


class AdamwOptimizer(_Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019), equal to `torch.optim.AdamW`."""

    name: Literal["adamw"]
    """Which optimizer."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """λ in w ← w - η·λ·w, apart from the gradient's means. Higher: smaller weights."""


class DelayedNesterovOptimizer(_Optimizer):
    """Nesterov's momentum that moves once in N pushes (Liu et al., 2024), so that staleness is not amplified by it.

    N pushes together step by the mean of their gradients: lr is N times that of `sgd` for steps of the same size.
    """

    name: Literal["delayed_nesterov"]
    """Which optimizer."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """β in m ← β·m + ḡ, of which β·m is stepped by. Higher: faster along a steady slope, less stable."""
    every: int = Field(ge=1)
    """N: pushes to one move of the momentum, usually the number of workers. Higher: steadier, and the momentum lags."""


OptimizerSpec = Annotated[
    Annotated[SgdOptimizer, Tag("sgd")]
    | Annotated[AdagradOptimizer, Tag("adagrad")]
    | Annotated[AdamOptimizer, Tag("adam")]
    | Annotated[AdamwOptimizer, Tag("adamw")]
    | Annotated[DelayedNesterovOptimizer, Tag("delayed_nesterov")],
    _by_name("sgd"),
]
