"""Commands for a run that trains: files that `psgd stop`, `set` and `scale` write into `commands/` of its directory.

The entries of this folder are not trusted, because any process may write there. The driver takes out a few entries at a
time, reads only regular files of bounded size, and refuses every other entry, and every file that is no command for it,
with a reason. See `Storage.take_out`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from psgd.errors import DamagedFileError, SpecError
from psgd.jsontext import parse_json
from psgd.store.foreign import TakenFile

__all__ = [
    "MOST_BYTES",
    "MOST_REASON",
    "MOST_TAKEN",
    "Command",
    "CommandKind",
    "Refusal",
    "make_command",
    "read_command",
]

MOST_BYTES = 64 * 1024  # size of a command's file
MOST_TAKEN = 16  # commands that the driver takes at a time
MOST_TEXT = 4096  # characters of a setting
MOST_REASON = 500  # characters of the reason for a refusal


CommandKind = Literal["stop", "set", "scale"]


class Command(BaseModel):
    """A command for the driver of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: str = Field(max_length=100)
    """Name of the command's file, without `.json`."""
    incarnation: int
    """Incarnation that `owner` named when the command was given. It identifies the driver that the command is for."""
    command: CommandKind
    """Kind of the command."""
    settings: list[Annotated[str, Field(max_length=MOST_TEXT)]] = Field(default=[], max_length=100)
    """For `set`, texts FIELD=VALUE. For `scale`, the number of workers. For `stop`, empty."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An entry of `commands/` that is no command for this driver."""

    id: str  # name of the entry, without `.json`
    reason: str


def make_command(identifier: str, incarnation: int, kind: CommandKind, settings: Sequence[str]) -> Command:
    """Return a command.

    Args:
        identifier: id of the command.
        incarnation: incarnation that identifies the driver which the command is for.
        kind: kind of the command.
        settings: texts FIELD=VALUE, or the number of workers.

    Raises:
        SpecError: a setting is too long, or there are too many.
    """
    try:
        return Command(id=identifier, incarnation=incarnation, command=kind, settings=[*settings])
    except ValidationError as error:
        raise SpecError(f"psgd {kind}: {_describe(error)}") from error


def read_command(file: TakenFile, first_incarnation: int) -> Command | Refusal:
    """Return the command that a file holds, or a refusal with the reason.

    Args:
        file: the file, taken out of `commands/`.
        first_incarnation: incarnation with which this driver began. A command for an earlier incarnation was meant for
            another driver.
    """
    name = file.name.removesuffix(".json")[:100]
    if file.data is None:
        return Refusal(name, file.fault)
    try:
        command = Command.model_validate(parse_json(file.data, f"commands/{file.name:.100}"))
    except DamagedFileError as error:
        return Refusal(name, f"it is not JSON: {error.__cause__}"[:MOST_REASON])
    except ValidationError as error:
        return Refusal(name, f"it is not a command: {_describe(error)}"[:MOST_REASON])
    if command.incarnation < first_incarnation:
        return Refusal(
            name,
            f"it was meant for incarnation {command.incarnation}, of an earlier driver; this driver began with "
            f"incarnation {first_incarnation}",
        )
    return command


def _describe(error: ValidationError) -> str:
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in faults[:5])
