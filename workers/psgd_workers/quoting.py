"""Quotes text from outside in messages: without the secrets of URLs, without control characters, and not too long."""

from __future__ import annotations

from psgd_workers.redaction import redact

__all__ = ["quoted", "shown"]

LONGEST_TEXT = 4096  # characters that are searched for secrets
LONGEST_SHOWN = 400  # characters
LONGEST_QUOTED = 60  # characters


def shown(text: str) -> str:
    """Return a path or a message of another library for use in a sentence: redacted, printable and shortened."""
    cut = redact(_printable(text[:LONGEST_TEXT]))
    if len(text) > LONGEST_TEXT:
        return f"{cut[:LONGEST_SHOWN]}..."
    half = LONGEST_SHOWN // 2
    return cut if len(cut) <= LONGEST_SHOWN else f"{cut[:half]}...{cut[-half:]}"


def quoted(text: str) -> str:
    """Return a text in quotes: redacted, with control characters escaped, and shortened."""
    cut = redact(text[:LONGEST_TEXT])
    if len(text) <= LONGEST_TEXT and len(cut) <= LONGEST_QUOTED:
        return repr(cut)
    return f"{cut[:LONGEST_QUOTED]!r}... ({len(text):,} characters)"


def _printable(text: str) -> str:
    return text if text.isprintable() else repr(text)[1:-1]
