"""The simulate section of a job: imaginary workers, the modes to compare, and when to stop.

Only `psgd simulate` reads it, whose options win over it. Delays, modes and targets may be written in a short form:

    delays: lognormal:0,1                                {name: lognormal, mu: 0, sigma: 1}
    delays: slow:20,gamma,100,0.01                       {name: slow, factor: 20, base: {name: gamma, ...}}
    modes: async,ringmaster:r=32:lr=0.05                 [{consistency: {mode: async}}, {consistency: ..., lr: 0.05}]
    until: val/accuracy=0.97                             {metric: val/accuracy, value: 0.97}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, Strict, model_validator

from psgd.spec.consistency import ConsistencySpec
from psgd.spec.correction import CorrectionSpec
from psgd_workers.spec import Count, Spec, Whole

__all__ = [
    "ConstantDelays",
    "ContenderConfig",
    "DelaysSpec",
    "ExponentialDelays",
    "GammaDelays",
    "LinearDelays",
    "LognormalDelays",
    "MeasuredDelays",
    "SimulateConfig",
    "SimulationTarget",
    "SlowDelays",
    "expand_modes",
]

# Bounds of most parameters, so that a time that is drawn from them stays finite and above 0.
Positive = Annotated[float, Field(ge=1e-12, le=1e12)]


class ConstantDelays(Spec):
    """Every gradient takes the same time. Short form: `constant:SECONDS`."""

    name: Literal["constant"]
    """The distribution of the times. The other fields of `delays` depend on it."""
    seconds: Positive
    """Time of each gradient, in virtual seconds."""


class ExponentialDelays(Spec):
    """Exponentially distributed times. Short form: `exponential:MEAN`."""

    name: Literal["exponential"]
    """The distribution of the times. The other fields of `delays` depend on it."""
    mean: Positive
    """Mean time of a gradient, in virtual seconds."""


class LognormalDelays(Spec):
    """Times whose logarithm is normally distributed; the median is exp(mu). Short form: `lognormal:MU,SIGMA`."""

    name: Literal["lognormal"]
    """The distribution of the times. The other fields of `delays` depend on it."""
    mu: float = Field(ge=-20, le=20)
    """Mean of the logarithm of the seconds."""
    sigma: float = Field(ge=1e-12, le=10)
    """Standard deviation of the logarithm of the seconds. Higher: a longer tail."""


class GammaDelays(Spec):
    """Gamma-distributed times of mean shape · scale. Short form: `gamma:SHAPE,SCALE`."""

    name: Literal["gamma"]
    """The distribution of the times. The other fields of `delays` depend on it."""
    shape: Positive
    """Shape of the distribution. Higher: less spread about the mean."""
    scale: Positive
    """Scale of the distribution, in virtual seconds."""


class LinearDelays(Spec):
    """Worker i, counted from 1, takes i · slope + |N(0, i · spread)|. Short form: `linear:SLOPE,SPREAD`."""

    name: Literal["linear"]
    """The distribution of the times. The other fields of `delays` depend on it."""
    slope: Positive
    """Seconds that each worker takes longer than the one before."""
    spread: float = Field(ge=0, le=1e12)
    """Variance that each worker has more than the one before, in square seconds."""


class MeasuredDelays(Spec):
    """Times drawn from those that the workers of a run took. Short form: `measured:PATH`."""

    name: Literal["measured"]
    """The distribution of the times. The other fields of `delays` depend on it."""
    path: str = Field(min_length=1)
    """Directory of the run, such as `runs/digits`. Imaginary worker i draws from the times of the run's worker i; if
    there are more imaginary workers, they begin again with the first."""


BaseDelays = Annotated[
    ConstantDelays | ExponentialDelays | LognormalDelays | GammaDelays | LinearDelays | MeasuredDelays,
    Field(discriminator="name"),
]


class SlowDelays(Spec):
    """The last worker is slower than the others. Short form: `slow:FACTOR` or `slow:FACTOR,NAME,ARG,...`."""

    name: Literal["slow"]
    """The distribution of the times. The other fields of `delays` depend on it."""
    factor: Positive
    """Factor of the last worker's times."""
    base: BaseDelays = ConstantDelays(name="constant", seconds=1.0)
    """Times of the other workers, and of the last one before they are multiplied."""


DelaysSpec = Annotated[
    ConstantDelays | ExponentialDelays | LognormalDelays | GammaDelays | LinearDelays | SlowDelays | MeasuredDelays,
    Field(discriminator="name"),
]
PARAMETERS: Mapping[str, type[BaseModel]] = {
    "constant": ConstantDelays,
    "exponential": ExponentialDelays,
    "lognormal": LognormalDelays,
    "gamma": GammaDelays,
    "linear": LinearDelays,
}


class ContenderConfig(Spec):
    """One of the modes to compare. Short form: `MODE:FIELD=VALUE:...`, such as `ringmaster:r=32:lr=0.05`."""

    name: str | None = Field(default=None, min_length=1)
    """Name in the results. null: the mode and its fields."""
    consistency: ConsistencySpec
    """The mode and its fields, as in the job's `consistency`. In the short form, the job's own mode keeps the job's
    fields."""
    lr: float | None = Field(default=None, gt=0)
    """Learning rate in place of `optimizer.lr`. null: the job's."""
    correction: CorrectionSpec | None = None
    """Correction in this mode. null: none."""

    @property
    def label(self) -> str:
        """Name in the results."""
        mode, *fields = self.consistency.model_dump(exclude_unset=True).items()
        return self.name or ":".join([str(mode[1]), *(f"{name}={value}" for name, value in fields)])


