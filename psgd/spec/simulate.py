"""The simulate section of a job: simulated workers, the modes to compare, and when to stop.

Only `psgd simulate` reads this section, and its options replace the fields. Delays, modes and targets have a short
form:

    delays: lognormal:0,1                                {name: lognormal, mu: 0, sigma: 1}
    delays: slow:20,gamma,100,0.01                       {name: slow, factor: 20, base: {name: gamma, ...}}
    modes: async,ringmaster:r=32:lr=0.05                 [{consistency: {mode: async}}, {consistency: ..., lr: 0.05}]
    until: val/accuracy=0.97                             {metric: val/accuracy, value: 0.97}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, Strict, model_validator

from psgd.spec.consistency import ConsistencySpec
from psgd.spec.correction import CorrectionSpec
from psgd_workers.quoting import quoted
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

MAX_MODES = 100  # modes that one command compares

# Bounds of most parameters, so that every time drawn from a distribution is finite and above 0.
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
    """Log-normally distributed times, with median exp(mu). Short form: `lognormal:MU,SIGMA`."""

    name: Literal["lognormal"]
    """The distribution of the times. The other fields of `delays` depend on it."""
    mu: float = Field(ge=-20, le=20)
    """Mean of the logarithm of the time in seconds."""
    sigma: float = Field(ge=1e-12, le=10)
    """Standard deviation of the logarithm of the time in seconds. Higher: more very long times."""


class GammaDelays(Spec):
    """Gamma-distributed times, with mean shape · scale. Short form: `gamma:SHAPE,SCALE`."""

    name: Literal["gamma"]
    """The distribution of the times. The other fields of `delays` depend on it."""
    shape: Positive
    """Shape of the distribution. Higher: less spread around the mean."""
    scale: Positive
    """Scale of the distribution, in virtual seconds."""


class LinearDelays(Spec):
    """Each worker is slower than the one before: worker i, counted from 1, takes i · slope + |z| seconds, where z is
    drawn from a normal distribution of mean 0 and variance i · spread. Short form: `linear:SLOPE,SPREAD`."""

    name: Literal["linear"]
    """The distribution of the times. The other fields of `delays` depend on it."""
    slope: Positive
    """Increase of the time from each worker to the next, in virtual seconds."""
    spread: float = Field(ge=0, le=1e12)
    """Increase of the variance from each worker to the next, in square seconds."""


class MeasuredDelays(Spec):
    """Times drawn at random from the measured times of a run's workers. Short form: `measured:PATH`."""

    name: Literal["measured"]
    """The distribution of the times. The other fields of `delays` depend on it."""
    path: str = Field(min_length=1)
    """Directory of the run, such as `runs/digits`. Simulated worker i draws from the times of the run's worker i. If
    there are more simulated workers than the run had, the next one uses the times of the run's first worker, and so
    on."""


BaseDelays = Annotated[
    ConstantDelays | ExponentialDelays | LognormalDelays | GammaDelays | LinearDelays | MeasuredDelays,
    Field(discriminator="name"),
]


class SlowDelays(Spec):
    """The last worker is slower than the others. Short form: `slow:FACTOR` or `slow:FACTOR,NAME,ARG,...`."""

    name: Literal["slow"]
    """The distribution of the times. The other fields of `delays` depend on it."""
    factor: Positive
    """Factor that multiplies the times of the last worker."""
    base: BaseDelays = ConstantDelays(name="constant", seconds=1.0)
    """Distribution of the times of all workers, before those of the last worker are multiplied."""


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
    """Name of this mode in the results. null: the mode and its fields."""
    consistency: ConsistencySpec
    """The mode and its fields, as in the job's section `consistency`. If the short form names the job's
    own mode, fields that are not given have the job's values."""
    lr: float | None = Field(default=None, gt=0)
    """Learning rate in this mode, which replaces `optimizer.lr`. null: `optimizer.lr`."""
    correction: CorrectionSpec | None = None
    """Correction of stale gradients in this mode. null: no correction."""

    @property
    def label(self) -> str:
        """Name of this mode in the results."""
        mode, *fields = self.consistency.model_dump(exclude_unset=True).items()
        return self.name or ":".join([str(mode[1]), *(f"{name}={value}" for name, value in fields)])


class SimulationTarget(Spec):
    """A metric and its value at which a simulation ends. Short form: `METRIC=VALUE`."""

    metric: Literal["excess", "train/loss", "val/loss", "val/accuracy"]
    """The metric. `excess`: the value of the quadratic minus its minimum."""
    value: float
    """The simulation ends when the accuracy is at least this value, or another metric is at most this value."""

    def reached(self, value: float) -> bool:
        return value >= self.value if self.metric == "val/accuracy" else value <= self.value


def _expand_delays(given: Any) -> Any:
    """Return the fields that delays in short form stand for. Return anything else unchanged."""
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
        short_form = f"{name}:{','.join(field.upper() for field in fields)}"
        raise ValueError(f"expected {short_form}")
    return {"name": name} | dict(zip(fields, values, strict=False))


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text.strip()


