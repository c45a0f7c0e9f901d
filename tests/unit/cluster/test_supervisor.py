"""The supervisor without Ray: fake actors record the calls, and the tests provide the answers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError, RayError

from psgd.cluster import supervisor
from psgd.cluster.supervisor import Inputs, Supervisor
from psgd.core.context import RunContext
from psgd.core.driver.events import (
    Action,
    AskReport,
    Evaluate,
    Evaluated,
    EvaluationLost,
    Event,
    Finish,
    Paused,
    Reported,
    ServerLost,
    Started,
    StartServer,
    StartWorker,
    StopWorker,
    Tick,
    WorkerLost,
    WorkerUp,
)
from psgd.core.driver.status import RunStatus
from psgd.core.server.partitions import partition_weights
from psgd.errors import ClusterLostError
from psgd.job import OpenJob
from psgd.store.checkpoint_writer import CheckpointWriter
from psgd.store.storage import Storage
from tests.support.jobs import job

SERVERS = 2
DONE = Finish("finished")


class Call:
    """A call of an actor's method, which returns if the test has given `Cluster` an answer for it."""

    def __init__(self, actor: Actor, method: str) -> None:
        self.actor = actor
        self.method = method


class Actor:
    """A fake actor handle, all methods of which can be called."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster = cluster
        self.name = name

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *_: self.cluster.called(Call(self, method)))


class Cluster:
    """A fake of Ray.

    Attributes:
        killed: names of the killed actors, in order.
        nodes: ids of the nodes that servers were started on, in order.
        may_be_silent: True if the supervisor may wait for calls that are never answered.
        gone: error that `wait` and `kill` raise; None while the cluster is there.
    """

    def __init__(self) -> None:
        self.killed: list[str] = []
        self.nodes: list[str] = []
        self.may_be_silent = False
        self.gone: RayError | None = None
        self._answers: dict[tuple[str, str], Any] = {}
        self._due: dict[Call, Any] = {}

    def answers(self, actor: str, method: str, answer: Any) -> None:
        """Set the answer to a method's calls from now on. An exception is raised instead of returned."""
        self._answers[actor, method] = answer

    def answers_all(self, calls: list[Call], actor: str, answer: Any) -> None:
        """Answer the open calls of an actor."""
        self._due.update({call: answer for call in calls if call.actor.name == actor})

    def called(self, call: Call) -> Call:
        key = call.actor.name, call.method
        if key in self._answers:
            self._due[call] = self._answers[key]
        return call

    def start_server(self, context: RunContext, partition: int, incarnation: int, origin: Any, node: str) -> Actor:
        self.nodes.append(node)
        return Actor(self, f"server-{partition}-{incarnation}")

    def start_worker(self, context: RunContext, name: str, dataset: Any, servers: Sequence[Actor]) -> Actor:
        return Actor(self, name)

    def wait(self, calls: list[Call], num_returns: int, timeout: float) -> tuple[list[Call], list[Call]]:
        if self.gone:
            raise self.gone
        ready = [call for call in calls if call in self._due][:num_returns]
        assert ready or timeout == 0 or self.may_be_silent, (
            f"waits for {[(c.actor.name, c.method) for c in calls]}, and nothing comes"
        )
        return ready, [call for call in calls if call not in ready]

    def get(self, call: Call) -> Any:
        answer = self._due.pop(call)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self, actor: Actor) -> None:
        self.killed.append(actor.name)
        if self.gone:
            raise self.gone


