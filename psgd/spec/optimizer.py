"""The optimizer section of a job: the update rule of the servers, and the schedule of its learning rate."""

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

# Far smaller values are 0 in float32, and a gradient of 0 would become 0 / 0.
Eps = Annotated[float, Field(ge=1e-37)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _by_name(default: str) -> Discriminator:
    """Return a discriminator by `name`, where a mapping without a name means `default`."""

    def name(given: Any) -> str:
        return str(given.get("name", default) if isinstance(given, Mapping) else getattr(given, "name", default))

    return Discriminator(name)


class _Schedule(Spec):
    warmup: float = Field(default=0.0, ge=0)
    """Epochs of linear warm-up, 0 for none: the learning rate is multiplied by
    min(1, (examples so far + 1) / (warmup · examples per epoch)). The rest of the schedule runs meanwhile. Longer: a
    steadier and slower start."""


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
    """Factor of the learning rate at each change. Lower: it falls further. Above 1: it grows."""


class CosineSchedule(_Schedule):
    """After e epochs the learning rate is lr · (final + (1 - final) · (1 + cos(π · e / epochs)) / 2), and lr · final
    from `epochs` on.

    Up to `epochs` it equals `torch.optim.lr_scheduler.CosineAnnealingLR` with eta_min = lr · final.
    """

    name: Literal["cosine"]
    """The kind of schedule."""
    epochs: float = Field(gt=0)
    """Epochs over which the learning rate falls, usually as many as `run.epochs`. Higher: it stays high for longer."""
    final: float = Field(default=0.0, ge=0, le=1)
    """Share of `lr` that is left at the end. 0: a run that continues after `epochs` learns nothing more."""


ScheduleSpec = Annotated[
    Annotated[ConstantSchedule, Tag("constant")]
    | Annotated[StepSchedule, Tag("step")]
    | Annotated[CosineSchedule, Tag("cosine")],
    _by_name("constant"),
]


class _Optimizer(Spec):
    lr: float = Field(gt=0, validation_alias=AliasChoices("lr", "learning_rate"))
    """Learning rate η of each step; `learning_rate` means the same. Asynchronous modes need a lower one than a single
    process: staleness acts like additional momentum."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Each worker's gradient is scaled down to this Euclidean norm if it is longer, as by
    `torch.nn.utils.clip_grad_norm_`. null: no limit. Lower: outliers count less."""
    clip_value: float | None = Field(default=None, gt=0)
    """Each value of each worker's gradient is clipped to [-clip_value, clip_value], as by Keras' `clipvalue`. null: no
    limit. Lower: outliers count less, and the gradient's direction changes more."""
    schedule: ScheduleSpec = ConstantSchedule()
    """How the learning rate changes during the run, as a function of the examples trained on."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay d of an exponential moving average of the weights, avg ← d·avg + (1 - d)·w after each step. The average is
    validated instead of the weights; workers compute on the weights. null: no average. Higher: smoother and slower to
    follow."""


class SgdOptimizer(_Optimizer):
    """Stochastic gradient descent, equal to `torch.optim.SGD`."""

    name: Literal["sgd"] = "sgd"
    """The optimizer. The other fields of `optimizer` depend on it."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """μ in v ← μ·v + (1 - dampening)·g. The more workers, the lower it should be."""
    dampening: float = Field(default=0.0, ge=0, lt=1)
    """Share of each gradient that does not enter the momentum."""
    nesterov: bool = False
    """true: Nesterov's momentum, a step along g + μ·v instead of v. Needs `momentum` above 0 and `dampening` 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """λ in g ← g + λ·w (L2 regularisation). Higher: smaller weights."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SgdOptimizer:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                f"nesterov needs momentum above 0 and dampening 0, not {self.momentum} and {self.dampening}"
            )
        return self


class AdagradOptimizer(_Optimizer):
    """Adagrad (Duchi et al., 2011): the learning rate of each weight falls with the sum s of its squared gradients."""

    name: Literal["adagrad"]
    """The optimizer. The other fields of `optimizer` depend on it."""
    eps: Eps = 1e-10
    """ε in g / √(s + ε), inside the root as in Keras; PyTorch has it outside. Higher: smaller first steps."""
    initial_accumulator_value: float = Field(default=0.0, ge=0)
    """Initial value of the sum of squares s. 0: the first step is about η·sign(g). Higher: smaller first steps."""
    weight_decay: float = Field(default=0.0, ge=0)
    """λ in g ← g + λ·w (L2 regularisation). Higher: smaller weights."""


class _Adam(_Optimizer):
    betas: Annotated[tuple[Beta, Beta], Strict(False)] = Field(default=(0.9, 0.999), examples=[[0.9, 0.999]])
    """Decay rates of the running means of g and of g², as in PyTorch. Higher: steadier and slower to follow. Staleness
    acts like a higher first value."""
    eps: Eps = 1e-8
    """ε in m̂ / (√v̂ + ε). Higher: weights with small gradients move less."""


class AdamOptimizer(_Adam):
    """Steps by the running mean of g over the root of that of g² (Kingma & Ba, 2015), equal to `torch.optim.Adam`."""

    name: Literal["adam"]
    """The optimizer. The other fields of `optimizer` depend on it."""
    weight_decay: float = Field(default=0.0, ge=0)
    """λ in g ← g + λ·w (L2 regularisation). Higher: smaller weights."""


class AdamwOptimizer(_Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019), equal to `torch.optim.AdamW`."""

    name: Literal["adamw"]
    """The optimizer. The other fields of `optimizer` depend on it."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """λ in w ← w - η·λ·w, separate from the gradient's running means. Higher: smaller weights."""


class DelayedNesterovOptimizer(_Optimizer):
    """Delayed Nesterov (Liu et al., 2024): the momentum moves once in N pushes, so that it does not amplify staleness.

    N pushes together make a step along the mean of their gradients: for steps as large as those of `sgd`, `lr` must be
    N times as high.
    """

    name: Literal["delayed_nesterov"]
    """The optimizer. The other fields of `optimizer` depend on it."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """β in m ← β·m + ḡ, where ḡ is the mean of N gradients; each step includes β·m. Higher: faster along a steady
    slope, less stable."""
    every: Count
    """N, the pushes between two moves of the momentum, usually the number of workers. Higher: steadier, and the
    momentum lags behind."""


OptimizerSpec = Annotated[
    Annotated[SgdOptimizer, Tag("sgd")]
    | Annotated[AdagradOptimizer, Tag("adagrad")]
    | Annotated[AdamOptimizer, Tag("adam")]
    | Annotated[AdamwOptimizer, Tag("adamw")]
    | Annotated[DelayedNesterovOptimizer, Tag("delayed_nesterov")],
    _by_name("sgd"),
]