def expand_modes(given: Any, own: ConsistencySpec | None = None) -> Any:
    """Return the fields that modes in short form stand for. Return anything else unchanged.

    Args:
        given: list of modes, or text with a comma between two modes.
        own: mode of the job itself, whose fields are the defaults of that mode; None if it is not known.
    """
    modes = given.split(",") if isinstance(given, str) else given
    if not isinstance(modes, list | tuple):
        return given
    if len(modes) > MAX_MODES:
        raise ValueError(f"expected at most {MAX_MODES} modes; {len(modes):,} are given")
    return [_expand_mode(mode, own) for mode in modes]


def _expand_mode(given: Any, own: ConsistencySpec | None) -> Any:
    if not isinstance(given, str):
        return given
    from psgd.spec.yaml_values import read_yaml  # here, because processes on a cluster import this module

    mode, *settings = given.strip().split(":")
    if not mode:
        raise ValueError("expected modes, such as async,ringmaster:r=32,bsp; one of them is empty")
    fields: dict[str, Any] = own.model_dump() if own is not None and own.mode == mode else {"mode": mode}
    others: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(
                f"expected FIELD=VALUE, such as r=32, in the mode {quoted(given.strip())}, not {quoted(setting)}"
            )
        value = read_yaml(text, f"the mode {quoted(given.strip())}")
        if name == "correction":
            others["correction"] = {"name": value}
        elif name == "lr" and mode != "local":
            others["lr"] = value
        else:
            fields[name] = value
    return {"name": given.strip(), "consistency": fields} | others


def _expand_target(given: Any) -> Any:
    """Return the fields that a target in short form stands for. Return anything else unchanged."""
    if not isinstance(given, str):
        return given
    metric, equals, value = given.partition("=")
    if not equals:
        raise ValueError("expected METRIC=VALUE, such as val/accuracy=0.97")
    return {"metric": metric.strip(), "value": _number(value)}


class SimulateConfig(Spec):
    """Settings of `psgd simulate`. Options of the command replace these fields."""

    workers: Count | None = None
    """Number of simulated workers. null: the largest number of workers that the job allows."""
    delays: Annotated[DelaysSpec, BeforeValidator(_expand_delays, json_schema_input_type=DelaysSpec | str)] = (
        ConstantDelays(name="constant", seconds=1.0)
    )
    """Distribution of the time that a worker takes for a gradient, in virtual seconds. It can be written in short form,
    such as `lognormal:0,1`."""
    modes: (
        Annotated[
            tuple[ContenderConfig, ...],
            Strict(False),
            Field(min_length=1, max_length=MAX_MODES),
            BeforeValidator(expand_modes, json_schema_input_type=list[ContenderConfig | str] | str),
        ]
        | None
    ) = None
    """Modes to compare. They can be written in short form, such as `async,ringmaster:r=32,bsp`. null: the job's own
    mode."""
    model: Literal["quadratic"] | None = None
    """`quadratic`: a noisy quadratic function is minimised, without the job's model and data. null: the job's model is
    trained on its data."""
    size: Whole = Field(default=100, ge=2)
    """Number of weights of the quadratic."""
    pushes: Count = 20_000
    """Number of gradients after which a simulation of the quadratic ends."""
    link_s: float = Field(default=0.0, ge=0, le=1e12)
    """Virtual seconds that a gradient takes to reach its server. The weights take as long to come back."""
    crash_s: float | None = Field(default=None, ge=1e-12, le=1e12)
    """Mean virtual seconds between two crashes of a worker. null: no worker crashes."""
    join_s: float = Field(default=0.0, ge=0, le=1e12)
    """Mean virtual seconds until a worker joins, at the start and after a crash."""
    seed: Whole = Field(default=0, ge=0, lt=2**63)
    """Seed of the random delays, crashes and joins."""
    until: (
        Annotated[SimulationTarget, BeforeValidator(_expand_target, json_schema_input_type=SimulationTarget | str)]
        | None
    ) = None
    """Metric and value at which a simulation ends. It can be written in short form, such as `val/accuracy=0.97`. null:
    no target."""

    @model_validator(mode="after")
    def _names_differ(self) -> SimulateConfig:
        names = [mode.label for mode in self.modes or ()]
        if repeated := sorted(name for name, number in Counter(names).items() if number > 1):
            raise ValueError(
                f"two of the modes are named {quoted(repeated[0])}: give different modes, or give each a name"
            )
        return self

    @model_validator(mode="after")
    def _metric_exists(self) -> SimulateConfig:
        if self.until is None or (self.until.metric == "excess") == (self.model == "quadratic"):
            return self
        if self.model == "quadratic":
            raise ValueError(f"until asks for {self.until.metric}, but a quadratic has only excess: use excess")
        raise ValueError(
            "until asks for excess, which only a quadratic has: use another metric, or set simulate.model to quadratic"
        )
