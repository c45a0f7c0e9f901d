"""Several hosts on one Linux machine: network namespaces, joined by a bridge that has a namespace of its own.

The machine's own network is never touched. Nothing is left afterwards, because a deleted namespace deletes its links.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support.command_line import LIMIT_S, eventually

__all__ = ["Host", "network", "unavailable_reason"]

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # not every user has `ip` on the PATH
LINK = "eth0"  # name of the host's end of its cable
TOOLS = ("ip", "tc", "nsenter")


def unavailable_reason() -> str | None:
    """Return why namespaces cannot be used on this machine; None if they can."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if absent := [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]:
        return f"network namespaces need {', '.join(absent)} (iproute2, util-linux)"
    try:
        with network(1) as (host,):
            host.slow("10mbit")
    except OSError as error:
        return f"no network of namespaces can be made: {error}"
    return None


@dataclass(frozen=True, slots=True)
class Host:
    """A host, with one cable to the bridge.

    Attributes:
        name: name of its namespace.
        address: its address on the network.
        bridge: name of the bridge's namespace.
        port: the bridge's end of the cable.
    """

    name: str
    address: str
    bridge: str
    port: str

    @property
    def command_prefix(self) -> tuple[str, ...]:
        """Return the words that make a command run on this host."""
        return (str(shutil.which("nsenter", path=PATH)), f"--net=/run/netns/{self.name}", "--")

    def cut(self) -> None:
        """Pull the cable: no connection is closed, and all that is sent is lost."""
        _run("ip", "-netns", self.bridge, "link", "set", self.port, "down")

    def slow(self, rate: str) -> None:
        """Limit both directions to a rate such as `10mbit`."""
        for namespace, link in ((self.bridge, self.port), (self.name, LINK)):
            shape = ("root", "tbf", "rate", rate, "burst", "32kbit", "latency", "400ms")
            _run("tc", "-netns", namespace, "qdisc", "replace", "dev", link, *shape)

    def heal(self) -> None:
        """Undo `cut` and `slow`."""
        _run("ip", "-netns", self.bridge, "link", "set", self.port, "up")
        for namespace, link in ((self.bridge, self.port), (self.name, LINK)):
            _run("tc", "-netns", namespace, "qdisc", "replace", "dev", link, "root", "pfifo")

    def kill(self) -> None:
        """Power the host off: kill its processes without a message to other hosts that their connections ended."""
        self.cut()
        eventually(self._killed, LIMIT_S)

    def _killed(self) -> bool:
        processes = self.processes()
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return not processes

    def processes(self, prefix: str = "") -> list[int]:
        """Return the processes on this host whose command line begins with the given words."""
        found = []
        for text in _run("ip", "netns", "pids", self.name).split():
            with suppress(OSError):  # the process has just ended
                if (Path("/proc") / text / "cmdline").read_bytes().startswith(prefix.encode()):
                    found.append(int(text))
        return found


@contextmanager
def network(hosts: int) -> Iterator[tuple[Host, ...]]:
    """Yield this number of hosts that reach only each other. All processes on them are killed at the end."""
    bridge = f"psgd{os.getpid()}-bridge"
    with ExitStack() as stack:
        stack.enter_context(_namespace(bridge))
        _run("ip", "-netns", bridge, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-netns", bridge, "link", "set", "bridge", "up")
        made = []
        for number in range(hosts):
            host = Host(f"psgd{os.getpid()}-{number}", f"10.77.0.{number + 1}", bridge, f"port{number}")
            stack.enter_context(_namespace(host.name))
            _join(host)
            stack.callback(host.kill)
            made.append(host)
        yield tuple(made)


@contextmanager
def _namespace(name: str) -> Iterator[None]:
    _run("ip", "netns", "add", name)
    try:
        _run("ip", "-netns", name, "link", "set", "lo", "up")
        yield
    finally:
        _run("ip", "netns", "del", name)


def _join(host: Host) -> None:
    """Connect the host to the bridge."""
    ends = ("link", "add", LINK, "netns", host.name, "type", "veth", "peer", "name", host.port, "netns", host.bridge)
    _run("ip", *ends)
    _run("ip", "-netns", host.bridge, "link", "set", host.port, "master", "bridge", "up")
    _run("ip", "-netns", host.name, "address", "add", f"{host.address}/24", "dev", LINK)
    _run("ip", "-netns", host.name, "link", "set", LINK, "up")


def _run(*command: str) -> str:
    """Run a command and return its output."""
    done = subprocess.run(command, env={"PATH": PATH}, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
