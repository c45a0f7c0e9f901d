"""A connection to Ray for a run.

It is a new one, to a local cluster started for the run or to a running cluster, or else the one that the caller has.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import ray
from ray.exceptions import AuthenticationError, RayError
from ray.util.placement_group import placement_group, remove_placement_group

import psgd_workers
from psgd.cluster.failures import map_ray_errors, reason_of
from psgd.cluster.placement import living_nodes
from psgd.core.server.memory import FLOAT32, server_memory
from psgd.errors import ClusterError, ClusterStartError
from psgd.spec import JobSpec
from psgd_workers.counting import counted
from psgd_workers.free_memory import free_memory

__all__ = ["SHIPPED", "check_room", "py_modules", "session"]

SHIPPED = "PSGD_SHIPPED"  # environment variable of a submitted job, to which psgd was uploaded already
RESOURCE_LIMITS = {
    "processes": resource.RLIMIT_NPROC,
    "open files": resource.RLIMIT_NOFILE,
    "bytes of a file": resource.RLIMIT_FSIZE,
    "bytes of memory": resource.RLIMIT_AS,
}

# Threads of a local Ray with its driver, measured with Ray 2.60 on two processors; more processors mean more threads.
RAY_THREADS = 180
PROCESS_THREADS = 26  # of each actor's process
PROBE_S = 60.0  # time limit for the threads that test the limit


def py_modules() -> list[str]:
    """Return the source directories that the processes on a cluster need."""
    return [str(Path(__file__).parents[1]), str(Path(str(psgd_workers.__file__)).parent)]


@contextmanager
def session(spec: JobSpec, address: str | None) -> Iterator[None]:
    """Connect to Ray for as long as the block lasts, unless the caller is connected already.

    Args:
        spec: the job. A local cluster is started with the CPUs that the job needs.
        address: address of a running cluster. None: start a local cluster.

    Raises:
        ClusterError: the cluster cannot be reached, or it refused this driver.
        ClusterStartError: no local cluster could be started.
        ClusterLostError: the cluster refused a call in the block.
    """
    if ray.is_initialized():
        with map_ray_errors():
            yield
        return
    if address is None:
        _start(spec)
    else:
        _connect(address)
    try:
        with map_ray_errors():
            yield
    finally:
        ray.shutdown()


def _start(spec: JobSpec) -> None:
    options = _local_options(spec)
    _check_threads(RAY_THREADS + PROCESS_THREADS * options["num_cpus"])
    try:
        ray.init(**options)
    except Exception as error:  # Ray raises bare exceptions, too
        ray.shutdown()  # end the processes that did start
        reason = reason_of(error).rstrip(".")
        raise ClusterStartError(
            f"Ray did not start on this machine: {reason}. Look for the cause in {_log_directory()}, and at the limits "
            f"of this process: {_limits()}"
        ) from error


def _local_options(spec: JobSpec) -> dict[str, Any]:
    # Ray starts one process per CPU in advance. One more CPU per server means that no actor waits for its process.
    cpus = spec.scaling.most_workers * spec.scaling.cpus_per_worker + spec.scaling.servers
    return {"address": "local", "num_cpus": cpus, "include_dashboard": False, "logging_level": logging.ERROR}


def _check_threads(needed: int) -> None:
    """Raise an error if this process cannot start as many threads as a local Ray needs.

    Where a thread cannot be started, Ray's own processes and this one abort or hang, without a word about the cause.
    """
    started = _startable_threads(needed)
    if started < needed:
        raise ClusterStartError(
            f"Ray cannot start on this machine: it needs about {needed} threads for this job, but only {started} can "
            f"be started. Limits of this process: {_limits()}. Raise the limit of processes (`ulimit -u`), of memory "
            "(`ulimit -v`) or of the container, or lower scaling.workers"
        )


def _startable_threads(wanted: int) -> int:
    """Return how many threads can be started, at most `wanted`. Starting them tests every limit, also a container's."""
    end = Event()
    started: list[Thread] = []
    try:
        with suppress(RuntimeError, MemoryError):  # the limit is reached
            for _ in range(wanted):
                thread = Thread(target=end.wait, args=(PROBE_S,), name="psgd-limit-probe", daemon=True)
                thread.start()
                started.append(thread)
    finally:
        end.set()
        for thread in started:
            thread.join()
    return len(started)


