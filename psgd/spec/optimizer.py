"""What a job says about how its servers step."""

from __future__ import annotations

from typing import Literal

from pydantic import AliasChoices, Field, model_validator

from psgd_workers.spec import Spec

__all__ = ["OptimizerSpec", "SgdOptimizer"]


class SgdOptimizer(Spec):
    """Stochastic gradient descent on the servers, equal to `torch.optim.SGD`."""

    name: Literal["sgd"] = "sgd"
    """Which optimizer."""
    lr: float = Field(gt=0, validation_alias=AliasChoices("lr", "learning_rate"))
    """Learning rate η, per step. Asynchronous runs bear a lower one: staleness acts like added momentum."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """μ in v ← μ·v + (1 - dampening)·g. Lower it as workers are added."""
    dampening: float = Field(default=0.0, ge=0, lt=1)
    """Share of a gradient kept out of the momentum."""
    nesterov: bool = False
    """Step by g + μ·v instead of v."""
    weight_decay: float = Field(default=0.0, ge=0)
    """λ in g ← g + λ·w."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Longer gradients are shortened to this Euclidean norm, each by itself, before any averaging."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SgdOptimizer:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                f"nesterov needs momentum above 0 and dampening 0, not {self.momentum} and {self.dampening}"
            )
        return self


OptimizerSpec = SgdOptimizer
