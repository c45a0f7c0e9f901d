"""Ray on several hosts: one node on each; the first is the head."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from secrets import token_hex

import ray

from tests.support.command_line import LIMIT_S
from tests.support.namespaces import Host

__all__ = ["Nodes"]

ROOT = Path(__file__).parents[2]
RAYLET = str(Path(str(ray.__file__)).parent / "core" / "src" / "ray" / "raylet" / "raylet")
OBJECT_STORE = 400 * 2**20  # bytes on each host; MNIST takes 220 MB
PORT = 6379  # free, because every host has all ports for itself
QUICK = {
    # Ray gives a node that does not answer up after 5 to 10 s instead of 15 to 65 s; a cut of 5 s is survived.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    # Processes that these tests do not need, and that would keep two cores busy on every node.
    "RAY_enable_worker_prestart": "0",
    "RAY_enable_metrics_collection": "0",
}


class Nodes:
    """A cluster with authentication.

    Args:
        hosts: the hosts, the head first.
        cpus: CPUs of each host, in the same order.
        home: a folder that all hosts see; its path must be short, because it holds Ray's sockets.
        environment: environment of a test's command.

    Attributes:
        head: the host of the head node.
        address: address of the cluster.
        environment: environment of a driver on one of the hosts.
    """

    def __init__(self, hosts: Sequence[Host], cpus: Sequence[int], home: Path, environment: Mapping[str, str]) -> None:
        self._cpus = dict(zip(hosts, cpus, strict=True))
        self._home = home
        self.head = hosts[0]
        self.address = f"{self.head.address}:{PORT}"
        self.environment = {
            **environment,
            **QUICK,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token_hex(32),
            "PYTHONPATH": str(ROOT),  # the tests' own models
        }

    @property
    def hosts(self) -> tuple[Host, ...]:
        """All hosts, the head first."""
        return tuple(self._cpus)

    def start(self, hosts: Sequence[Host]) -> None:
        """Start a node on each host: on the head first, then on the others at the same time."""
        if self.head in hosts:
            self._wait_started(
                self.head, self._begin_start(self.head, "--head", f"--port={PORT}", "--include-dashboard=false")
            )
        others = [host for host in hosts if host is not self.head]
        started = [
            self._begin_start(host, f"--address={self.address}", "--include-log-monitor=false") for host in others
        ]
        for host, process in zip(others, started, strict=True):
            self._wait_started(host, process)

    def repair(self) -> None:
        """Repair every cable, and start a new node on every host whose node has ended."""
        for host in self._cpus:
            host.heal()
        ended = [host for host in self._cpus if not host.processes(RAYLET)]
        for host in ended:
            host.kill()
            host.heal()
        self.start(ended)

    def _begin_start(self, host: Host, *options: str) -> subprocess.Popen[str]:
        folder = self._home / host.address.rpartition(".")[2]
        folder.mkdir(exist_ok=True)
        command = [
            *(*host.command_prefix, str(Path(sys.executable).parent / "ray"), "start", *options),
            *(f"--node-ip-address={host.address}", f"--num-cpus={self._cpus[host]}", f"--temp-dir={folder}"),
            *("--disable-usage-stats", f"--object-store-memory={OBJECT_STORE}"),
        ]
        with (folder / "start.log").open("w") as log:
            return subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True
            )

    def _wait_started(self, host: Host, process: subprocess.Popen[str]) -> None:
        if process.wait(LIMIT_S):
            log = (self._home / host.address.rpartition(".")[2] / "start.log").read_text()
            raise OSError(f"Ray did not start on {host.address}: {log}")
