from __future__ import annotations

import os
import socket
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from psgd_workers.regular_file import open_regular_file


def test_a_file_and_a_link_to_it_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "b").symlink_to("a")
    for name in ("a", "b"):
        with open_regular_file(tmp_path / name) as file:
            assert file.read() == b"123"


def test_a_pipe_is_refused_without_a_wait_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is a pipe; expected a regular file"):
        open_regular_file(tmp_path / "pipe")


@pytest.mark.parametrize(("path", "kind"), [("/dev/zero", "a device"), ("/", "a directory")])
def test_a_device_and_a_directory_are_refused(path: str, kind: str) -> None:
    with pytest.raises(OSError, match=f"it is {kind}; expected a regular file"):
        open_regular_file(Path(path))


def test_a_socket_is_refused() -> None:
    with TemporaryDirectory(dir="/tmp") as folder, socket.socket(socket.AF_UNIX) as listener:  # a path that is short
        listener.bind(f"{folder}/s")
        with pytest.raises(OSError, match="No such device or address"):
            open_regular_file(Path(folder, "s"))


def test_no_descriptor_stays_open_after_a_refusal() -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(3):
        with pytest.raises(OSError, match="a device"):
            open_regular_file(Path("/dev/null"))
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
