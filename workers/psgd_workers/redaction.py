"""Redaction of a text before it is shown or recorded: hides the passwords in URLs, and escapes control characters.

Errors of psgd are redacted when they are made (see `psgd_workers.errors`), because most URLs appear in errors.
"""

from __future__ import annotations

import re

__all__ = ["printable", "redact"]

HIDDEN = "***"
LONGEST_USER = 2000  # characters of a user with its password
# The second alternative: a colon without a port begins a password, which may contain a slash, although it should not.
USER = re.compile(
    rf"(?<=://)(?:[^\s/?#'\"<>]{{1,{LONGEST_USER}}}@(?=[^\s@])"
    rf"|[^\s/?#@:'\"<>\[]{{0,{LONGEST_USER}}}:(?![0-9]*[\s/?#'\"<>])[^\s@'\"<>]{{0,{LONGEST_USER}}}@(?=[^\s@]))"
)
PARAMETER = re.compile(  # in a query: a name that contains one of these words, and its value
    r"([?&;][\w.~%-]{0,60}?(?:token|key|secret|passw|pwd|sig|credential|auth|session)[\w.~%-]{0,60}=)[^\s&;#'\"<>]+",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """Return a text in which the user with its password, and the keys in the query, of each URL are `***`.

    Example:
        >>> redact("cannot read s3://me:secret@bucket/x?token=abc")
        'cannot read s3://***@bucket/x?token=***'
    """
    if "://" not in text:
        return text
    return PARAMETER.sub(rf"\1{HIDDEN}", USER.sub(f"{HIDDEN}@", text))


def printable(text: str) -> str:
    """Escape the control characters of a text, so that it stays on one line and cannot control the terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
