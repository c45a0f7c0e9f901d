"""A filesystem below `psgd.store.storage` whose failures a test scripts."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event
from typing import Any
from uuid import uuid4

from fsspec.implementations.memory import MemoryFileSystem

from psgd.store.storage import Storage

__all__ = ["FaultyFilesystem"]


class FaultyFilesystem(MemoryFileSystem):  # type: ignore[misc]
    """An object store in memory.

    Attributes:
        operations: number of operations so far.
        fails: called before each operation with its number, name and path; returns the error to raise, or None.
        halves: called with a path that is written; returns True if only the first half of the bytes is stored.
        stalls: called with a path that is written; returns True if the write waits until `go_on` is set.
        go_on: ends the wait of the writes that stall.
    """

    cachable = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.operations = 0
        self.fails: Callable[[int, str, str], Exception | None] = lambda number, name, path: None
        self.halves: Callable[[str], bool] = lambda path: False
        self.stalls: Callable[[str], bool] = lambda path: False
        self.go_on = Event()

    def _ask(self, name: str, path: str) -> None:
        self.operations += 1
        if error := self.fails(self.operations, name, path):
            raise error

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        self._ask("write", path)
        if self.stalls(path):
            self.go_on.wait()
        super().pipe_file(path, value[: len(value) // 2] if self.halves(path) else value, mode)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        self._ask("read", path)
        data: bytes = super().cat_file(path, start, end, **options)
        return data

    def exists(self, path: str, **options: Any) -> bool:
        self._ask("exists", path)
        return bool(super().exists(path, **options))

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self._ask("list", path)
        return super().ls(path, detail, **options)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        self._ask("delete", path)
        super().rm(path, recursive, maxdepth)

    def storage(self, patience_s: float = 60.0) -> Storage:
        """Return an empty folder on this filesystem."""
        made = _FaultyStorage(f"memory://{uuid4().hex}/run", patience_s)
        made.use(self)
        return made


class _FaultyStorage(Storage):
    def use(self, filesystem: FaultyFilesystem) -> None:
        self._fs = filesystem

    def folder(self, name: str) -> Storage:
        made = _FaultyStorage(f"{self.url}/{name}", self.patience_s)
        made.use(self._fs)
        return made