class SimulationTarget(Spec):
    """A metric that is good enough. Short form: `METRIC=VALUE`."""

    metric: Literal["excess", "train/loss", "val/loss", "val/accuracy"]
    """The metric. `excess`: the distance of a quadratic from its minimum."""
    value: float
    """The simulation ends when an accuracy is at least this value, or another metric at most this value."""

    def reached(self, value: float) -> bool:
        return value >= self.value if self.metric == "val/accuracy" else value <= self.value


def _expand_delays(given: Any) -> Any:
    """Return the fields of delays in short form, and anything else as it is."""
    if not isinstance(given, str):
        return given
    name, _, arguments = given.strip().partition(":")
    return _delays(name, arguments)


def _delays(name: str, arguments: str) -> dict[str, Any]:
    if name == "slow":
        factor, _, base = arguments.partition(",")
        inner, _, rest = base.partition(",")
        return {"name": name, "factor": _number(factor)} | ({"base": _delays(inner, rest)} if base else {})
    if name == "measured":
        return {"name": name, "path": arguments}
    fields = list(PARAMETERS[name].model_fields)[1:] if name in PARAMETERS else []
    values = [_number(argument) for argument in arguments.split(",")] if arguments else []
    if fields and len(values) > len(fields):
        form = f"{name}:{','.join(field.upper() for field in fields)}"
        raise ValueError(f"expected {form}")
    return {"name": name} | dict(zip(fields, values, strict=False))


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text.strip()


def expand_modes(given: Any, own: ConsistencySpec | None = None) -> Any:
    """Return the fields of modes in short form, and anything else as it is.

    Args:
        given: a list of modes, or a text with commas between them.
        own: the job's own mode, whose fields are kept; None: they are not known.
    """
    modes = given.split(",") if isinstance(given, str) else given
    return [_expand_mode(mode, own) for mode in modes] if isinstance(modes, list | tuple) else given


def _expand_mode(given: Any, own: ConsistencySpec | None) -> Any:
    if not isinstance(given, str):
        return given
    from psgd.spec.yaml_values import read_yaml  # processes of a cluster import this module, and read no YAML

    mode, *settings = given.strip().split(":")
    if not mode:
        raise ValueError("expected modes, such as async,ringmaster:r=32,bsp; one of them is empty")
    fields: dict[str, Any] = own.model_dump() if own is not None and own.mode == mode else {"mode": mode}
    others: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"expected FIELD=VALUE, such as r=32, in the mode {given.strip()!r}, not {setting!r}")
        value = read_yaml(text, f"the mode {given.strip()!r}")
        if name == "correction":
            others["correction"] = {"name": value}
        elif name == "lr" and mode != "local":
            others["lr"] = value
        else:
            fields[name] = value
    return {"name": given.strip(), "consistency": fields} | others


def _expand_target(given: Any) -> Any:
    """Return the fields of a target in short form, and anything else as it is."""
    if not isinstance(given, str):
        return given
    metric, equals, value = given.partition("=")
    if not equals:
        raise ValueError("expected METRIC=VALUE, such as val/accuracy=0.97")
    return {"metric": metric.strip(), "value": _number(value)}


class SimulateConfig(Spec):
    """What `psgd simulate` simulates. Its options win over these fields."""

    workers: Count | None = None
    """Number of imaginary workers. null: as many as the job has at most."""
    delays: Annotated[DelaysSpec, BeforeValidator(_expand_delays, json_schema_input_type=DelaysSpec | str)] = (
        ConstantDelays(name="constant", seconds=1.0)
    )
    """Time that a worker takes for a gradient, in virtual seconds. Also in short form, such as `lognormal:0,1`."""
    modes: (
        Annotated[
            tuple[ContenderConfig, ...],
            Strict(False),
            Field(min_length=1),
            BeforeValidator(expand_modes, json_schema_input_type=list[ContenderConfig | str] | str),
        ]
        | None
    ) = None
    """Modes to compare. Also in short form, such as `async,ringmaster:r=32,bsp`. null: the job's own mode."""
    model: Literal["quadratic"] | None = None
    """`quadratic`: a noisy quadratic in place of the job's model and data. null: the job's model and data."""
    size: Whole = Field(default=100, ge=2)
    """Number of parameters of the quadratic."""
    pushes: Count = 20_000
    """Largest number of gradients of the quadratic."""
    link_s: float = Field(default=0.0, ge=0, le=1e12)
    """Virtual seconds that a gradient takes to its server, and that the weights take back."""
    crash_s: float | None = Field(default=None, ge=1e-12, le=1e12)
    """Mean virtual seconds between two crashes of a worker. null: no worker crashes."""
    join_s: float = Field(default=0.0, ge=0, le=1e12)
    """Mean virtual seconds until a worker joins, at first and after a crash."""
    seed: Whole = Field(default=0, ge=0, lt=2**63)
    """Seed of the delays, the crashes and the joins."""
    until: (
        Annotated[SimulationTarget, BeforeValidator(_expand_target, json_schema_input_type=SimulationTarget | str)]
        | None
    ) = None
    """Metric and value at which a simulation ends. Also in short form, such as `val/accuracy=0.97`. null: none."""

    @model_validator(mode="after")
    def _names_differ(self) -> SimulateConfig:
        names = [mode.label for mode in self.modes or ()]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two of the modes are named {repeated[0]!r}: give different modes, or name them")
        return self

    @model_validator(mode="after")
    def _metric_exists(self) -> SimulateConfig:
        if self.until and (self.until.metric == "excess") != (self.model == "quadratic"):
            raise ValueError(
                f"until asks for {self.until.metric}: a quadratic has only excess, and the job's own model has the "
                "other metrics"
            )
        return self