class Script:
    """A fake coordinator with a fixed list of expected events and the actions that follow each."""

    def __init__(self, *steps: tuple[type[Event], list[Action]]) -> None:
        self._steps = iter(steps)
        self.events: list[Event] = []

    def handle(self, event: Event, now: float) -> Sequence[Action]:
        if isinstance(event, Tick):
            return ()
        expected, actions = next(self._steps)
        assert isinstance(event, expected), (event, expected)
        self.events.append(event)
        return actions

    def next_deadline(self) -> None:
        """Return no deadline."""

    def status(self, now: float) -> RunStatus:
        raise AssertionError("nothing here looks at the run")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()
    monkeypatch.setattr(supervisor, "ray", made)
    monkeypatch.setattr(supervisor, "start_server", made.start_server)
    monkeypatch.setattr(supervisor, "start_worker", made.start_worker)
    monkeypatch.setattr(supervisor, "living_nodes", lambda: ["a", "b", "c"])
    return made


def train(tmp_path: Path, script: Script, **sections: Any) -> Finish:
    data = {"format": "sklearn", "dataset": "iris", "batch_size": 10}
    opened = OpenJob.open(job(data=data, scaling={"servers": SERVERS}, **sections))
    partitions = partition_weights(opened.layout.num_parameters, opened.layout.num_trainable, SERVERS)
    context = RunContext(opened.spec, opened.layout, opened.shards.grid, partitions, "driver", "nowhere")
    incarnations = iter(range(2, 9))
    run: Any = SimpleNamespace(
        storage=Storage(str(tmp_path)),
        incarnation=1,
        next_incarnation=lambda: next(incarnations),
        event=lambda kind, **_: None,
        take_commands=list,
        beat=lambda now: None,
    )
    inputs: Any = Inputs(context, None, None)  # type: ignore[arg-type]
    coordinator: Any = script
    checkpoint_writer = CheckpointWriter(run, context, "", "", None)
    return Supervisor(coordinator, inputs, run, checkpoint_writer, lambda *_: None, lambda _: None).train()


BOTH: list[Action] = [StartServer(0), StartServer(1), StartWorker("worker-0")]
UP = ("host:1", ())


def test_an_evaluation_that_asks_a_dead_server_before_its_loss_is_known_is_lost_with_it(
    tmp_path: Path, cluster: Cluster
) -> None:
    """The other server's report arrives together with the news of the loss, and is handled first."""
    cluster.answers("worker-0", "ready", UP)
    cluster.answers("server-0-1", "report", "report")
    cluster.answers("server-0-1", "epoch_weights", np.zeros(3))
    cluster.answers("server-1-1", "report", RayActorError())
    script = Script(
        (Started, BOTH),
        (WorkerUp, [AskReport(0, 1, wait=True), AskReport(1, 1, wait=True)]),
        (Reported, [Evaluate("worker-0", 4)]),
        (ServerLost, [StartServer(1)]),
        (EvaluationLost, [DONE]),
    )
    assert train(tmp_path, script) == DONE
    assert script.events[-1] == EvaluationLost("worker-0", 4)
    assert cluster.killed == ["server-1-1", "worker-0", "server-0-1", "server-1-2"]


def test_an_evaluation_that_has_the_dead_servers_part_goes_on(tmp_path: Path, cluster: Cluster) -> None:
    cluster.answers("worker-0", "ready", UP)
    for server in ("server-0-1", "server-1-1"):
        cluster.answers(server, "epoch_weights", np.zeros(3))
    cluster.answers("server-1-1", "report", RayActorError())
    cluster.answers("worker-0", "evaluate", "result")
    script = Script(
        (Started, BOTH),
        (WorkerUp, [Evaluate("worker-0", 4), AskReport(1, 1, wait=True)]),
        (ServerLost, [StartServer(1)]),
        (Evaluated, [DONE]),
    )
    assert train(tmp_path, script) == DONE


def test_a_server_is_not_restored_on_any_node_that_lost_one_lately(tmp_path: Path, cluster: Cluster) -> None:
    cluster.answers("server-1-1", "report", RayActorError())
    cluster.answers("server-1-2", "report", RayActorError())
    again: list[Action] = [StartServer(1), AskReport(1, 1, wait=True)]
    script = Script((Started, [StartServer(0), *again]), (ServerLost, again), (ServerLost, [StartServer(1), DONE]))
    assert train(tmp_path, script) == DONE
    assert cluster.nodes == ["a", "b", "c", "a"]


