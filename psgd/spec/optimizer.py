"""The optimizer section of a job: how a step changes the weights, and the schedule of the learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Discriminator, Field, Strict, Tag, model_validator

from psgd_workers.spec import Count, Spec

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

# Far smaller values are 0 in float32, and would turn a gradient of 0 into 0 / 0.
Eps = Annotated[float, Field(ge=1e-37)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _by_name(default: str) -> Discriminator:
    """Return a discriminator by the field `name`; a mapping without a name counts as `default`."""

    def name(given: Any) -> str:
        return str(given.get("name", default) if isinstance(given, Mapping) else getattr(given, "name", default))

    return Discriminator(name)


class _Schedule(Spec):
    warmup: float = Field(default=0.0, ge=0)
    """Epochs of linear warm-up: the learning rate of the schedule is multiplied by min(1, (examples so far + 1) /
    (warmup · examples per epoch)). 0: no warm-up. Longer: a steadier and slower start."""


class ConstantSchedule(_Schedule):
    """The learning rate stays `lr`."""

    name: Literal["constant"] = "constant"
    """The kind of schedule."""


class StepSchedule(_Schedule):
    """After e epochs the learning rate is lr · factor^⌊e / every⌋, as in `torch.optim.lr_scheduler.StepLR`."""

    name: Literal["step"]
    """The kind of schedule."""
    every: float = Field(gt=0)
    """Epochs between two changes of the learning rate; may be a fraction. Lower: it falls sooner."""
    factor: float = Field(default=0.1, gt=0)
    """Factor that multiplies the learning rate at each change. Lower: it falls further. Above 1: it grows."""


class CosineSchedule(_Schedule):
    """After e epochs the learning rate is lr · (final + (1 - final) · (1 + cos(π · e / epochs)) / 2), and lr · final
    from `epochs` on.

    Up to `epochs` it equals `torch.optim.lr_scheduler.CosineAnnealingLR` with eta_min = lr · final.
    """

    name: Literal["cosine"]
    """The kind of schedule."""
    epochs: float = Field(gt=0)
    """Number of epochs over which the learning rate falls, usually `run.epochs`. Higher: it stays high for longer."""
    final: float = Field(default=0.0, ge=0, le=1)
    """Share of `lr` that remains after `epochs`. 0: later epochs do not change the weights any more."""


ScheduleSpec = Annotated[
    Annotated[ConstantSchedule, Tag("constant")]
    | Annotated[StepSchedule, Tag("step")]
    | Annotated[CosineSchedule, Tag("cosine")],
    _by_name("constant"),
]


class _Optimizer(Spec):
    lr: float = Field(gt=0, validation_alias=AliasChoices("lr", "learning_rate"))
    """Learning rate η of each step. `learning_rate` is another name of this field. Asynchronous modes need a lower
    value than training in a single process, because staleness acts like additional momentum."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Largest Euclidean norm of each worker's gradient. A gradient with a larger norm is scaled down to it, as by
    `torch.nn.utils.clip_grad_norm_`. null: no limit. Lower: outliers count less."""
    clip_value: float | None = Field(default=None, gt=0)
    """Each value of each worker's gradient is clipped to [-clip_value, clip_value], as by Keras' `clipvalue`. null: no
    limit. Lower: outliers count less, and the direction of the gradient changes more."""
    schedule: ScheduleSpec = ConstantSchedule()
    """The change of the learning rate during the run, as a function of the number of examples trained on."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay d of an exponential moving average of the weights, avg ← d·avg + (1 - d)·w after each step. Validation uses
    the average instead of the weights w; training uses w. null: no average. Higher: a smoother average that follows the
    weights more slowly."""


class SgdOptimizer(_Optimizer):
    """Stochastic gradient descent, equal to `torch.optim.SGD`."""

    name: Literal["sgd"] = "sgd"
    """The optimizer. The other fields of `optimizer` depend on it."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Momentum μ in v ← μ·v + (1 - dampening)·g, where g is the gradient and v the direction of the step. With more
    workers it should be lower, because staleness acts like additional momentum."""
    dampening: float = Field(default=0.0, ge=0, lt=1)
    """Share of each gradient that is left out of v."""
    nesterov: bool = False
    """true: Nesterov's momentum, which steps along g + μ·v instead of v. Needs `momentum` above 0 and `dampening` 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """λ in g ← g + λ·w (L2 regularisation). Higher: smaller weights."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SgdOptimizer:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                f"nesterov needs momentum above 0 and dampening 0, but momentum is {self.momentum} and dampening is "
                f"{self.dampening}: set them, or set nesterov to false"
            )
        return self


