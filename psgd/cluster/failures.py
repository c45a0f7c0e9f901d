"""Translation of Ray's errors into events for the coordinator, and into psgd's own errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import RayActorError, RayError, RayTaskError, RuntimeEnvSetupError

from psgd.core.driver.events import LaneFailed, ServerLost, WorkerFailed, WorkerLost
from psgd.errors import ClusterLostError
from psgd_workers.errors import LaneError, WorkerError

__all__ = ["map_ray_errors", "reason_of", "server_failure", "worker_failure"]


@contextmanager
def map_ray_errors() -> Iterator[None]:
    """Raise `ClusterLostError` for an error of Ray in the block.

    The block itself handles errors that concern a single actor.

    Raises:
        ClusterLostError: Ray refused a call. The message holds Ray's reason.
    """
    try:
        yield
    except RayError as error:
        raise ClusterLostError(
            f"the cluster refused a call: {reason_of(error)}. Ray's logs may say more. The same command with "
            "--resume continues the run"
        ) from error


def worker_failure(worker: str, lease: int | None, error: RayError) -> WorkerLost | WorkerFailed | LaneFailed:
    """Return the event that a failed call to a worker stands for.

    Args:
        worker: name of the worker.
        lease: id of the lease that the call worked through; None if the call was not for a lease.
        error: the error that Ray raised.
    """
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, LaneError) and lease is not None:
            return LaneFailed(worker, lease, str(cause))
        return WorkerFailed(worker, str(cause) if isinstance(cause, WorkerError) else f"{error}")
    preempted = isinstance(error, RayActorError) and bool(error.preempted)
    return WorkerLost(worker, reason_of(error), preempted, died=not _never_began(error))


def server_failure(partition: int, error: RayError) -> ServerLost:
    """Return the event that a failed call to a partition's server stands for."""
    died = isinstance(error, RayActorError) and not error.actor_init_failed
    return ServerLost(partition, reason_of(error), died)


def _never_began(error: RayError) -> bool:
    """Return True if the actor's constructor raised, or if Ray could not set up its runtime environment."""
    if isinstance(error, RayActorError):
        return bool(error.actor_init_failed)
    return isinstance(error, RuntimeEnvSetupError)


def reason_of(error: Exception) -> str:
    """Return the line of Ray's error message that gives the reason.

    This is the last line. For an error of Ray's memory monitor, it is the line that names the node and the memory.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    memory = [line for line in lines if "Memory on the node" in line]
    return [type(error).__name__, *lines, *memory][-1]
