"""Where compiled code is kept on disk: a folder of the user's cache, by the content of the sources it was made from.

Numba itself looks only at the file of a function and at its path. But compiled code also contains constants and
functions of other files, and Ray copies psgd to another path for every cluster.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import numba
from numba.core import config, event
from numba.core.caching import UserWideCacheLocator

import psgd_workers
from psgd.core import server
from psgd.errors import NotCompiledError
from psgd.serving import compiled

__all__ = ["SourceCacheLocator", "only_cached_code", "own_cache"]

_config_lock = threading.Lock()


@cache
def _digest() -> str:
    """Return a digest of all sources whose code or constants are compiled, and of Numba's version."""
    folders = [*compiled.__path__, *server.__path__]
    files = sorted(file for folder in folders for file in Path(folder).glob("*.py"))
    names = ("messages.py", "transport/authentication.py", "transport/frames.py")
    files += [Path(psgd_workers.__path__[0], name) for name in names]
    digest = sha256(f"{numba.__version__} {config.BOUNDSCHECK}".encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


class SourceCacheLocator(UserWideCacheLocator):  # type: ignore[misc] # its types are not followed
    """Keeps compiled code in `numba/psgd-DIGEST` in the user's cache, or in the folder NUMBA_CACHE_DIR."""

    def __init__(self, function: Any, file: str) -> None:
        super().__init__(function, file)
        root = config.CACHE_DIR or Path(self.get_cache_path()).parent
        self._cache_path = str(Path(root, f"psgd-{_digest()}"))

    def get_source_stamp(self) -> str:
        """Return what the compiled code depends on."""
        return _digest()

    @classmethod
    def from_function(cls, function: Any, file: str) -> Self | None:
        """Return the locator of a function; None if the folder cannot be written."""
        locator: Self | None = super().from_function(function, file)
        return locator


@contextmanager
def own_cache() -> Iterator[None]:
    """Let the functions that are decorated meanwhile be kept by `SourceCacheLocator`, and no others."""
    with _config_lock:
        before = config.CACHE_LOCATOR_CLASSES
        config.CACHE_LOCATOR_CLASSES = f"{__name__}.{SourceCacheLocator.__name__}"
        try:
            yield
        finally:
            config.CACHE_LOCATOR_CLASSES = before


class _Refusal(event.Listener):  # type: ignore[misc] # its types are not followed
    """Refuses to compile functions of psgd whose code is kept on disk."""

    def on_start(self, compiling: Any) -> None:
        function = compiling.data["dispatcher"]
        if function.__module__.startswith(compiled.__name__) and function.stats.cache_path is not None:
            raise NotCompiledError(f"{function.stats.cache_path} has no code of {function.__name__} for this server")

    def on_end(self, compiling: Any) -> None:
        """Ignore the end of a compilation."""


@contextmanager
def only_cached_code() -> Iterator[None]:
    """Load compiled code of psgd from disk meanwhile, and compile none, unless code cannot be kept on disk at all.

    Raises:
        NotCompiledError: code is needed that is not on disk.
    """
    with event.install_listener("numba:compile", _Refusal()):
        yield
