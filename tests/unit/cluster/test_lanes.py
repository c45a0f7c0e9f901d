from __future__ import annotations

from typing import Any

import pytest
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from psgd.cluster.lanes import RayLane
from psgd.errors import PushRefusedError, RunError
from psgd_workers.errors import LaneTimeoutError, ServerGoneError
from psgd_workers.transport.memory import Segment


def raised(cause: Exception) -> RayTaskError:
    make: Any = RayTaskError  # Ray's stub is untyped
    error: RayTaskError = make("push", "a traceback", cause)
    return error


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (GetTimeoutError("late"), LaneTimeoutError, r"the server did not send the version within 3\.0 s"),
        (RayActorError("0a", "killed"), ServerGoneError, "the server did not answer: .*killed"),
        (raised(PushRefusedError("no such batch")), ServerGoneError, "the server refused the call: no such batch"),
        (raised(RunError("it failed")), ServerGoneError, "the server refused the call: it failed"),
    ],
    ids=["late", "dead", "refused", "failed"],
)
def test_whatever_ray_says_a_server_without_an_answer_is_gone(
    monkeypatch: pytest.MonkeyPatch, error: RayError, kind: type[ServerGoneError], message: str
) -> None:
    def get(reply: Any, timeout: float) -> None:
        raise error

    class Server:
        version: Any = type("Method", (), {"remote": staticmethod(lambda: None)})

    monkeypatch.setattr(ray, "get", get)
    server: Any = Server()
    lane = RayLane(server, Segment(4, 1), slice(0, 4))
    with pytest.raises(ServerGoneError, match=message) as caught:
        lane.version(3.0)
    assert type(caught.value) is kind