def test_answers_of_one_actor_that_expire_at_once_mean_one_loss(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first expired call, the supervisor ignores all calls of that actor."""
    ticks = count()
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: 0.0 if next(ticks) < 20 else 0.5))
    cluster.may_be_silent = True
    ask: list[Action] = [AskReport(0, 1, wait=False), AskReport(0, 2, wait=True)]
    script = Script((Started, [StartServer(0), *ask]), (ServerLost, [DONE]))
    assert train(tmp_path, script, failure={"timeout_s": 0.1}) == DONE
    (_, lost) = script.events
    assert isinstance(lost, ServerLost)
    assert "no answer in time" in lost.cause


def test_answers_that_arrived_while_the_driver_was_paused_are_in_time(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver is paused for 30 s while it waits. Then Ray hands over one answer at first, and the other later."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: clock.now))
    pauses = iter([0.0, 30.0])
    wait = cluster.wait

    def paused_wait(calls: list[Call], num_returns: int, timeout: float) -> tuple[list[Call], list[Call]]:
        pause = next(pauses, 0.0) if timeout > 0 else 0.0
        clock.now += pause
        if pause:
            cluster.answers_all(calls, "server-0-1", "report")
        return wait(calls, num_returns, timeout)

    cluster.wait = paused_wait  # type: ignore[method-assign]
    cluster.may_be_silent = True
    ask: list[Action] = [AskReport(0, 1, wait=False), AskReport(1, 1, wait=False)]
    script = Script((Started, [StartServer(0), StartServer(1), *ask]), (Paused, []), (Reported, [DONE]))
    assert train(tmp_path, script, failure={"timeout_s": 3.0}) == DONE
    (_, paused, _) = script.events
    assert isinstance(paused, Paused)
    assert paused.seconds == pytest.approx(30.0, abs=1.0)


def test_a_worker_is_stopped_whose_death_was_found_a_moment_before(tmp_path: Path, cluster: Cluster) -> None:
    """The coordinator stops the worker for a report that arrives together with the news of the worker's death."""
    cluster.answers("server-0-1", "report", "report")
    cluster.answers("worker-0", "ready", RayActorError())
    script = Script(
        (Started, [StartServer(0), AskReport(0, 1, wait=True), StartWorker("worker-0")]),
        (Reported, [StopWorker("worker-0", "no sign of life")]),
        (WorkerLost, [DONE]),
    )
    assert train(tmp_path, script) == DONE
    assert cluster.killed == ["worker-0", "server-0-1"]


@pytest.mark.parametrize("partition", [0, 1])
def test_when_no_node_is_up_the_cluster_is_lost(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, partition: int
) -> None:
    def no_nodes() -> list[str]:
        return [] if cluster.nodes else ["a"]

    monkeypatch.setattr(supervisor, "living_nodes", no_nodes)
    cluster.answers("server-0-1", "report", RayActorError())
    script = Script(
        (Started, [StartServer(0), StartWorker("worker-0"), AskReport(0, 1, wait=True)]),
        (ServerLost, [StartServer(partition)]),
    )
    with pytest.raises(ClusterLostError, match=r"Ray knows no node that is up.*--resume continues"):
        train(tmp_path, script)
    assert "worker-0" in cluster.killed


def test_a_call_that_ray_refuses_means_that_the_cluster_is_lost(tmp_path: Path, cluster: Cluster) -> None:
    cluster.gone = RayError("the head does not answer")
    script = Script((Started, [StartServer(0), StartServer(1), AskReport(0, 1, wait=True)]))
    with pytest.raises(ClusterLostError, match="refused a call: the head does not answer"):
        train(tmp_path, script)
    assert cluster.killed == ["server-0-1", "server-1-1"]
