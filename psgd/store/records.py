"""Parsing and checking of a run's JSON files: `owner`, `result.json`, `events.jsonl`, `metrics.jsonl` and others.

A file that is empty, truncated, too large or has other content raises one typed error that names the file. In a
JSON-lines file, a line that a crash truncated is skipped.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from psgd.errors import DamagedFileError
from psgd.jsontext import RECOVERY, parse_json, to_json
from psgd.result import Result
from psgd.store.owner import Owner

__all__ = ["describe", "parse_document", "parse_lines"]

Time = Annotated[float, Field(ge=0, le=253_402_128_000)]  # Unix seconds, in the year 9999 in every time zone
Number = Annotated[int, Field(ge=0, lt=2**63)]
CheckpointName = Annotated[str, Field(pattern=r"^[0-9]+-[0-9]+$", max_length=40)]
CHECKPOINT_NAME = TypeAdapter[str | None](CheckpointName | None)
KINDS = {  # event -> fields with the numbers, and field with the name of a checkpoint, that a replay needs
    "started": (("incarnation",), "resumed"),
    "server_started": (("incarnation", "partition"), "checkpoint"),
    "checkpoint": ((), "name"),
}


class _Environment(BaseModel):
    """The content of `env.json`."""

    python: str
    platform: str
    packages: dict[str, str]


class _PartMetadata(BaseModel):
    """The content of `server-N.json` in a checkpoint. Its further fields are those of `ParameterServer.state`."""

    model_config = ConfigDict(extra="allow")

    version: tuple[Number, Number]
    partition: tuple[Number, Number, Number, Number]
    epochs: Number
    settings: dict[str, Any]


class _Heartbeat(BaseModel):
    """The content of `heartbeat`."""

    time: Time


class _Event(BaseModel):
    """A line of `events.jsonl`. Its further fields depend on `event`."""

    model_config = ConfigDict(extra="allow")

    time: Time
    event: str
    incarnation: Number | None = None
    partition: Number | None = None
    workers: Number | dict[str, Number] | None = None
    servers: Number | None = None
    resumed: CheckpointName | None = None
    checkpoint: Any = None
    name: Any = None

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        numbers, checkpoint = KINDS.get(self.event, ((), None))
        missing = [name for name in numbers if getattr(self, name) is None]
        if checkpoint is not None and checkpoint not in self.model_fields_set:
            missing.append(checkpoint)
        if missing:
            raise ValueError(f"event {self.event!r} lacks {', '.join(missing)}")
        if checkpoint is not None:
            CHECKPOINT_NAME.validate_python(getattr(self, checkpoint))
        return self


class _Metrics(BaseModel):
    """A line of `metrics.jsonl`."""

    model_config = ConfigDict(extra="allow")

    time: Time


DOCUMENTS: dict[str, TypeAdapter[Any]] = {
    "owner": TypeAdapter(Owner),
    "heartbeat": TypeAdapter(_Heartbeat),
    "env.json": TypeAdapter(_Environment),
    "server.json": TypeAdapter(_PartMetadata),
    "result.json": TypeAdapter(Result),
}
LINES: dict[str, TypeAdapter[Any]] = {"events.jsonl": TypeAdapter(_Event), "metrics.jsonl": TypeAdapter(_Metrics)}
OBJECT = TypeAdapter(dict[str, Any])


def parse_document(name: str, text: bytes, source: str) -> dict[str, Any]:
    """Parse and check a JSON file of a run.

    Args:
        name: name of the file in the run's directory; `server.json` for the metadata of a checkpoint's part.
        text: content of the file.
        source: path or URL of the file, for the error message.

    Raises:
        DamagedFileError: the content is not what psgd writes into this file.
    """
    return _checked(DOCUMENTS.get(name, OBJECT), parse_json(text, source), source)


def parse_lines(name: str, text: bytes, source: str) -> list[dict[str, Any]]:
    """Parse and check a JSON-lines file of a run. A line that is not JSON, because a crash truncated it, is skipped.

    Args:
        name: name of the file in the run's directory.
        text: content of the file.
        source: path or URL of the file, for the error message.

    Raises:
        DamagedFileError: a line is JSON, but not what psgd writes into this file.
    """
    model = LINES.get(name, OBJECT)
    records = []
    for number, line in enumerate(text.split(b"\n"), 1):
        where = f"{source}, line {number},"
        try:
            record = parse_json(line, where)
        except DamagedFileError:
            continue
        records.append(_checked(model, record, where))
    return records


def _checked(model: TypeAdapter[Any], tree: Any, source: str) -> dict[str, Any]:
    try:
        model.validate_json(to_json(tree), strict=True)
        return OBJECT.validate_python(tree)
    except ValidationError as error:
        raise DamagedFileError(f"{source} is damaged ({describe(error)}): {RECOVERY}") from error


def describe(error: ValidationError) -> str:
    """Describe the first fault of a validation, with the path to its field."""
    fault = error.errors(include_url=False, include_input=False)[0]
    return ": ".join([*(str(step) for step in fault["loc"]), fault["msg"].removeprefix("Value error, ")])[:500]
