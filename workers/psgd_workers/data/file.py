"""A data file, anywhere fsspec reaches."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any

import fsspec

from psgd_workers.errors import DataError

__all__ = ["open_file"]

BLOCK = 1 << 20  # bytes read at a time
CONNECT_TIMEOUT_S = 30.0  # of a download
READ_TIMEOUT_S = 60.0  # without a byte, of a download
AGAIN = "try again later, or download it and set data.path to the copy"
ADVICE = {
    401: "it asks for a login: give a URL that needs none (a signed one), or download it and set data.path to the copy",
    403: "access is refused: give a URL that may be read (a signed one), or download it and set data.path to the copy",
    404: "it does not exist; check data.path",
    410: "it does not exist any more; check data.path",
    429: f"the server has had too many requests; {AGAIN}",
}


@contextmanager
def open_file(path: str, **text: Any) -> Iterator[Any]:
    """Open a data file for reading.

    Args:
        path: a path, or any URL that fsspec opens.
        text: `encoding` and `newline`, as of the builtin `open`; without them the file is read as bytes.

    Raises:
        DataError: the path cannot be opened, or reading it failed.
    """
    try:
        opened = _open(path)
    except Exception as error:  # each of fsspec's implementations raises its own
        raise DataError(_not_opened(path, error)) from error
    with _Source(path, opened) as source, io.BufferedReader(source, BLOCK) as file:
        yield io.TextIOWrapper(file, **text) if text else file


class _Source(io.RawIOBase):
    """An open file. Every failure to read it is a `DataError`, and so is an end before the announced size."""

    def __init__(self, path: str, file: IO[bytes]) -> None:
        self._path = path
        self._file = file
        self._read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._next(-1)

    def _next(self, length: int) -> bytes:
        try:
            data = self._file.read(length)
        except Exception as error:  # as above
            raise DataError(_not_read(self._path, error)) from error
        self._read += len(data)
        expected = getattr(self._file, "size", None)
        if not data and length and expected is not None and self._read < expected:
            raise DataError(f"the download of {self._path} ended after {self._read} of {expected} bytes; {AGAIN}")
        return bytes(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _open(path: str) -> IO[bytes]:
    if not _is_url(path):
        return Path(path).expanduser().open("rb")
    file: IO[bytes] = fsspec.open(path, "rb", **_limits(path)).open()
    return file


def _is_url(path: str) -> bool:
    """Return True if fsspec has to open it; it takes `::` in the name of a local file for a chain of file systems."""
    return "://" in path or path.startswith("data:")


def _limits(path: str) -> dict[str, Any]:
    """Bound the waits of a download, not its length: by default fsspec ends it after five minutes."""
    if not path.startswith(("http://", "https://")):
        return {}
    import aiohttp  # what fsspec needs for these URLs, and psgd for no other

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
    return {"client_kwargs": {"timeout": timeout}}


def _not_opened(path: str, error: BaseException) -> str:
    cause = _cause(error)
    if (status := _http_status(cause)) is not None:
        return f"cannot read {path}: the server answered {_named(status)}: {_advice(status)}"
    match cause:
        case FileNotFoundError():
            if "::" in path and _is_url(path):
                return f"{path} does not exist, or may not be read (fsspec does not say which); check data.path"
            relative = not _is_url(path) and not Path(path).expanduser().is_absolute()
            return f"{path} does not exist; check data.path{f', which is relative to {Path.cwd()}' if relative else ''}"
        case PermissionError():
            return f"{path} may not be read by this user; change its permissions or data.path"
        case TimeoutError():
            return f"cannot read {path}: the server did not answer in time; {AGAIN}"
        case ImportError() | ValueError() if not isinstance(cause, UnicodeError):  # no package; an unknown protocol
            return f"cannot open {path}: {cause}; give a path, or a URL that fsspec can open here"
        case _:
            return f"cannot read {path}: {_described(cause)}; check data.path"


def _not_read(path: str, error: BaseException) -> str:
    cause = _cause(error)
    if _http_status(cause) is not None:
        return _not_opened(path, error)
    if not _is_url(path):
        return f"cannot read {path}: {cause}; check data.path"
    if isinstance(cause, TimeoutError):
        return f"the download of {path} stopped: no data for {READ_TIMEOUT_S:g} s; {AGAIN}"
    return f"the download of {path} broke off: {_described(cause)}; {AGAIN}"


def _cause(error: BaseException) -> BaseException:
    """Return what fsspec's error comes from: of HTTP it says that whatever cannot be read does not exist."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _http_status(error: BaseException) -> int | None:
    status = getattr(error, "status", None)  # of an aiohttp.ClientResponseError; with a cause, the answer was no HTTP
    return status if isinstance(status, int) and error.__cause__ is None else None


def _named(status: int) -> str:
    known = {member.value for member in HTTPStatus}
    return f"HTTP {status} ({HTTPStatus(status).phrase})" if status in known else f"HTTP {status}"


def _advice(status: int) -> str:
    return ADVICE.get(status, AGAIN if status >= 500 or status == 408 else "check data.path")


def _described(error: BaseException) -> str:
    match getattr(error, "os_error", error):  # of an aiohttp.ClientConnectorError
        case socket.gaierror():
            return "its host name cannot be resolved"
        case ConnectionRefusedError():
            return "nothing listens at that host and port"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
