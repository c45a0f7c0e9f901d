"""A data file, anywhere fsspec reaches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from psgd_workers.errors import DataError

__all__ = ["open_file"]


@contextmanager
def open_file(path: str, mode: str, **options: Any) -> Iterator[Any]:
    """Open a data file for reading.

    Args:
        path: a path, or any URL that fsspec opens.
        mode: `rb` or `rt`.
        options: `encoding` and `newline`, as of the builtin `open`.

    Raises:
        DataError: the path cannot be opened, or reading it failed.
    """
    try:
        opening = fsspec.open(path, mode, **options)
    except (ImportError, ValueError) as error:  # no package for the protocol; an unknown one
        raise DataError(f"cannot open {path}: {error}; give a path, or a URL that fsspec can open here") from error
    try:
        with opening as file:
            yield file
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; check data.path, which every machine must reach") from error
    except PermissionError as error:
        raise DataError(f"{path} may not be read by this user; change its permissions or data.path") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}; check data.path") from error
