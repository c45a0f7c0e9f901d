from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import (
    ActorDiedError,
    GetTimeoutError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RaySystemError,
    RayTaskError,
    RuntimeEnvSetupError,
)

from psgd.cluster.failures import server_failure, worker_failure
from psgd.core.driver.events import LaneFailed, ServerLost, WorkerFailed, WorkerLost
from psgd_workers.errors import ServerGoneError, WorkerError

TRACEBACK = 'Traceback (most recent call last):\n  File "model.py", line 3\nKeyError: no such layer\n'
MEMORY = "Memory on the node (IP: 10.0.0.7, ID: 49aa) was 22.56GB used / 23.54GB limit (0.958)"
OUT_OF_MEMORY = (  # message of the memory monitor of Ray 2.60, without its lists
    f"1 worker(s) were killed due to the node running low on memory. {MEMORY}\n"
    "OOM kill reason: Memory usage 24223500288B exceeded threshold of 24012256256B (95.0% of 25276059648B limit)\n"
    "To see more information about memory usage on this node, use `ray logs raylet.out -ip 10.0.0.7`\n"
    "Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/en/latest/"
)


def raised(cause: Exception) -> RayTaskError:
    """Return the error of a call that raised in the actor."""
    error: Any = RayTaskError  # Ray's stub is untyped
    return error("work", TRACEBACK, cause)  # type: ignore[no-any-return]


def system_error() -> RayError:
    error: Any = RaySystemError  # Ray's stub is untyped
    return error(OSError("full"))  # type: ignore[no-any-return]


def died(message: str = "killed\n  by the kernel \n\n", **context: bool) -> RayActorError:
    return RayActorError("0a", message, **context)


@pytest.mark.parametrize(
    ("error", "lease", "expected"),
    [
        (raised(ServerGoneError("the server is gone")), 7, LaneFailed("worker-0", 7, "the server is gone")),
        (raised(WorkerError("the model raised")), 7, WorkerFailed("worker-0", "the model raised")),
        (died(), 7, WorkerLost("worker-0", "by the kernel", preempted=False)),
        (died(preempted=True), 7, WorkerLost("worker-0", "by the kernel", preempted=True)),
        (GetTimeoutError("no answer in time"), None, WorkerLost("worker-0", "no answer in time", preempted=False)),
        (system_error(), 7, WorkerLost("worker-0", "System error: full", preempted=False)),
        (GetTimeoutError(), 7, WorkerLost("worker-0", "GetTimeoutError", preempted=False)),
        (
            died("in its creation task:\n  model.py\nImportError: no my_model", actor_init_failed=True),
            None,
            WorkerLost("worker-0", "ImportError: no my_model", died=False),
        ),
        (RuntimeEnvSetupError("no such package"), None, WorkerLost("worker-0", "no such package", died=False)),
    ],
    ids=["lane", "model", "died", "preempted", "silent", "system", "says-nothing", "never-built", "no-environment"],
)
def test_what_a_failed_call_to_a_worker_means(
    error: RayError, lease: int | None, expected: LaneFailed | WorkerFailed | WorkerLost
) -> None:
    assert worker_failure("worker-0", lease, error) == expected


@pytest.mark.parametrize(
    ("error", "lease"),
    [(raised(KeyError("no such layer")), 7), (raised(ServerGoneError("the server is gone")), None)],
    ids=["our-own-fault", "a-lane-outside-a-lease"],
)
def test_what_nobody_foresaw_fails_the_run_with_its_traceback(error: RayError, lease: int | None) -> None:
    failed = worker_failure("worker-0", lease, error)
    assert isinstance(failed, WorkerFailed)
    assert "KeyError: no such layer" in failed.cause


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (died(), ServerLost(1, "by the kernel", died=True)),
        (ActorDiedError(), ServerLost(1, ActorDiedError.BASE_ERROR_MSG, died=True)),
        (died(actor_init_failed=True), ServerLost(1, "by the kernel", died=False)),
        (raised(ValueError()), ServerLost(1, "KeyError: no such layer", died=False)),
        (GetTimeoutError("no answer in time"), ServerLost(1, "no answer in time", died=False)),
    ],
    ids=["died", "without-a-word", "never-began", "raised", "silent"],
)
def test_what_a_failed_call_to_a_server_means(error: RayError, expected: ServerLost) -> None:
    assert server_failure(1, error) == expected


def out_of_memory() -> RayError:
    error: Any = OutOfMemoryError  # Ray's stub is untyped
    return error(OUT_OF_MEMORY)  # type: ignore[no-any-return]


@pytest.mark.parametrize("error", [out_of_memory(), died(f"The actor died.\n{OUT_OF_MEMORY}")])
def test_whom_the_memory_monitor_killed_was_on_a_node_with_so_many_gigabytes(error: RayError) -> None:
    lost = worker_failure("worker-0", 7, error)
    assert isinstance(lost, WorkerLost)
    assert lost.cause.endswith(MEMORY)
    assert server_failure(1, error).cause.endswith(MEMORY)
