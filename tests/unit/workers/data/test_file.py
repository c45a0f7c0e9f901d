from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import NoReturn

import fsspec
import pytest

from psgd_workers.data import file as module
from psgd_workers.data import memory
from psgd_workers.data.file import open_file, read_file
from psgd_workers.errors import DataError


def test_a_local_path_is_read(tmp_path: Path) -> None:
    path = tmp_path / "some[1]*.bin"
    path.write_bytes(b"123")
    with open_file(str(path)) as file:
        assert file.read() == b"123"


def test_a_url_is_read() -> None:
    with fsspec.open("memory://open_file.txt", "wb") as file:
        file.write("\ufeffñ\r\n".encode())
    with open_file("memory://open_file.txt", encoding="utf-8-sig", newline="") as file:
        assert file.read() == "ñ\r\n"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"absent\.npz does not exist; check data\.path"),
        open_file(str(tmp_path / "absent.npz")),
    ):
        pass


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"cannot read {tmp_path}.*directory"), open_file(str(tmp_path)):
        pass


def test_an_unreadable_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(*_: object) -> NoReturn:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "open_regular_file", locked)  # the tests may run as root, which may read every file
    with pytest.raises(DataError, match=r"this user has no permission to read data\.npz"), open_file("data.npz"):
        pass


@pytest.mark.parametrize("name", ["a::b.csv", "file::a", "c:d.csv", "x#y?z=1.csv", "~name"])
def test_a_local_name_with_signs_of_a_url_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"123")
    with open_file(str(tmp_path / name)) as file:
        assert file.read() == b"123"


def test_a_relative_name_is_looked_for_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a::b.csv").write_bytes(b"123")
    with open_file("a::b.csv") as file:
        assert file.read() == b"123"
    message = f"a::c.csv does not exist; check data.path, which is relative to {tmp_path}"
    with pytest.raises(DataError, match=re.escape(message)), open_file("a::c.csv"):
        pass


def test_a_home_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.csv").write_bytes(b"123")
    with open_file("~/a.csv") as file:
        assert file.read() == b"123"


def test_an_unknown_protocol_is_refused() -> None:
    with (
        pytest.raises(DataError, match=r"cannot open nowhere://data\.npz: .*nowhere"),
        open_file("nowhere://data.npz"),
    ):
        pass


def test_a_protocol_whose_package_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_package(*_: object) -> NoReturn:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "open", without_package)
    with pytest.raises(DataError, match="Install s3fs to access S3"), open_file("s3://bucket/data.npz"):
        pass


def test_errors_of_the_reader_pass_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.touch()
    with pytest.raises(ZeroDivisionError), open_file(str(path)):
        raise ZeroDivisionError


# Downloads

CONTENT = b"x,y\n1,2\n3,4\n"