class AdagradOptimizer(_Optimizer):
    """Adagrad (Duchi et al., 2011): the learning rate of each weight falls with the sum s of its squared gradients."""

    name: Literal["adagrad"]
    """The optimizer. The other fields of `optimizer` depend on it."""
    eps: Eps = 1e-10
    """ε in g / √(s + ε), inside the root as in Keras; in PyTorch it is outside. Higher: smaller first steps."""
    initial_accumulator_value: float = Field(default=0.0, ge=0)
    """Initial value of the sum of squares s. 0: the first step is about η·sign(g). Higher: smaller first steps."""
    weight_decay: float = Field(default=0.0, ge=0)
    """λ in g ← g + λ·w (L2 regularisation). Higher: smaller weights."""


class _Adam(_Optimizer):
    betas: Annotated[tuple[Beta, Beta], Strict(False)] = Field(default=(0.9, 0.999), examples=[[0.9, 0.999]])
    """Decay rates of the running means m of g and v of g², as in PyTorch. Higher: means that are steadier and follow
    more slowly. Staleness acts like a higher first rate."""
    eps: Eps = 1e-8
    """ε in m̂ / (√v̂ + ε). Higher: weights with small gradients move less."""


class AdamOptimizer(_Adam):
    """Adam (Kingma & Ba, 2015), equal to `torch.optim.Adam`: a step along m̂ / √v̂, where m̂ and v̂ are the
    bias-corrected running means of the gradient g and of g²."""

    name: Literal["adam"]
    """The optimizer. The other fields of `optimizer` depend on it."""
    weight_decay: float = Field(default=0.0, ge=0)
    """λ in g ← g + λ·w (L2 regularisation). Higher: smaller weights."""


class AdamwOptimizer(_Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019), equal to `torch.optim.AdamW`."""

    name: Literal["adamw"]
    """The optimizer. The other fields of `optimizer` depend on it."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """λ in w ← w - η·λ·w, which is separate from the running means. Higher: smaller weights."""


class DelayedNesterovOptimizer(_Optimizer):
    """Delayed Nesterov (Liu et al., 2024): the momentum is updated only after every N pushes, so that it does not
    amplify staleness.

    The steps of N pushes add up to one step along the mean of their gradients. For steps as large as those of `sgd`,
    `lr` must be N times as high.
    """

    name: Literal["delayed_nesterov"]
    """The optimizer. The other fields of `optimizer` depend on it."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """β in the update of the momentum m ← β·m + ḡ, where ḡ is the mean of N gradients. Each step includes β·m. Higher:
    faster along a steady slope, and less stable."""
    every: Count
    """Number N of pushes between two updates of the momentum, usually the number of workers. Higher: a steadier
    momentum that lags behind."""


OptimizerSpec = Annotated[
    Annotated[SgdOptimizer, Tag("sgd")]
    | Annotated[AdagradOptimizer, Tag("adagrad")]
    | Annotated[AdamOptimizer, Tag("adam")]
    | Annotated[AdamwOptimizer, Tag("adamw")]
    | Annotated[DelayedNesterovOptimizer, Tag("delayed_nesterov")],
    _by_name("sgd"),
]
