"""Loads a compiled push path of a server, unless it is switched off or cannot be had here."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from psgd.core.server.parameter_server import ParameterServer
from psgd.errors import NotCompiledError
from psgd.serving.server_lock import ServerLock

if TYPE_CHECKING:
    from psgd.serving.compiled.direct import DirectPath
    from psgd.serving.compiled.path import CompiledPath

__all__ = ["SWITCH", "load_direct_path", "load_path"]

log = logging.getLogger("psgd.lanes")

Path = TypeVar("Path")

SWITCH = "PSGD_COMPILE"  # environment variable; 0: the push path is not compiled


def load_path(server: ParameterServer, lock: ServerLock) -> CompiledPath | None:
    """Load the compiled push path of a server process from the cache on disk. What is not there is compiled before.

    With Numba, loading takes 0.6 s and 130 MB. Compiling takes 15 s of a core in another process, so that this one can
    serve pushes meanwhile; only where no cache can be written, it is done here.

    Args:
        server: the server.
        lock: lock of the server.

    Returns:
        The path; None if it is switched off or cannot be had. Then a warning says why.
    """

    def build() -> CompiledPath:
        from psgd.serving.compiled.cache import only_cached_code
        from psgd.serving.compiled.compiler import compile_apart
        from psgd.serving.compiled.path import CompiledPath
        from psgd.serving.compiled.serve import serve

        with suppress(NotCompiledError), only_cached_code():
            return CompiledPath(server, lock)
        function: Any = serve
        compile_apart(function.stats.cache_path)
        with only_cached_code():
            return CompiledPath(server, lock)

    return _load(build)


def load_direct_path(server: ParameterServer) -> DirectPath | None:
    """Load the compiled path of pushes from the server's own process.

    What is not in the cache is compiled here, with the first push: in a simulation, no other thread waits for that.
    """

    def build() -> DirectPath:
        from psgd.serving.compiled.direct import DirectPath

        return DirectPath(server)

    return _load(build)


def _load(build: Callable[[], Path]) -> Path | None:
    """Call a function that imports Numba and builds a path, so that a process without compiled code imports no Numba.

    Returns:
        The path; None if it is switched off or cannot be had. Then a warning says why.
    """
    if os.environ.get(SWITCH) == "0":
        _warn(f"{SWITCH} is 0")
        return None
    if sys.platform != "linux":
        _warn(f"it needs Linux, and this is {sys.platform}")
        return None
    try:
        return build()
    except ImportError as error:
        _warn(f"Numba cannot be imported: {error}. Install numba")
    except NotCompiledError as error:
        _warn(str(error))
    except Exception:  # a fault in Numba or here; the server works without compiled code
        log.exception("the push path could not be compiled, so pushes take longer")
    return None


def _warn(reason: str) -> None:
    log.warning("the push path is not compiled, so pushes take longer: %s", reason)
