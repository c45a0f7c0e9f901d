"""What Ray's errors mean, as events of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import RayActorError, RayError, RayTaskError, RuntimeEnvSetupError

from psgd.core.driver.events import LaneFailed, ServerLost, WorkerFailed, WorkerLost
from psgd.errors import ClusterLostError
from psgd_workers.errors import LaneError, WorkerError

__all__ = ["reason_of", "refusals", "server_failure", "worker_failure"]


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what Ray raises in the block, other than for one actor's call, into the loss of the cluster.

    Raises:
        ClusterLostError: with Ray's reason.
    """
    try:
        yield
    except RayError as error:
        raise ClusterLostError(
            f"the cluster refused a call: {reason_of(error)}. Ray's logs may say more; the same command with --resume "
            "continues"
        ) from error


def worker_failure(worker: str, lease: int | None, error: RayError) -> WorkerLost | WorkerFailed | LaneFailed:
    """What a failed call to a worker means."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, LaneError) and lease is not None:
            return LaneFailed(worker, lease, str(cause))
        return WorkerFailed(worker, str(cause) if isinstance(cause, WorkerError) else f"{error}")
    preempted = isinstance(error, RayActorError) and bool(error.preempted)
    return WorkerLost(worker, reason_of(error), preempted, died=not _never_began(error))


def server_failure(partition: int, error: RayError) -> ServerLost:
    """What a failed call to a server means."""
    died = isinstance(error, RayActorError) and not error.actor_init_failed
    return ServerLost(partition, reason_of(error), died)


def _never_began(error: RayError) -> bool:
    """Return True if the actor's constructor raised, or its process could not be given what it runs with."""
    if isinstance(error, RayActorError):
        return bool(error.actor_init_failed)
    return isinstance(error, RuntimeEnvSetupError)


def reason_of(error: Exception) -> str:
    """Return the line of an error of Ray's that tells the reason: the last one, but not of its memory monitor's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    memory = [line for line in lines if "Memory on the node" in line]  # which node, and how many gigabytes
    return [type(error).__name__, *lines, *memory][-1]
