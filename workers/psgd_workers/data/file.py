"""Opens data files: local paths, and URLs that fsspec supports. Failures become errors that a user can act on."""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any

import fsspec

from psgd_workers.data.memory import check_memory
from psgd_workers.errors import DataError
from psgd_workers.quoting import shown
from psgd_workers.regular_file import open_regular_file

__all__ = ["open_file", "read_file"]

BLOCK = 1 << 20  # bytes read at a time
PIECE = 16 << 20  # bytes after which `read_file` checks the free memory again
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


def read_file(path: str) -> io.BytesIO:
    """Return the content of a data file, for a reader that needs seeking, which some web servers do not support.

    Raises:
        DataError: the file cannot be read, or does not fit into memory.
    """
    content = io.BytesIO()
    with open_file(path) as file:
        check_memory(shown(path), file.raw.size or 0)
        while piece := file.read(PIECE):
            check_memory(shown(path), len(piece) + PIECE)
            content.write(piece)
    content.seek(0)
    return content


class _CheckedFile(io.RawIOBase):
    """An open file that raises `DataError` if reading fails, or if the file ends before its announced size."""

    def __init__(self, path: str, file: IO[bytes]) -> None:
        self._path = path
        self._file = file
        self._num_read = 0  # bytes
        self.size: int | None = getattr(file, "size", None)  # bytes; None if a server does not announce it
        if self.size is None and not _is_url(path):
            self.size = os.fstat(file.fileno()).st_size

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
        if not data and length and self.size is not None and self._num_read < self.size:
            read = f"{self._num_read} of {self.size} bytes"
            if not _is_url(self._path):
                raise DataError(f"{shown(self._path)} became shorter after {read} were read; write the file again")
            raise DataError(f"the download of {shown(self._path)} ended after {read}; {RETRY}")
        return bytes(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _open(path: str) -> IO[bytes]:
    if not _is_url(path):
        return open_regular_file(Path(path).expanduser())
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
    name = shown(path)
    if (status := _http_status(cause)) is not None:
        return f"cannot read {name}: the server answered {_status_text(status)}: {_advice(status)}"
    match cause:
        case FileNotFoundError():
            if "::" in path and _is_url(path):
                return f"{name} does not exist, or access to it is denied (fsspec does not say which); check data.path"
            return f"{name} does not exist; check data.path{_relative_to(path)}"
        case PermissionError():
            return f"this user has no permission to read {name}; change its permissions or data.path"
        case TimeoutError():
            return f"cannot read {name}: the server did not answer in time; {RETRY}"
        case ImportError() | ValueError() if not isinstance(cause, UnicodeError):  # no such package or protocol
            reason = _text(cause)
            return f"cannot open {name}: {reason}; set data.path to a local path, or to a URL that fsspec can open here"
        case _:
            return f"cannot read {name}: {_describe(cause)}; check data.path"


def _relative_to(path: str) -> str:
    """Return a hint with the folder in which a relative path was looked for, or an empty string."""
    if _is_url(path) or Path(path).expanduser().is_absolute():
        return ""
    try:
        return f", which is relative to {shown(str(Path.cwd()))}"
    except OSError:
        return ", which is relative to a folder that does not exist any more"


def _read_failure(path: str, error: BaseException) -> str:
    cause = _cause(error)
    name = shown(path)
    if _http_status(cause) is not None:
        return _open_failure(path, error)
    if not _is_url(path):
        return f"cannot read {name}: {_describe(cause)}; check data.path"
    if isinstance(cause, TimeoutError):
        return f"the download of {name} stopped: no data for {READ_TIMEOUT_S:g} s; {RETRY}"
    return f"the download of {name} broke off: {_describe(cause)}; {RETRY}"


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
        case OSError(strerror=str(reason)):
            return reason[:1].lower() + reason[1:]
    text = _text(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _text(error: BaseException) -> str:
    """Return the message of an error, which may contain the URL with its secrets, or part of the file."""
    return shown(str(error))
