"""JSON as all of psgd writes and reads it.

Output is valid by RFC 8259: Infinity and NaN, which JSON does not have, become null. Input that is not valid JSON,
Infinity and NaN included, raises a `DamagedFileError` that names the file.
"""

from __future__ import annotations

import json
from math import isfinite
from typing import Any, NoReturn

from psgd.errors import DamagedFileError

__all__ = ["parse_json", "to_json"]


def to_json(value: Any, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """Return plain values as JSON text. Numbers that are not finite become null."""
    try:
        return json.dumps(value, indent=indent, sort_keys=sort_keys, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, sort_keys=sort_keys, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {_finite_key(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _finite_key(key: Any) -> Any:
    return str(key) if isinstance(key, float) else key


def parse_json(text: bytes, source: str) -> Any:
    """Parse a JSON document.

    Args:
        text: document, in UTF-8.
        source: name of the file, for the error.

    Raises:
        DamagedFileError: the text is empty, cut short, nested too deeply, or not JSON.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is empty" if not text.strip() else str(error)
        raise DamagedFileError(
            f"{source} is damaged ({reason}): restore the file from a copy, or start a new run under another --name"
        ) from error


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")
