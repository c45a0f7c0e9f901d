from __future__ import annotations

import resource
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import ray
from ray.exceptions import AuthenticationError, RayError

from psgd.cluster import session as module
from psgd.cluster.session import check_room, session
from psgd.errors import ClusterError, ClusterLostError, ClusterStartError
from psgd.spec import JobSpec
from tests.support.jobs import job


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list with one entry for each shutdown of Ray."""
    calls: list[str] = []
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    return calls


def fail(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Make `ray.init` raise an error."""

    def init(**_: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)


def begin(spec: JobSpec, address: str | None) -> None:
    with session(spec, address):
        pass


@pytest.mark.parametrize(
    "error", [Exception("The node timed out"), RuntimeError("no\nThe node timed out\n"), OSError()]
)
def test_a_ray_that_does_not_start_is_one_sentence_with_its_logs_and_the_limits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ended: list[str], error: Exception
) -> None:
    fail(monkeypatch, error)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    limits = {resource.RLIMIT_FSIZE: 1024, resource.RLIMIT_NPROC: 100}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits.get(kind, resource.RLIM_INFINITY), -1))
    with pytest.raises(ClusterStartError) as failed:
        begin(job(), None)
    cause = "OSError" if isinstance(error, OSError) else "The node timed out"
    assert str(failed.value).startswith(
        f"Ray did not start on this machine: {cause}. Look for the cause in {tmp_path}/ray/session_latest/logs, and at "
        "the limits of this process: processes 100, bytes of a file 1,024, free memory "
    )
    assert "\n" not in str(failed.value)
    assert ended == ["shutdown"]


def test_a_process_limit_that_ray_would_hit_is_refused_before_ray_starts(
    monkeypatch: pytest.MonkeyPatch, ended: list[str]
) -> None:
    fail(monkeypatch, AssertionError("Ray must not be started"))
    start = Thread.start
    probes: list[Thread] = []

    def limited(thread: Thread) -> None:
        if len(probes) == 100:
            raise RuntimeError("can't start new thread")
        probes.append(thread)
        start(thread)

    monkeypatch.setattr(Thread, "start", limited)
    with pytest.raises(ClusterStartError, match=r"needs about \d+ threads for this job, but only 100 .*`ulimit -u`"):
        begin(job(), None)
    assert not any(probe.is_alive() for probe in probes)
    assert not ended


@pytest.mark.parametrize(
    ("error", "address", "message"),
    [
        (
            AuthenticationError("no token was found"),
            "head:6379",
            "cluster at head:6379 refused this driver: no token was found",
        ),
        (
            ConnectionError("Failed to connect"),
            "head:6379",
            "Either the port .*6379.*, or this driver's token .*is off",
        ),
        (ConnectionError("Could not find any"), "auto", "No Ray runs on this machine"),
        (RuntimeError("another version of Ray"), "head:6379", "at head:6379: another version of Ray"),
    ],
)
def test_a_cluster_that_cannot_be_joined_says_what_may_be_wrong(
    monkeypatch: pytest.MonkeyPatch, error: Exception, address: str, message: str
) -> None:
    fail(monkeypatch, error)
    monkeypatch.setenv("RAY_AUTH_MODE", "off")
    with pytest.raises(ClusterError, match=message):
        begin(job(), address)


def test_a_connection_of_the_callers_is_used_and_left(monkeypatch: pytest.MonkeyPatch, ended: list[str]) -> None:
    fail(monkeypatch, AssertionError("it is connected already"))
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    begin(job(), None)
    assert ended == []


def test_what_ray_refuses_within_a_session_loses_the_cluster(monkeypatch: pytest.MonkeyPatch, ended: list[str]) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: None)
    with pytest.raises(ClusterLostError, match="refused a call: the object store is full"), session(job(), None):
        raise RayError("the object store is full")
    assert ended == ["shutdown"]


def test_a_cluster_without_nodes_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "living_nodes", list)
    with pytest.raises(ClusterError, match="no node of the cluster is up"):
        check_room(job(), 10)