def _log_directory() -> Path:
    """Return the folder in which a local Ray writes its logs."""
    folder = os.environ.get("RAY_TMPDIR") or (os.environ.get("TMPDIR") if sys.platform == "linux" else None)
    return Path(folder or "/tmp") / "ray" / "session_latest" / "logs"  # noqa: S108 (Ray's own choice)


def _limits() -> str:
    """Describe the resource limits of this process, including those of its container."""
    limits = {name: resource.getrlimit(number)[0] for name, number in RESOURCE_LIMITS.items()}
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
    """Name the likely causes of a failed connection. Ray itself says only that it failed to connect."""
    if address == "auto":
        return "No Ray runs on this machine: start one with `ray start --head`, or give HOST:PORT of another"
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    return (
        "Either the port is not that of Ray's head (6379 by default), or this driver's token is not the cluster's. The "
        "token is read from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token, and sent if RAY_AUTH_MODE is "
        f"token (it is {mode})"
    )


def check_room(spec: JobSpec, num_parameters: int) -> None:
    """Raise an error if the cluster has too few nodes, CPUs, GPUs or bytes of memory for the job.

    If the job sets `failure.start_timeout_s`, wait up to that time until the cluster has grown.

    Args:
        spec: the job.
        num_parameters: number of values in the model's weights.

    Raises:
        ClusterError: the cluster cannot hold the job.
    """
    if not living_nodes():
        raise ClusterError("no node of the cluster is up: start one with `ray start`, or wait until Ray has noticed it")
    _check_processors(spec)
    _check_memory(spec, num_parameters)


def _check_memory(spec: JobSpec, num_parameters: int) -> None:
    """Refuse weights that are too large for the largest node, or for all nodes together.

    Otherwise the system would kill processes during the run.
    """
    scaling = spec.scaling
    members: Any = ray.nodes  # Ray's stub is untyped
    nodes = [int(node["Resources"].get("memory", 0)) for node in members() if node["Alive"]]
    # True if vectors travel through connections, and not only through shared memory.
    sends_vectors = scaling.lane in ("tcp", "ray") or (scaling.lane == "auto" and len(nodes) > 1)
    partition = -(-num_parameters // scaling.servers)
    server = server_memory(spec, partition, scaling.least_workers, scaling.least_workers if sends_vectors else 0)
    worker = FLOAT32 * num_parameters * 2 * (scaling.pipeline + 1)  # weights and gradient of each batch in hand
    total = scaling.servers * server + scaling.least_workers * worker
    if max(server, worker) > max(nodes) or total > sum(nodes):
        raise ClusterError(
            f"weights of {num_parameters:,} values take {_gib(server)} in each server and {_gib(worker)} in each "
            f"worker, together {_gib(total)} for {counted(scaling.servers, 'server')} and "
            f"{counted(scaling.least_workers, 'worker')}, but the nodes have {', '.join(map(_gib, nodes))}. Raise "
            "scaling.servers, lower scaling.workers or scaling.pipeline, or add memory"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _check_processors(spec: JobSpec) -> None:
    scaling = spec.scaling
    limit_s = spec.failure.start_timeout_s
    need = {"CPU": float(scaling.cpus_per_worker)}
    if scaling.gpus_per_worker:
        need["GPU"] = scaling.gpus_per_worker
    members: Any = ray.nodes  # Ray's stub is untyped
    nodes = [node["Resources"] for node in members() if node["Alive"]]
    room = sum(int(min(node.get(kind, 0.0) // amount for kind, amount in need.items())) for node in nodes)
    if room >= scaling.least_workers or (limit_s > 0 and _wait_for_room(need, scaling.least_workers, limit_s)):
        return
    needed = " and ".join(counted(float(scaling.least_workers * amount), kind) for kind, amount in need.items())
    available = " and ".join(counted(float(sum(node.get(kind, 0.0) for node in nodes)), kind) for kind in need)
    raise ClusterError(
        f"the job needs {needed} ({counted(scaling.least_workers, 'worker')}), but the cluster has {available}, which "
        f"is room for {counted(room, 'worker')}. Lower scaling.workers or scaling.cpus_per_worker, or set "
        "failure.start_timeout_s to wait for a cluster that grows"
    )


def _wait_for_room(need: dict[str, float], workers: int, limit_s: float) -> bool:
    """Request room for the workers, which makes an autoscaler add nodes. Return False if there is none in time."""
    group = placement_group([need] * workers)
    try:
        return bool(group.wait(limit_s))
    finally:
        remove_placement_group(group)
