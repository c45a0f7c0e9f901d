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
    """No correction: a stale gradient counts like a fresh one."""

    name: Literal["none"] = "none"
    """The kind of correction."""


class StalenessLrCorrection(_Correction):
    """The learning rate is divided by the staleness τ: η / max(1, τ)."""

    name: Literal["staleness_lr"]
    """The kind of correction."""


class DelayAdaptiveCorrection(_Correction):
    """The learning rate is lowered only for gradients whose staleness τ exceeds the number of workers n:
    η · n / max(n, τ)."""

    name: Literal["delay_adaptive"]
    """The kind of correction."""


class DcAsgdCorrection(_Correction):
    """Delay compensation (DC-ASGD): a first-order estimate of the gradient at the present weights."""

    reads_weights: ClassVar[bool] = True
    name: Literal["dc_asgd"]
    """The kind of correction."""
    variant: Literal["constant", "adaptive"] = "constant"
    """`constant`: the same strength for every weight. `adaptive`: the strength is divided by the root of the running
    mean of the squared gradient."""
    strength: float | None = Field(default=None, ge=0)
    """λ in g + λ·g⊙g⊙(w - w_read). null: 0.04 for `constant`, 2 for `adaptive`. Higher: more is compensated, and
    training is less steady."""


class GapAwareCorrection(_Correction):
    """Each value is divided by the distance that its weight has moved since the worker read it, in units of a usual
    step."""

    reads_weights: ClassVar[bool] = True
    name: Literal["gap_aware"]
    """The kind of correction."""


class DanaCorrection(_Correction):
    """The servers keep one momentum per worker, and show each worker an estimate of the weights at the time when its
    gradient will arrive."""

    name: Literal["dana"]
    """The kind of correction."""
    momentum: float = Field(gt=0, lt=1)
    """μ in vᵢ ← μ·vᵢ + g. It replaces the optimizer's momentum."""


class RescaledCorrection(_Correction):
    """The learning rate is proportional to the worker's mean compute time: fast and slow workers count alike."""

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
