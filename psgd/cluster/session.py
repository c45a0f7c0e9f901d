"""A session with Ray: a local cluster of our own, a cluster that runs already, or the caller's connection."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group

import psgd
import psgd_workers
from psgd.core.server.memory import FLOAT32, server_memory
from psgd.errors import ClusterError
from psgd.spec import JobSpec

__all__ = ["CONNECT_S", "SHIPPED", "check_address", "check_listening", "check_room", "py_modules", "session"]

SHIPPED = "PSGD_SHIPPED"  # set in a submitted job's environment: its runtime environment carries psgd already
CONNECT_S = 10.0


def py_modules() -> list[str]:
    """The source directories that a cluster's workers need."""
    return [str(Path(str(package.__file__)).parent) for package in (psgd, psgd_workers)]


def check_address(address: str | None) -> None:
    """Refuse an address that cannot work, before Ray waits for it.

    Raises:
        ClusterError: it is a Ray Client address, or nobody listens there.
    """
    if address is None or address in ("auto", "local"):
        return
    if address.startswith("ray://"):
        raise ClusterError(
            f"{address!r} is a Ray Client address, which cannot carry a training run. Submit the job instead: "
            "psgd submit JOB.yaml --address http://HEAD:8265, or run the driver on the cluster"
        )
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        raise ClusterError(f"address {address!r}: expected HOST:PORT of a Ray head, such as 10.0.0.1:6379, or 'auto'")
    check_listening(host, int(port), address)


def check_listening(host: str, port: int, address: str) -> None:
    """Refuse an address where nobody listens.

    Raises:
        ClusterError: naming `address`.
    """
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except OSError as error:
        raise ClusterError(f"nobody answers at {address}: {error}. Is Ray's head up, and is the port right?") from error


@contextmanager
def session(spec: JobSpec, address: str | None) -> Iterator[None]:
    """Ray, for as long as the block lasts.

    Args:
        spec: the job, whose size a local cluster is given.
        address: of a running cluster; None: the caller's connection, `RAY_ADDRESS`, or a local cluster.

    Raises:
        ClusterError: the cluster cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    check_address(address)
    try:
        ray.init(**_local(spec) if address in (None, "local") else _remote(str(address)))
    except (RayError, RuntimeError, ValueError, OSError) as error:
        raise ClusterError(f"cannot start or reach Ray ({address or 'local'}): {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _local(spec: JobSpec) -> dict[str, Any]:
    # Ray starts as many processes ahead as there are CPUs: with one for each server nobody waits for the last of them.
    cpus = spec.scaling.most_workers * spec.scaling.cpus_per_worker + spec.scaling.servers
    return {"address": "local", "num_cpus": cpus, "include_dashboard": False, "logging_level": logging.ERROR}


def _remote(address: str) -> dict[str, Any]:
    shipped = {} if os.environ.get(SHIPPED) else {"py_modules": py_modules(), "excludes": ["__pycache__"]}
    return {"address": address, "runtime_env": shipped, "logging_level": logging.WARNING}


def check_room(spec: JobSpec, num_parameters: int) -> None:
    """Ask whether the cluster can ever hold the job; wait for it to grow if the spec says so.

    Raises:
        ClusterError: it cannot.
    """
    _check_processors(spec)
    _check_memory(spec, num_parameters)


def _check_memory(spec: JobSpec, num_parameters: int) -> None:
    """Refuse weights that no node, or not all nodes together, could hold, before processes are killed for them."""
    scaling = spec.scaling
    members: Any = ray.nodes  # its stub is untyped
    nodes = [int(node["Resources"].get("memory", 0)) for node in members() if node["Alive"]]
    by_message = scaling.lane in ("tcp", "ray") or (scaling.lane == "auto" and len(nodes) > 1)
    partition = -(-num_parameters // scaling.servers)
    server = server_memory(spec, partition, scaling.least_workers, scaling.least_workers if by_message else 0)
    worker = FLOAT32 * num_parameters * 2 * (scaling.pipeline + 1)  # weights and a gradient for each batch in hand
    total = scaling.servers * server + scaling.least_workers * worker
    if max(server, worker) > max(nodes) or total > sum(nodes):
        raise ClusterError(
            f"weights of {num_parameters:,} values take {_gib(server)} in each of {scaling.servers} servers and "
            f"{_gib(worker)} in each of {scaling.least_workers} workers, {_gib(total)} in all; the nodes have "
            f"{', '.join(map(_gib, nodes))}. Raise scaling.servers, lower workers or pipeline, or add memory"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _check_processors(spec: JobSpec) -> None:
    scaling = spec.scaling
    patience = spec.failure.start_timeout_s
    need = {"CPU": float(scaling.cpus_per_worker)}
    if scaling.gpus_per_worker:
        need["GPU"] = scaling.gpus_per_worker
    members: Any = ray.nodes  # its stub is untyped
    nodes = [node["Resources"] for node in members() if node["Alive"]]
    room = sum(int(min(node.get(kind, 0.0) // amount for kind, amount in need.items())) for node in nodes)
    if room >= scaling.least_workers or (patience > 0 and _grows(need, scaling.least_workers, patience)):
        return
    asked = " and ".join(f"{scaling.least_workers * amount:g} {kind}s" for kind, amount in need.items())
    there = " and ".join(f"{sum(node.get(kind, 0.0) for node in nodes):g} {kind}s" for kind in need)
    raise ClusterError(
        f"the job needs {asked} ({scaling.least_workers} workers), the cluster has {there}, room for {room} workers. "
        "Lower scaling.workers or cpus_per_worker, or let it wait for a cluster that grows: failure.start_timeout_s"
    )


def _grows(need: dict[str, float], workers: int, patience: float) -> bool:
    """Whether the cluster finds room in time; asking for it is what makes an autoscaler act."""
    group = placement_group([need] * workers)
    try:
        return bool(group.wait(patience))
    finally:
        remove_placement_group(group)
