"""Storage: a folder on any filesystem of fsspec. Every call has a time limit, and errors name the folder."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from posixpath import join
from threading import Thread
from typing import TypeVar
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem

from psgd.errors import DamagedFileError, StorageError
from psgd.jsontext import RECOVERY
from psgd.store.foreign import MOST_SCANNED, TakenFile, read_regular, size_fault, take_files

__all__ = ["PATIENCE_S", "Storage", "location"]

PATIENCE_S = 60.0
SLOWEST = 1e6  # bytes per second; the time limit of a call grows with the size of the file at this rate

HELD = -1  # in place of a descriptor, if another process holds a lock
SCHEME = re.compile(r"\w{2,}:/(?!/)")  # two letters or more: one letter is a drive of Windows

T = TypeVar("T")


class Storage:
    """A folder on a disk or in an object store.

    Args:
        url: local path (a string or a `Path`), or a URL such as `s3://bucket/runs`. The URL's fsspec filesystem must be
            installed.
        patience_s: time limit of a call of the filesystem in seconds, plus one second for each MB of a file. Higher
            values tolerate slow storage; lower values notice storage that hangs sooner.

    Raises:
        StorageError: `url` is neither a string nor a path, or no filesystem is installed for it.
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
        """Return a folder inside this one, which need not exist."""
        return Storage(join(self.url, name), self.patience_s)

    def probe(self) -> None:
        """Write, read and delete a small file, to test that the storage works.

        Raises:
            StorageError: it does not work.
        """
        name = f".probe-{uuid4().hex}"
        text = b"psgd"
        self.write(name, text)
        if self.read(name) != text:
            raise StorageError(
                f"storage {self.url} does not return the bytes that were written to it; choose another storage"
            )
        self.delete(name)

    def read(self, name: str, most_bytes: int | None = None) -> bytes:
        """Return the content of a file. Pipes and devices are not opened, because reading them might never end.

        Raises:
            DamagedFileError: it is not a regular file, or it has more than `most_bytes` bytes.
            StorageError: there is no such file, or it cannot be read.
        """
        doing = f"read {name!r}"
        path = join(self._root, name)
        size = self._call_filesystem(doing, lambda: self._size(path))
        limit = size if most_bytes is None else most_bytes
        data = b""
        if size <= limit:
            content = self._call_filesystem(doing, lambda: self._content(path, most_bytes), size)
            if content is None:
                raise DamagedFileError(f"{self.url}/{name} is damaged (it is not a regular file): {RECOVERY}")
            data = content
        if most_bytes is not None and max(size, len(data)) > most_bytes:
            raise DamagedFileError(f"{self.url}/{name} is damaged (it has more than {most_bytes:,} bytes): {RECOVERY}")
        return data

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file, and create the folders that it lies in.

        On a disk and in an object store, a reader finds either the old file or the complete new one. On other
        filesystems, a reader may find a truncated file.

        Raises:
            StorageError: the file could not be written.
        """
        doing = f"write {name!r}"
        path = join(self._root, name)
        if not isinstance(self._fs, LocalFileSystem):
            self._call_filesystem(doing, lambda: self._put(path, data), len(data))
            return
        folder, _, file = path.rpartition("/")
        unfinished = join(folder, f".{file}-{uuid4().hex}")
        self._call_filesystem(doing, lambda: self._put_unfinished(unfinished, data), len(data))
        # A call of its own: a file that was complete only after the time limit must not be renamed.
        self._call_filesystem(doing, lambda: _rename(unfinished, path))

    def take_out(self, folder: str, number: int, most_bytes: int, taken: set[str]) -> list[TakenFile]:
        """Take entries out of a folder that any process may write to.

        Regular files are read and then deleted; the content of a file that is too large is not returned. Links,
        folders and pipes are never opened. On a disk they are moved into `refused/`. In an object store, an entry that
        is not a file stays where it is. Files whose name begins with a dot are left alone, because they are still being
        written.

        Args:
            folder: name of the folder, which need not exist.
            number: largest number of entries to take.
            most_bytes: largest size of a file that is read.
            taken: names of entries that were taken before, but could not be deleted. This call updates the set.

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
        return self._call_filesystem(f"read {folder!r}", call)

    def append(self, name: str, data: bytes) -> None:
        """Append bytes to a file, which is created if it does not exist."""
        path = join(self._root, name)
        self._call_filesystem(f"write {name!r}", lambda: self._append(path, data), len(data))

    def exists(self, name: str) -> bool:
        """Return True if there is a file or folder of that name."""
        return bool(self._call_filesystem(f"look for {name!r}", lambda: self._fs.exists(join(self._root, name))))

    def users(self, *names: str) -> set[int] | None:
        """Return the ids of the users that own files or folders, and links to them; None in an object store."""
        if not isinstance(self._fs, LocalFileSystem):
            return None
        paths = [Path(self._root, name) for name in names]
        return self._call_filesystem(
            "look for the owner", lambda: {status.st_uid for path in paths for status in (path.stat(), path.lstat())}
        )

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of the entries directly in a folder. A folder that does not exist has none."""
        paths = self._call_filesystem(f"list {folder!r}", lambda: self._list(join(self._root, folder)))
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with its content."""
        self._call_filesystem(f"delete {name!r}", lambda: self._fs.rm(join(self._root, name), recursive=True))

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Lock this folder on a disk, which is created if it does not exist, for as long as the block lasts.

        The lock ends with its process. There is none in an object store, and on a disk that cannot lock.

        Yields:
            False if another process, or another call in this one, holds the lock.
        """
        lock = None
        if isinstance(self._fs, LocalFileSystem):
            lock = self._call_filesystem("lock the folder", partial(_lock, self._root))
        try:
            yield lock != HELD
        finally:
            if lock not in (None, HELD):
                os.close(lock)

    # Calls of the filesystem

    def _size(self, path: str) -> int:
        """Return the size of a file. A size that is not known counts as 0."""
        return int(self._fs.size(path) or 0)

    def _content(self, path: str, most_bytes: int | None) -> bytes | None:
        """Return the content of a file, or more than `most_bytes` bytes of it; None if it is not a regular file."""
        if isinstance(self._fs, LocalFileSystem):
            return read_regular(path, most_bytes)
        content: bytes = self._fs.cat_file(path, end=None if most_bytes is None else most_bytes + 1)
        return content

    def _list(self, path: str) -> list[str]:
        self._fs.invalidate_cache()
        try:
            return list(self._fs.ls(path, detail=False))
        except FileNotFoundError:
            return []

    def _take_objects(self, path: str, number: int, most_bytes: int, taken: set[str]) -> list[TakenFile]:
        """Take entries out of a folder in an object store, which has neither links nor pipes; see `take_out`."""
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
            return TakenFile(name, None, "it is not a file")
        data: bytes = self._fs.cat_file(path, end=most_bytes + 1)
        return TakenFile(name, data, "") if len(data) <= most_bytes else TakenFile(name, None, size_fault(most_bytes))

    def _put(self, path: str, data: bytes) -> None:
        """Write a file in one request of an object store.

        Writing through an open file is not safe: after a fault, closing it would leave half of its content there.
        """
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(path, data)
        _check_size(self._fs.size(path), data)

    def _put_unfinished(self, path: str, data: bytes) -> None:
        """Write a file under a temporary name, and make sure that it is on the disk."""
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

    def _call_filesystem(self, doing: str, call: Callable[[], T], size: int = 0) -> T:
        """Make a call of the filesystem, in a thread of its own. A call that hangs is abandoned with its thread.

        Args:
            doing: verb and file name, for the error message.
            call: the call.
            size: number of bytes that are read or written.

        Raises:
            StorageError: the call raised any exception, or took longer than `patience_s` and `size` allow.
        """
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(call())
            except Exception as error:  # noqa: BLE001 - raised again in the thread that waits
                answer.set_exception(error)

        limit_s = self.patience_s + size / SLOWEST
        try:
            Thread(target=run, name="psgd-storage", daemon=True).start()  # raises at a limit on processes
            return answer.result(limit_s)
        except Exception as error:
            timed_out = isinstance(error, TimeoutError) and not answer.done()
            reason = f"no answer within {limit_s:.1f} s" if timed_out else f"{type(error).__name__}: {error}"
            raise StorageError(f"cannot {doing} in {self.url}: {reason}") from error


def location(url: str | os.PathLike[str]) -> str:
    """Return the path or URL of a folder as text.

    Raises:
        StorageError: `url` is neither a string nor a path, or it is a URL that `Path` has changed.
    """
    text = url if isinstance(url, str) else os.fspath(url) if isinstance(url, os.PathLike) else None
    if not isinstance(text, str):
        raise StorageError(f"a folder is a path or a URL such as s3://bucket/runs, not {url!r:.80}")
    if text is not url and (scheme := SCHEME.match(text)):
        raise StorageError(
            f"{text!r} is a URL without one of its slashes: give {scheme[0]}/... as a string, not as a Path"
        )
    return text


def _check_size(size: int | None, data: bytes) -> None:
    if size is not None and size != len(data):
        raise OSError(f"{len(data)} bytes were written, but the file has {size}")


def _lock(folder: str) -> int | None:
    """Return a descriptor that holds the lock of a folder until it is closed; `HELD`; None if it cannot be locked."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        return HELD if isinstance(error, BlockingIOError) else None
    return descriptor


def _rename(before: str, after: str) -> None:
    """Rename a file so that the new name survives a power failure."""
    Path(before).replace(after)
    folder = os.open(Path(after).parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
