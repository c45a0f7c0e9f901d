"""A folder anywhere fsspec reaches, with errors that name it."""

from __future__ import annotations

from pathlib import Path
from posixpath import join
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem

from psgd.errors import StorageError

__all__ = ["Storage"]


class Storage:
    """A folder.

    Args:
        url: a local path, or a URL such as `s3://bucket/runs` whose fsspec filesystem is installed.

    Raises:
        StorageError: no filesystem is installed for the URL.
    """

    def __init__(self, url: str) -> None:
        self.url = url if "://" in url else str(Path(url).expanduser().absolute())
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError, OSError) as error:
            raise StorageError(f"cannot open storage {url!r}: {error}") from error

    def folder(self, name: str) -> Storage:
        """The folder of that name inside this one; it need not exist."""
        return Storage(join(self.url, name))

    def probe(self) -> None:
        """Write, read and delete a small file.

        Raises:
            StorageError: that does not work.
        """
        name, text = f".probe-{uuid4().hex}", b"psgd"
        self.write(name, text)
        if self.read(name) != text:
            raise StorageError(f"storage {self.url} returned something else than what was written")
        self.delete(name)

    def read(self, name: str) -> bytes:
        """A file's content."""
        try:
            data: bytes = self._fs.cat_file(join(self._root, name))
        except (OSError, ValueError) as error:
            raise StorageError(f"cannot read {name!r} in {self.url}: {_reason(error)}") from error
        return data

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file, and the folders it lies in; a reader finds the old one or all of the new one."""
        if not isinstance(self._fs, LocalFileSystem):  # an object store shows nothing by halves
            self._put(name, data, "wb")
            return
        folder, _, file = name.rpartition("/")
        unfinished = join(folder, f".{file}-{uuid4().hex}")
        self._put(unfinished, data, "wb")
        try:
            Path(self._root, unfinished).replace(Path(self._root, name))
        except OSError as error:
            raise StorageError(f"cannot write {name!r} in {self.url}: {_reason(error)}") from error

    def append(self, name: str, data: bytes) -> None:
        """Add to a file's end; it is created if need be."""
        self._put(name, data, "ab")

    def _put(self, name: str, data: bytes, mode: str) -> None:
        path = join(self._root, name)
        try:
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            with self._fs.open(path, mode) as file:
                file.write(data)
        except (OSError, ValueError) as error:
            raise StorageError(f"cannot write {name!r} in {self.url}: {_reason(error)}") from error

    def exists(self, name: str) -> bool:
        """Whether there is a file or folder of that name."""
        try:
            return bool(self._fs.exists(join(self._root, name)))
        except (OSError, ValueError) as error:
            raise StorageError(f"cannot look for {name!r} in {self.url}: {_reason(error)}") from error

    def names(self, folder: str) -> list[str]:
        """What lies directly in a folder, sorted; nothing if the folder does not exist."""
        try:
            self._fs.invalidate_cache()
            paths = self._fs.ls(join(self._root, folder), detail=False)
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise StorageError(f"cannot list {folder!r} in {self.url}: {_reason(error)}") from error
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with all that it holds."""
        try:
            self._fs.rm(join(self._root, name), recursive=True)
        except (OSError, ValueError) as error:
            raise StorageError(f"cannot delete {name!r} in {self.url}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
