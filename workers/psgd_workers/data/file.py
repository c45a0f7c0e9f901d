"""Opens data files: local paths, and URLs that fsspec supports. Failures become errors that a user can act on."""

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
CONNECT_TIMEOUT_S = 30.0  # time limit to connect to the server of a download
READ_TIMEOUT_S = 60.0  # longest pause between two bytes of a download
RETRY = "try again later, or download it and set data.path to the copy"
ADVICE = {
    401: "it asks for a login: give a URL that needs none (a signed URL), or download it and set data.path to the copy",
    403: "access is denied: give a URL that grants access (a signed URL), or download it and set data.path to the copy",
    404: "the file does not exist; check data.path",
    410: "the file does not exist any more; check data.path",
    429: f"too many requests were sent to it; {RETRY}",
}


@contextmanager
def open_file(path: str, **text: Any) -> Iterator[Any]:
    """Open a data file for reading.

    Args:
        path: local path, or URL of any protocol that fsspec supports.
        text: `encoding` and `newline` of the builtin `open`, to read text; without them the file is read as bytes.

    Yields:
        The open file.

    Raises:
        DataError: the file cannot be opened or read.
    """
    try:
        opened = _open(path)
    except Exception as error:  # each implementation of fsspec raises its own errors
        raise DataError(_open_failure(path, error)) from error
    with _CheckedFile(path, opened) as source, io.BufferedReader(source, BLOCK) as file:
        yield io.TextIOWrapper(file, **text) if text else file


class _CheckedFile(io.RawIOBase):
    """An open file that raises `DataError` if reading fails, or if the file ends before its announced size."""

    def __init__(self, path: str, file: IO[bytes]) -> None:
        self._path = path
        self._file = file
        self._num_read = 0  # bytes

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
        except Exception as error:  # each implementation of fsspec raises its own errors
            raise DataError(_read_failure(self._path, error)) from error
        self._num_read += len(data)
        expected = getattr(self._file, "size", None)
        if not data and length and expected is not None and self._num_read < expected:
            raise DataError(f"the download of {self._path} ended after {self._num_read} of {expected} bytes; {RETRY}")
        return bytes(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _open(path: str) -> IO[bytes]:
    if not _is_url(path):
        return Path(path).expanduser().open("rb")
    file: IO[bytes] = fsspec.open(path, "rb", **_time_limits(path)).open()
    return file


def _is_url(path: str) -> bool:
    """Return True if fsspec opens the path. Local files are opened without it, because it splits names at `::`."""
    return "://" in path or path.startswith("data:")


def _time_limits(path: str) -> dict[str, Any]:
    """Return fsspec's options to limit each wait of a download instead of its whole time (5 minutes by default)."""
    if not path.startswith(("http://", "https://")):
        return {}
    import aiohttp  # imported here, because only fsspec's HTTP implementation needs it

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
    return {"client_kwargs": {"timeout": timeout}}


def _open_failure(path: str, error: BaseException) -> str:
    cause = _cause(error)
    if (status := _http_status(cause)) is not None:
        return f"cannot read {path}: the server answered {_status_text(status)}: {_advice(status)}"
    match cause:
        case FileNotFoundError():
            if "::" in path and _is_url(path):
                return f"{path} does not exist, or access to it is denied (fsspec does not say which); check data.path"
            relative = not _is_url(path) and not Path(path).expanduser().is_absolute()
            return f"{path} does not exist; check data.path{f', which is relative to {Path.cwd()}' if relative else ''}"
        case PermissionError():
            return f"this user has no permission to read {path}; change its permissions or data.path"
        case TimeoutError():
            return f"cannot read {path}: the server did not answer in time; {RETRY}"
        case ImportError() | ValueError() if not isinstance(cause, UnicodeError):  # no such package or protocol
            return f"cannot open {path}: {cause}; set data.path to a local path, or to a URL that fsspec can open here"
        case _:
            return f"cannot read {path}: {_describe(cause)}; check data.path"


def _read_failure(path: str, error: BaseException) -> str:
    cause = _cause(error)
    if _http_status(cause) is not None:
        return _open_failure(path, error)
    if not _is_url(path):
        return f"cannot read {path}: {cause}; check data.path"
    if isinstance(cause, TimeoutError):
        return f"the download of {path} stopped: no data for {READ_TIMEOUT_S:g} s; {RETRY}"
    return f"the download of {path} broke off: {_describe(cause)}; {RETRY}"


def _cause(error: BaseException) -> BaseException:
    """Return the cause of an error: fsspec raises FileNotFoundError for every HTTP failure, and chains the real one."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _http_status(error: BaseException) -> int | None:
    # aiohttp.ClientResponseError has a status. If it also has a cause, the answer was not HTTP.
    status = getattr(error, "status", None)
    return status if isinstance(status, int) and error.__cause__ is None else None


def _status_text(status: int) -> str:
    known = {member.value for member in HTTPStatus}
    return f"HTTP {status} ({HTTPStatus(status).phrase})" if status in known else f"HTTP {status}"


def _advice(status: int) -> str:
    return ADVICE.get(status, RETRY if status >= 500 or status == 408 else "check data.path")


def _describe(error: BaseException) -> str:
    match getattr(error, "os_error", error):  # set by aiohttp.ClientConnectorError
        case socket.gaierror():
            return "its host name cannot be resolved"
        case ConnectionRefusedError():
            return "nothing listens at that host and port"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
