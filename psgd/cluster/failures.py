"""What Ray's errors mean, as events of ours."""

from __future__ import annotations

from ray.exceptions import RayActorError, RayError, RayTaskError

from psgd.core.driver.events import LaneFailed, ServerLost, WorkerFailed, WorkerLost
from psgd_workers.errors import LaneError, WorkerError

__all__ = ["server_failure", "worker_failure"]


def worker_failure(worker: str, lease: int | None, error: RayError) -> WorkerLost | WorkerFailed | LaneFailed:
    """What a failed call to a worker means."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, LaneError) and lease is not None:
            return LaneFailed(worker, lease, str(cause))
        return WorkerFailed(worker, str(cause) if isinstance(cause, WorkerError) else f"{error}")
    if isinstance(error, RayActorError):
        return WorkerLost(worker, _last_line(error), preempted=bool(error.preempted))
    return WorkerLost(worker, _last_line(error))


def server_failure(partition: int, error: RayError) -> ServerLost:
    """What a failed call to a server means."""
    died = isinstance(error, RayActorError) and not error.actor_init_failed
    return ServerLost(partition, _last_line(error), died)


def _last_line(error: Exception) -> str:
    """Ray's messages end with the reason."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
