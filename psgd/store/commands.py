"""Commands for a run that trains: files that `psgd stop`, `set` and `scale` leave in its directory's `commands/`.

Whatever lies there is data from outside. The driver takes it out a few entries at a time, reads regular files of a
bounded size alone, and refuses with a reason what is no command for it. See `Storage.take_out`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from psgd.errors import DamagedFileError, SpecError
from psgd.jsontext import parse_json
from psgd.store.foreign import TakenFile

__all__ = ["MOST_BYTES", "MOST_REASON", "MOST_TAKEN", "Command", "Kind", "Refusal", "make_command", "read_command"]

MOST_BYTES = 64 * 1024  # of a command's file
MOST_TAKEN = 16  # commands, at a time
MOST_TEXT = 4096  # characters of a setting
MOST_REASON = 500  # characters


Kind = Literal["stop", "set", "scale"]


class Command(BaseModel):
    """One command."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: str = Field(max_length=100)
    """Name of its file, without `.json`."""
    incarnation: int
    """Incarnation of the driver that it is meant for, as `owner` said when the command was given."""
    command: Kind
    """What to do."""
    settings: list[Annotated[str, Field(max_length=MOST_TEXT)]] = Field(default=[], max_length=100)
    """`set`: FIELD=VALUE each. `scale`: the number of workers."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An entry of `commands/` that is no command for this driver."""

    id: str
    reason: str


def make_command(identifier: str, incarnation: int, kind: Kind, settings: Sequence[str]) -> Command:
    """Return a command for the driver of an incarnation.

    Raises:
        SpecError: the settings are too long, or too many.
    """
    try:
        return Command(id=identifier, incarnation=incarnation, command=kind, settings=[*settings])
    except ValidationError as error:
        raise SpecError(f"psgd {kind}: {_faults(error)}") from error


def read_command(file: TakenFile, first_incarnation: int) -> Command | Refusal:
    """Return the command that a file holds, or why it is none.

    Args:
        file: taken out of `commands/`.
        first_incarnation: with which the driver began; a command for an earlier one was meant for another driver.
    """
    name = file.name.removesuffix(".json")[:100]
    if file.data is None:
        return Refusal(name, file.fault)
    try:
        command = Command.model_validate(parse_json(file.data, f"commands/{file.name:.100}"))
    except DamagedFileError as error:
        return Refusal(name, f"it is no JSON: {error.__cause__}"[:MOST_REASON])
    except ValidationError as error:
        return Refusal(name, f"it is no command: {_faults(error)}"[:MOST_REASON])
    if command.incarnation < first_incarnation:
        return Refusal(
            name,
            f"it was meant for incarnation {command.incarnation}, of an earlier driver; this driver began with "
            f"{first_incarnation}",
        )
    return command


def _faults(error: ValidationError) -> str:
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in faults[:5])
