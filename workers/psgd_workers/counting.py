"""Counts in messages: a number with its noun, in the singular or in the plural."""

__all__ = ["counted"]


def counted(number: float, noun: str, plural: str = "") -> str:
    """Return a number with its noun, such as `1 worker` or `2 workers`.

    Args:
        number: the count.
        noun: the noun in the singular.
        plural: the noun in the plural. Default: the singular with an s.
    """
    text = f"{number:g}" if isinstance(number, float) else str(number)
    return f"{text} {noun if number == 1 else plural or f'{noun}s'}"
