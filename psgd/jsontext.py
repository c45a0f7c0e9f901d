"""JSON as all of psgd writes and reads it.

Output is valid by RFC 8259: Infinity and NaN, which JSON does not have, become null. Input that is not valid JSON,
Infinity and NaN included, or that is larger or deeper than any file of psgd, raises a `DamagedFileError` that names
the file. The limits are checked before the text is parsed, because parsing takes many times its size in memory.
"""

from __future__ import annotations

import json
import re
from itertools import accumulate
from math import isfinite
from typing import Any, NoReturn

from psgd.errors import DamagedFileError

__all__ = ["MOST_BYTES", "MOST_DEPTH", "RECOVERY", "parse_json", "to_json"]

MOST_BYTES = 2**24  # size of a document
MOST_DEPTH = 64  # levels of lists and objects
MOST_VALUES = 500_000  # values of lists and objects; a value takes up to 200 bytes of memory
RECOVERY = "restore the file from a copy, or start a new run under another --name"
STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
NO_BRACKET = re.compile(r"[^\[\]{}]++")


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
        DamagedFileError: the text is empty, cut short, too large, nested too deeply, or not JSON.
    """
    try:
        return json.loads(_within_limits(text), parse_constant=_refuse_constant)
    except ValueError as error:
        reason = "it is empty" if not text.strip() else str(error)
        raise DamagedFileError(f"{source} is damaged ({reason}): {RECOVERY}") from error


def _within_limits(text: bytes) -> str:
    """Return a document as text, after checking its limits."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"it has {len(text):,} bytes, more than {MOST_BYTES:,}")
    decoded = text.decode()
    brackets = decoded.count("[") + decoded.count("{")
    if decoded.count(",") + brackets > MOST_VALUES:
        raise ValueError(f"it has more than {MOST_VALUES:,} values")
    if brackets > MOST_DEPTH and _depth(decoded) > MOST_DEPTH:
        raise ValueError(f"it is nested more than {MOST_DEPTH} levels deep")
    return decoded


def _depth(text: str) -> int:
    """Return the number of levels of lists and objects, and at least that number if the text is not JSON."""
    brackets = NO_BRACKET.sub("", STRING.sub("", text))
    return max(accumulate(1 if bracket in "[{" else -1 for bracket in brackets), default=0)


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")
