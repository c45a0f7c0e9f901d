from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from psgd.core.driver.events import Change
from psgd.core.server.parameter_server import ParameterServer
from psgd.serving.compiled.loading import load_direct_path
from psgd.simulation import push_path
from psgd.simulation.cluster import VirtualCluster
from psgd.simulation.faults import FaultPlan, PushFault
from psgd.simulation.observer import ClusterObserver
from psgd.simulation.problem import Problem
from psgd.spec import Settings
from psgd_workers.messages import EpochGrid
from tests.support.jobs import START, job, quadratic

GRID = EpochGrid((60, 61), 121)


class Doubled(FaultPlan):
    """Delivers every fifth push twice, the second time late."""

    def push(self, worker: str, number: int, partitions: int) -> PushFault | None:
        return PushFault([(0.0, 0.4)] * partitions) if number % 5 == 0 else None


class Journals(ClusterObserver):
    """Keeps the journals of all servers."""

    def __init__(self) -> None:
        self.records: list[bytes] = []

    def journalled(self, cluster: VirtualCluster, partition: int, records: NDArray[np.void]) -> None:
        self.records.append(records.tobytes())


def run(**sections: Any) -> tuple[VirtualCluster, list[bytes]]:
    """Run a job whose server is killed once, and which changes its mode twice."""
    spec = job(workers=3, failure={"max_failures": -1}, **sections)
    journals = Journals()
    times = np.random.default_rng(0)
    cluster = VirtualCluster(
        spec,
        Problem(GRID, START, quadratic),
        lambda worker, batch: float(times.exponential(0.3)),
        faults=Doubled(),
        observers=[journals],
        events=[(7.0, Change(spec.settings)), (9.0, Change(_settings("bsp"))), (11.0, Change(_settings("async")))],
    )
    cluster.after(5.0, cluster.kill_server, 0)
    return cluster.run(), journals.records


def _settings(mode: str) -> Settings:
    return job(mode).settings


@pytest.mark.parametrize("sections", [{}, {"scaling": {"servers": 2}}])
def test_compiled_code_gives_the_run_of_the_reference(
    monkeypatch: pytest.MonkeyPatch, compiled_code: None, sections: dict[str, Any]
) -> None:
    reference, expected = run(**sections)
    loaded: list[ParameterServer] = []

    def load(server: ParameterServer) -> Any:
        loaded.append(server)
        return load_direct_path(server)

    monkeypatch.setattr(push_path, "COMPILE_AFTER", 5)
    monkeypatch.setattr(push_path, "load_direct_path", load)
    compiled, found = run(**sections)
    assert loaded
    assert found == expected
    assert compiled.now == reference.now
    assert compiled.weights.tobytes() == reference.weights.tobytes()
    assert compiled.status == reference.status


def test_a_mode_that_collects_gradients_loads_no_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_path, "COMPILE_AFTER", 1)
    monkeypatch.setattr(push_path, "load_direct_path", lambda server: pytest.fail("compiled code was loaded"))
    VirtualCluster(job("bsp", workers=2), Problem(GRID, START, quadratic), lambda worker, batch: 1.0).run()
