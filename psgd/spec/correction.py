"""What a job says about what staleness does to a gradient."""

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
    reads_weights: ClassVar[bool] = False
    """Whether a push must bring the weights along that the gradient was computed from."""


class NoCorrection(_Correction):
    """A stale gradient counts like any other."""

    name: Literal["none"] = "none"
    """Which correction."""


class StalenessLrCorrection(_Correction):
    """The rate is divided by the staleness: η / max(1, τ)."""

    name: Literal["staleness_lr"]
    """Which correction."""


class DelayAdaptiveCorrection(_Correction):
    """The rate is lowered only for gradients staler than there are workers: η · n / max(n, τ)."""

    name: Literal["delay_adaptive"]
    """Which correction."""


class DcAsgdCorrection(_Correction):
    """Delay compensation: the gradient as it would be at the present weights, to first order."""

    reads_weights: ClassVar[bool] = True
    name: Literal["dc_asgd"]
    """Which correction."""
    variant: Literal["constant", "adaptive"] = "constant"
    """`adaptive` divides the strength by the root of the running mean of the squared gradient."""
    strength: float | None = Field(default=None, ge=0)
    """λ in g + λ·g⊙g⊙(w - w_read). Default: 0.04, or 2 for `adaptive`. Higher: more is compensated, less steadily."""


class GapAwareCorrection(_Correction):
    """Each value is divided by how far its weight has moved since it was read, in units of a usual step."""

    reads_weights: ClassVar[bool] = True
    name: Literal["gap_aware"]
    """Which correction."""


class DanaCorrection(_Correction):
    """A momentum for each worker, and workers are shown where the momenta will have taken the weights."""

    name: Literal["dana"]
    """Which correction."""
    momentum: float = Field(gt=0, lt=1)
    """μ in vᵢ ← μ·vᵢ + g. It takes the place of the optimizer's."""


class RescaledCorrection(_Correction):
    """The rate is proportional to the worker's mean compute time, so that fast workers weigh no more than slow ones."""

    name: Literal["rescaled"]
    """Which correction."""


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