class Answers(BaseHTTPRequestHandler):
    """Answers a path such as `/503` with that status, and every other path with the method of that name."""

    protocol_version = "HTTP/1.1"
    close_connection = True

    def do_GET(self) -> None:
        name = self.path.removeprefix("/")
        if name.isdecimal():
            self.announce(0, int(name))
        else:
            getattr(self, name)()
        self.close_connection = True

    do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

    def announce(self, length: int, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.end_headers()

    def send(self, content: bytes) -> None:
        if self.command == "GET":
            self.wfile.write(content)
            self.wfile.flush()

    def whole(self) -> None:
        self.announce(len(CONTENT))
        self.send(CONTENT)

    def short(self) -> None:
        self.announce(1000)
        self.send(CONTENT)

    def cut_chunks(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.send(b"%x\r\n%s\r\n" % (len(CONTENT), CONTENT))

    def cut_chunks_whole(self) -> None:
        self.cut_chunks()
        self.send(b"0\r\n\r\n")

    def shrunk(self) -> None:
        """Announce 1000 bytes, but have none left when a range of them is requested."""
        if self.command == "GET" and "Range" in self.headers:
            self.announce(0, 416)
        else:
            self.announce(1000)

    def stalled(self) -> None:
        self.announce(1000)
        self.send(CONTENT)
        self.rfile.read(1)  # until the client gives up

    def silent(self) -> None:
        self.rfile.read(1)

    def other_protocol(self) -> None:
        self.wfile.write(b"220 ready\r\n")

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[str]:
    """URL of a web server that answers with `Answers`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as http:
        thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


@pytest.mark.parametrize("text", [{}, {"encoding": "utf-8", "newline": ""}], ids=["bytes", "text"])
def test_a_download_is_read(server: str, text: dict[str, str]) -> None:
    with open_file(f"{server}/whole", **text) as file:
        assert file.read() == (CONTENT.decode() if text else CONTENT)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "the server answered HTTP 400 (Bad Request): check data.path"),
        (401, "the server answered HTTP 401 (Unauthorized): it asks for a login: give a URL that needs none"),
        (403, "the server answered HTTP 403 (Forbidden): access is denied: give a URL that grants access"),
        (404, "the server answered HTTP 404 (Not Found): the file does not exist; check data.path"),
        (408, "the server answered HTTP 408 (Request Timeout): try again later"),
        (410, "the server answered HTTP 410 (Gone): the file does not exist any more"),
        (
            429,
            "the server answered HTTP 429 (Too Many Requests): too many requests were sent to it; try again later",
        ),
        (500, "the server answered HTTP 500 (Internal Server Error): try again later"),
        (503, "the server answered HTTP 503 (Service Unavailable): try again later"),
        (599, "the server answered HTTP 599: try again later"),
    ],
)
def test_each_status_of_a_server_is_told_as_what_it_is(server: str, status: int, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(f"cannot read {server}/{status}: {message}")):
        read(f"{server}/{status}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "broke off: ClientPayloadError: .*received 12 of 1000 bytes"),
        ("cut_chunks", "broke off: ClientPayloadError: "),
        ("shrunk", "ended after 0 of 1000 bytes"),
    ],
)
@pytest.mark.parametrize("text", [{}, {"encoding": "utf-8"}], ids=["bytes", "text"])
def test_a_download_that_ends_early_is_not_taken_for_the_file(
    server: str, name: str, message: str, text: dict[str, str]
) -> None:
    with pytest.raises(
        DataError, match=f"the download of {server}/{name} {message}.*; try again later, or download it"
    ):
        read(f"{server}/{name}", **text)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("silent", "cannot read .*/silent: the server did not answer in time; try again later"),
        ("stalled", r"the download of .*/stalled stopped: no data for 0\.2 s; try again later"),
    ],
)
def test_a_server_is_not_waited_for_without_end(
    server: str, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "READ_TIMEOUT_S", 0.2)
    with pytest.raises(DataError, match=message):
        read(f"{server}/{name}")


def test_a_port_without_a_server_is_told() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(DataError, match=r"nothing listens at that host and port; check data\.path"):
            read(f"http://127.0.0.1:{unused.getsockname()[1]}/data.csv")


def test_a_host_without_an_address_is_told() -> None:
    with pytest.raises(
        DataError, match=r"cannot read http://no-such-host\.invalid/a: its host name cannot be resolved"
    ):
        read("http://no-such-host.invalid/a")


def test_another_protocol_is_told(server: str) -> None:
    with pytest.raises(DataError, match=r"cannot read .*Bad status line"):
        read(f"{server}/other_protocol")


def test_of_a_chained_url_no_more_is_said_than_is_known(server: str) -> None:
    with pytest.raises(DataError, match="/403 does not exist, or access to it is denied"):
        read(f"simplecache::{server}/403")


def read(url: str, **text: str) -> object:
    with open_file(url, **text) as file:
        return file.read()


# Hostile paths


@pytest.mark.parametrize(
    "url",
    [
        "http://me:secret@127.0.0.1:9/a.csv",
        "http://me:sec/secret@127.0.0.1:9/a.csv",
        "http://127.0.0.1:9/a.csv?token=secret",
        "nowhere://me:secret@host/a.csv",
        "simplecache::http://me:secret@127.0.0.1:9/a.csv",
        "http://me:secret@/a.csv",
        "http://me:secret@[::1/a.csv?sig=secret",
        "http://me:secret@host:port/a.csv",
        "http://me:\nsecret@127.0.0.1:9/a.csv",
    ],
)
def test_no_secret_of_a_url_is_shown(url: str) -> None:
    with pytest.raises(DataError) as refused:
        read(url)
    assert "secret" not in str(refused.value)
    assert "***" in str(refused.value)


def test_a_secret_in_the_answer_of_a_server_is_not_shown(server: str) -> None:
    for url in (f"{server}/404?token=secret", server.replace("//", "//me:secret@") + "/short"):
        with pytest.raises(DataError) as refused:
            read(url)
        assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "path",
    ["a\0b", "a\nb", "\x1b[31m", "http://h\n\0/a", "memory://a\0", "a\ud800", "x" * 10_000, "~nobody-here/a", " "],
)
def test_a_strange_path_is_refused_in_one_short_line(path: str) -> None:
    with pytest.raises(DataError) as refused:
        read(path)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 1_500


@pytest.mark.timeout(20)
def test_a_pipe_and_a_device_are_no_data(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "pipe"), (Path("/dev/zero"), "device")):
        for reader in (read, read_file):
            with pytest.raises(DataError, match=f"cannot read {path}: it is a {kind}; expected a regular file"):
                reader(str(path))


def test_a_file_that_does_not_fit_into_memory_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)
    monkeypatch.setattr(memory, "free_memory", lambda: 2**30)
    with pytest.raises(DataError, match="large needs 1,048,576 MiB of memory, but 1,024 MiB are free here"):
        read_file(str(tmp_path / "large"))


def test_a_download_of_unknown_size_is_read_while_memory_is_free(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_file(f"{server}/cut_chunks_whole").getvalue() == CONTENT
    monkeypatch.setattr(memory, "free_memory", lambda: 2**20)
    with pytest.raises(DataError, match="cut_chunks_whole needs 16 MiB of memory, but 1 MiB are free here"):
        read_file(f"{server}/cut_chunks_whole")
