"""The correction section of a job: how a gradient is changed because it is stale."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from psgd_workers.spec import Spec

__all__ = [
    "CorrectionSpec",
    "DanaCorrection",
    "DcAsgdCorrection",
    "DelayAdaptiveCorrection",
    "GapAwareCorrection",
    "NoCorrection",
    "RescaledCorrection",
    "StalenessLrCorrection",
]


class _Correction(Spec):
    reads_weights: ClassVar[bool] = False  # a push carries the weights that the gradient was computed from


class NoCorrection(_Correction):
    """No correction: a stale gradient is used like a fresh one."""

    name: Literal["none"] = "none"
    """The kind of correction."""


class StalenessLrCorrection(_Correction):
    """The learning rate η is divided by the staleness τ of the gradient: η / max(1, τ)."""

    name: Literal["staleness_lr"]
    """The kind of correction."""


class DelayAdaptiveCorrection(_Correction):
    """The learning rate η is lowered for gradients whose staleness τ exceeds the number of workers n: η · n / max(n,
    τ)."""

    name: Literal["delay_adaptive"]
    """The kind of correction."""


class DcAsgdCorrection(_Correction):
    """Delay compensation (DC-ASGD): a gradient is replaced by a first-order estimate of the gradient at the current
    weights."""

    reads_weights: ClassVar[bool] = True
    name: Literal["dc_asgd"]
    """The kind of correction."""
    variant: Literal["constant", "adaptive"] = "constant"
    """`constant`: every weight has the same strength. `adaptive`: the strength of a weight is divided by the root of
    the running mean of its squared gradient."""
    strength: float | None = Field(default=None, ge=0)
    """λ in g + λ·g⊙g⊙(w - w_read), where g is the gradient, w the current weights, w_read the weights that g was
    computed from, and ⊙ multiplies element by element. null: 0.04 for `constant`, 2 for `adaptive`. Higher: more
    compensation, and less steady training."""


class GapAwareCorrection(_Correction):
    """Each value of a gradient is divided by 1 + d, where d is the distance that its weight has moved since the worker
    read it, measured in average steps."""

    reads_weights: ClassVar[bool] = True
    name: Literal["gap_aware"]
    """The kind of correction."""


class DanaCorrection(_Correction):
    """The servers keep a momentum for each worker. Instead of the current weights, a worker gets a prediction of the
    weights at the time when its gradient will arrive (DANA)."""

    name: Literal["dana"]
    """The kind of correction."""
    momentum: float = Field(gt=0, lt=1)
    """μ in vᵢ ← μ·vᵢ + g, where vᵢ is the momentum of worker i and g its gradient. It replaces the optimizer's
    momentum."""


class RescaledCorrection(_Correction):
    """The learning rate of a gradient is proportional to the mean time that its worker takes for a gradient, so that a
    fast worker, which sends more gradients, does not count more than a slow one."""

    name: Literal["rescaled"]
    """The kind of correction."""


CorrectionSpec = Annotated[
    DanaCorrection
    | DcAsgdCorrection
    | DelayAdaptiveCorrection
    | GapAwareCorrection
    | NoCorrection
    | RescaledCorrection
    | StalenessLrCorrection,
    Field(discriminator="name"),
]
