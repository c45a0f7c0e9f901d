"""A session with Ray: a local cluster of our own, a cluster that runs already, or the caller's connection."""

from __future__ import annotations

import logging
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError, RayError
from ray.util.placement_group import placement_group, remove_placement_group

import psgd_workers
from psgd.cluster.failures import reason_of, refusals
from psgd.cluster.placement import living_nodes
from psgd.core.server.memory import FLOAT32, server_memory
from psgd.errors import ClusterError, ClusterStartError
from psgd.spec import JobSpec
from psgd_workers.transport.memory import free_memory

__all__ = ["SHIPPED", "check_room", "py_modules", "session"]

SHIPPED = "PSGD_SHIPPED"  # set in a submitted job's environment: its runtime environment carries psgd already
LIMITS = {
    "processes": resource.RLIMIT_NPROC,
    "open files": resource.RLIMIT_NOFILE,
    "bytes of a file": resource.RLIMIT_FSIZE,
    "bytes of memory": resource.RLIMIT_AS,
}


def py_modules() -> list[str]:
    """The source directories that a cluster's workers need."""
    return [str(Path(__file__).parents[1]), str(Path(str(psgd_workers.__file__)).parent)]


@contextmanager
def session(spec: JobSpec, address: str | None) -> Iterator[None]:
    """Connect to Ray for as long as the block lasts, unless the caller is connected already.

    Args:
        spec: the job, whose size a local cluster is given.
        address: of a running cluster; None: start a local one.

    Raises:
        ClusterError: the cluster cannot be reached, or refuses this driver.
        ClusterStartError: no local cluster could be started.
        ClusterLostError: it refused a call in the block.
    """
    if ray.is_initialized():
        with refusals():
            yield
        return
    if address is None:
        _start(spec)
    else:
        _connect(address)
    try:
        with refusals():
            yield
    finally:
        ray.shutdown()


def _start(spec: JobSpec) -> None:
    try:
        ray.init(**_local(spec))
    except Exception as error:  # Ray raises bare ones, too
        ray.shutdown()  # ends the processes that did start
        reason = reason_of(error).rstrip(".")
        raise ClusterStartError(
            f"Ray did not start on this machine: {reason}. Look for the cause in {_log_directory()}, and at the limits "
            f"of this process: {_limits()}"
        ) from error


def _local(spec: JobSpec) -> dict[str, Any]:
    # Ray starts as many processes ahead as there are CPUs: with one for each server nobody waits for the last of them.
    cpus = spec.scaling.most_workers * spec.scaling.cpus_per_worker + spec.scaling.servers
    return {"address": "local", "num_cpus": cpus, "include_dashboard": False, "logging_level": logging.ERROR}


def _log_directory() -> Path:
    """Return the folder in which a local Ray writes its logs."""
    folder = os.environ.get("RAY_TMPDIR") or (os.environ.get("TMPDIR") if sys.platform == "linux" else None)
    return Path(folder or "/tmp") / "ray" / "session_latest" / "logs"  # noqa: S108 (Ray's own choice)


def _limits() -> str:
    """Describe this process' resource limits, those of a container included."""
    limits = {name: resource.getrlimit(number)[0] for name, number in LIMITS.items()}
    limited = [f"{name} {limit:,}" for name, limit in limits.items() if limit != resource.RLIM_INFINITY]
    if (free := free_memory()) < sys.maxsize:
        limited.append(f"free memory {_gib(free)}")
    return ", ".join(limited) or "none"


def _connect(address: str) -> None:
    shipped = {} if os.environ.get(SHIPPED) else {"py_modules": py_modules(), "excludes": ["__pycache__"]}
    try:
        ray.init(address=address, runtime_env=shipped, logging_level=logging.ERROR)
    except AuthenticationError as error:
        raise ClusterError(f"the cluster at {address} refused this driver: {error}") from error
    except ConnectionError as error:
        raise ClusterError(f"cannot connect to Ray at {address}: {error}. {_connection_hint(address)}") from error
    except (RayError, RuntimeError, ValueError, OSError) as error:
        raise ClusterError(f"cannot connect to Ray at {address}: {error}") from error


def _connection_hint(address: str) -> str:
    """Name what may be wrong where something listens: Ray says no more than that it failed to connect."""
    if address == "auto":
        return "No Ray runs on this machine: start one with `ray start --head`, or give HOST:PORT of another"
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    return (
        "Either the port is not that of Ray's head (6379 by default), or this driver's token is not the cluster's: it "
        "is read from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token, and sent if RAY_AUTH_MODE is token "
        f"(it is {mode})"
    )


def check_room(spec: JobSpec, num_parameters: int) -> None:
    """Ask whether the cluster can ever hold the job; wait for it to grow if the spec says so.

    Raises:
        ClusterError: it cannot.
    """
    if not living_nodes():
        raise ClusterError("no node of the cluster is up: start one with `ray start`, or wait until Ray knows it")
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
