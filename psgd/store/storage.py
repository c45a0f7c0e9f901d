"""A folder anywhere fsspec reaches, with errors that name it, and a limit to every wait."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from posixpath import join
from threading import Thread
from typing import Any, TypeVar
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem

from psgd.errors import StorageError
from psgd.store.foreign import MOST_SCANNED, TakenFile, take_files, too_large

__all__ = ["PATIENCE_S", "Storage", "location"]

PATIENCE_S = 60.0
SLOWEST = 1e6  # bytes per second: a file may take so much longer

SCHEME = re.compile(r"\w{2,}:/(?!/)")  # one letter would be a drive

T = TypeVar("T")


class Storage:
    """A folder.

    Args:
        url: local path (a string or a `Path`), or a URL such as `s3://bucket/runs`, whose fsspec filesystem must be
            installed.
        patience_s: seconds that the filesystem may take to answer, a second more for each MB of a file. Higher: slow
            storage is put up with. Lower: storage that hangs is found out sooner.

    Raises:
        StorageError: the URL is neither a string nor a path, or no filesystem is installed for it.
    """

    def __init__(self, url: str | os.PathLike[str], patience_s: float = PATIENCE_S) -> None:
        url = location(url)
        self.url = url if "://" in url else str(Path(url).expanduser().absolute())
        self.patience_s = patience_s
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError, OSError) as error:
            raise StorageError(f"cannot open storage {url!r}: {error}") from error

    def folder(self, name: str) -> Storage:
        """The folder of that name inside this one; it need not exist."""
        return Storage(join(self.url, name), self.patience_s)

    def probe(self) -> None:
        """Write, read and delete a small file.

        Raises:
            StorageError: that does not work.
        """
        name = f".probe-{uuid4().hex}"
        text = b"psgd"
        self.write(name, text)
        if self.read(name) != text:
            raise StorageError(f"storage {self.url} returned something else than what was written")
        self.delete(name)

    def read(self, name: str, most_bytes: int | None = None) -> bytes:
        """Return a file's content.

        Raises:
            StorageError: there is no such file, it cannot be read, or it has more than `most_bytes` bytes.
        """
        path = join(self._root, name)
        size = self._ask(f"read {name!r}", lambda: self._fs.size(path))
        if most_bytes is not None and (size or 0) > most_bytes:
            raise StorageError(
                f"cannot read {name!r} in {self.url}: it has {size} bytes, expected {most_bytes} at most"
            )
        data: bytes = self._ask(f"read {name!r}", lambda: self._fs.cat_file(path), size or 0)
        return data

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file, and the folders it lies in; a reader finds the old one or all of the new one.

        That holds on a disk and on an object store. On other filesystems a reader may find the new one cut short.
        """
        doing = f"write {name!r}"
        path = join(self._root, name)
        if not isinstance(self._fs, LocalFileSystem):
            self._ask(doing, lambda: self._put(path, data), len(data))
            return
        folder, _, file = path.rpartition("/")
        unfinished = join(folder, f".{file}-{uuid4().hex}")
        self._ask(doing, lambda: self._put_unfinished(unfinished, data), len(data))
        self._ask(doing, lambda: _rename(unfinished, path))  # not if writing took too long, and ends some time later

    def take_out(self, folder: str, number: int, most_bytes: int, taken: set[str]) -> list[TakenFile]:
        """Take entries out of a folder that anybody may write to.

        Regular files are read, unless they are too large, and deleted. Links, folders and pipes are not opened, but
        moved into `refused/`. Names that begin with a dot are left alone, as those files are being written.

        Args:
            folder: the folder, which need not exist.
            number: entries to take, at most.
            most_bytes: size of a file that is read, at most.
            taken: names that were taken before, but could not be deleted; kept up to date.

        Returns:
            The entries, sorted by name.

        Raises:
            StorageError: the folder cannot be read, or is a link.
        """
        path = join(self._root, folder)
        refused = join(self._root, "refused")
        if isinstance(self._fs, LocalFileSystem):
            call = partial(take_files, path, refused, number, most_bytes, taken)
        else:
            call = partial(self._take_objects, path, number, most_bytes, taken)
        return self._ask(f"read {folder!r}", call)

    def append(self, name: str, data: bytes) -> None:
        """Add to a file's end; it is created if need be."""
        path = join(self._root, name)
        self._ask(f"write {name!r}", lambda: self._append(path, data), len(data))

    def exists(self, name: str) -> bool:
        """Whether there is a file or folder of that name."""
        return bool(self._ask(f"look for {name!r}", lambda: self._fs.exists(join(self._root, name))))

    def names(self, folder: str) -> list[str]:
        """What lies directly in a folder, sorted; nothing if the folder does not exist."""
        paths = self._ask(f"list {folder!r}", lambda: self._list(join(self._root, folder)))
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with all that it holds."""
        self._ask(f"delete {name!r}", lambda: self._fs.rm(join(self._root, name), recursive=True))

    # In the filesystem

    def _list(self, path: str) -> list[str]:
        self._fs.invalidate_cache()
        try:
            return list(self._fs.ls(path, detail=False))
        except FileNotFoundError:
            return []

    def _take_objects(self, path: str, number: int, most_bytes: int, taken: set[str]) -> list[TakenFile]:
        """As `take_out`, where there are neither links nor pipes."""
        found: list[TakenFile] = []
        for entry in sorted(self._list(path))[:MOST_SCANNED]:
            name = entry.rstrip("/").rpartition("/")[2]
            if name.startswith(".") or len(found) == number:
                continue
            if name not in taken:
                taken.add(name)
                found.append(self._read_object(entry, name, most_bytes))
            if self._fs.isfile(entry):
                self._fs.rm_file(entry)
                taken.discard(name)
        return found

    def _read_object(self, path: str, name: str, most_bytes: int) -> TakenFile:
        if not self._fs.isfile(path):
            return TakenFile(name, None, "it is no file")
        data: bytes = self._fs.cat_file(path, end=most_bytes + 1)
        return TakenFile(name, data, "") if len(data) <= most_bytes else TakenFile(name, None, too_large(most_bytes))

    def _put(self, path: str, data: bytes) -> None:
        """In one request, where there are requests: closing a file after a fault would leave half of it."""
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(path, data)
        _check_size(self._fs.size(path), data)

    def _put_unfinished(self, path: str, data: bytes) -> None:
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        try:
            with self._fs.open(path, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            _check_size(self._fs.size(path), data)
        except BaseException:
            Path(path).unlink(missing_ok=True)
            raise

    def _append(self, path: str, data: bytes) -> None:
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        with self._fs.open(path, "ab") as file:
            file.write(data)

    def _ask(self, doing: str, call: Callable[[], T], size: int = 0) -> T:
        """Every call of a filesystem is made here, in a thread of its own: one that hangs is left behind.

        Raises:
            StorageError: it failed, whatever filesystems raise; or took longer than `patience_s` and its size allow.
        """
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(call())
            except Exception as error:  # noqa: BLE001 - it is raised where it is waited for
                answer.set_exception(error)

        limit_s = self.patience_s + size / SLOWEST
        try:
            Thread(target=run, name="psgd-storage", daemon=True).start()  # which fails at a limit on processes
            return answer.result(limit_s)
        except Exception as error:
            reason = (
                f"{type(error).__name__}: {error}" if _failed(error, answer) else f"no answer within {limit_s:.1f} s"
            )
            raise StorageError(f"cannot {doing} in {self.url}: {reason}") from error


def location(url: str | os.PathLike[str]) -> str:
    """Return a folder's path or URL as text.

    Raises:
        StorageError: it is neither, or a URL that a `Path` has changed.
    """
    text = url if isinstance(url, str) else os.fspath(url) if isinstance(url, os.PathLike) else None
    if not isinstance(text, str):
        raise StorageError(f"a folder is a path or a URL such as s3://bucket/runs, not {url!r:.80}")
    if text is not url and (scheme := SCHEME.match(text)):
        raise StorageError(
            f"{text!r} is a URL without one of its slashes: give {scheme[0]}/... as a string, not a Path"
        )
    return text


def _failed(error: Exception, answer: Future[Any]) -> bool:
    """Return False if no answer came in time, which is no error of the filesystem."""
    return answer.done() or not isinstance(error, TimeoutError)


def _check_size(size: int | None, data: bytes) -> None:
    if size is not None and size != len(data):
        raise OSError(f"of {len(data)} bytes that were written, {size} are there")


def _rename(before: str, after: str) -> None:
    """It stands after a power failure, too."""
    Path(before).replace(after)
    folder = os.open(Path(after).parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
