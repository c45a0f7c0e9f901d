from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import ray

from psgd.cluster.lanes import push_format_of
from psgd.cluster.session import check_room
from psgd.core.server.memory import server_memory
from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd.errors import ClusterError
from psgd.serving.connection import WorkerConnection
from psgd.serving.host import ServerHost
from psgd.serving.limited_log import LimitedLog
from psgd.spec import ConsistencySpec, CorrectionSpec, JobSpec, OptimizerSpec
from psgd_workers.messages import EpochGrid, Version
from psgd_workers.transport.frame_stream import FrameStream
from psgd_workers.transport.handshake import Hello
from tests.support.jobs import job
from tests.support.measured_server import SIZE, WORKERS

ROOT = Path(__file__).parents[3]
TOLERANCE = 0.1

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "sgd with momentum": {"momentum": 0.9},
    "sgd with an average": {"ema": 0.9},
    "sgd with a longest gradient": {"max_grad_norm": 1.0},
    "sgd with a largest value": {"clip_value": 1e-4},
    "adagrad": {"name": "adagrad"},
    "adam": {"name": "adam"},
    "adamw": {"name": "adamw"},
    "delayed_nesterov": {"name": "delayed_nesterov", "every": 3},
}
MODES: dict[str, dict[str, Any]] = {
    "async": {},
    "bsp": {},
    "k_sync": {"k": 2},
    "backup": {"b": 1},
    "ssp": {"s": 1},
    "softsync": {"s": 1},
    "ringmaster": {"r": 8},
    "rennala": {"s": 4},
    "malenia": {"s": 12},
    "ringleader": {},
    "buffered": {"k": 4},
    "local": {"h": 2, "lr": 0.1},
}
CORRECTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "staleness_lr": {},
    "delay_adaptive": {},
    "dc_asgd": {},
    "dc_asgd, adaptive": {"variant": "adaptive"},
    "gap_aware": {},
    "dana": {"momentum": 0.9},
    "rescaled": {},
}
TOGETHER: dict[str, dict[str, Any]] = {
    "compressed": {"compression": {"name": "fp16"}},
    "bsp, compressed": {"consistency": {"mode": "bsp"}, "compression": {"name": "int8"}},
    "bsp, clipped": {"consistency": {"mode": "bsp"}, "optimizer": {"lr": 0.1, "clip_value": 1e-4}},
    "buffered, averaged": {
        "consistency": {"mode": "buffered", "k": 4},
        "optimizer": {"name": "adam", "lr": 0.1, "ema": 0.9},
    },
}
CASES = (
    {f"optimizer {name}": {"optimizer": {"lr": 0.1} | fields} for name, fields in OPTIMIZERS.items()}
    | {f"mode {name}": {"consistency": {"mode": name} | fields} for name, fields in MODES.items()}
    | {
        f"correction {name}": {"correction": {"name": name.partition(",")[0]} | fields}
        for name, fields in CORRECTIONS.items()
    }
    | TOGETHER
)


@pytest.fixture(scope="module")
def measured() -> Iterator[Callable[[JobSpec], int]]:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system cannot measure the peak memory of a process from a given moment on; Linux can")
    command = [sys.executable, "-m", "tests.support.measured_server"]
    server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin
    assert server.stdout

    def measure(spec: JobSpec) -> int:
        assert server.stdin
        assert server.stdout
        print(spec.model_dump_json(), file=server.stdin, flush=True)
        return int(server.stdout.readline())

    yield measure
    server.stdin.close()
    server.stdout.close()
    assert server.wait(10) == 0


@pytest.mark.parametrize("sections", CASES.values(), ids=CASES)
def test_a_server_takes_the_memory_that_its_job_says(
    measured: Callable[[JobSpec], int], sections: dict[str, Any]
) -> None:
    spec = job(workers=WORKERS, **sections)
    expected = server_memory(spec, SIZE, WORKERS)
    assert measured(spec) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("pipeline", [0, 2])
@pytest.mark.parametrize("correction", ["none", "dc_asgd"])
def test_a_connection_that_carries_vectors_keeps_room_for_them(correction: str, pipeline: int) -> None:
    spec = job(correction={"name": correction}, scaling={"pipeline": pipeline})
    partition = Partition(0, 0, SIZE, SIZE)
    host = ServerHost(ParameterServer(spec, partition, np.zeros(SIZE, np.float32), EpochGrid((1,), 1), Version(1, 0)))
    hello = Hello.new(1, SIZE, pipeline + 1, False, "worker-0")
    ours, its = socket.socketpair()
    with ours, its:
        peer = WorkerConnection(
            host,
            push_format_of(spec, partition),
            slice(0, SIZE),
            ours,
            FrameStream(ours),
            hello,
            None,
            LimitedLog(),
        )
        room = sum(len(payload) for payload in peer._inline)
        peer._answers.close()
    assert room == server_memory(spec, SIZE, 1, connected=1) - server_memory(spec, SIZE, 1)


@pytest.mark.parametrize(
    "sections",
    [
        {"consistency": {"mode": "malenia", "s": 9}},
        {"consistency": {"mode": "ringleader"}},
        {"correction": {"name": "dana", "momentum": 0.9}},
    ],
)
def test_what_keeps_a_vector_for_each_worker_grows_with_them(sections: dict[str, Any]) -> None:
    few, many = (server_memory(job(workers=workers, **sections), 1000, workers) for workers in (2, 100))
    assert many - few >= 98 * 4 * 1000


@pytest.mark.parametrize(("mode", "fits"), [({"mode": "async"}, True), ({"mode": "malenia", "s": 9}, False)])
def test_a_job_is_refused_whose_server_would_not_fit_with_a_vector_for_each_worker(
    monkeypatch: pytest.MonkeyPatch, mode: dict[str, Any], fits: bool
) -> None:
    monkeypatch.setattr(
        ray, "nodes", lambda: [{"NodeID": "1", "Alive": True, "Resources": {"memory": 32 * 4 * SIZE, "CPU": 8}}]
    )
    spec = job(workers=8, consistency=mode)
    with nullcontext() if fits else pytest.raises(ClusterError, match=r"take .* in each server .* for 1 server"):
        check_room(spec, SIZE)


def names(union: Any, field: str) -> set[str]:
    """Return the values of the field that tells the members of a union apart."""
    members = [get_args(member)[0] if get_args(member) else member for member in get_args(get_args(union)[0])]
    return {get_args(member.model_fields[field].annotation)[0] for member in members}


def test_every_optimizer_mode_and_correction_is_measured() -> None:
    specs = [job(workers=WORKERS, **sections) for sections in CASES.values()]
    assert {spec.optimizer.name for spec in specs} == names(OptimizerSpec, "name")
    assert {spec.consistency.mode for spec in specs} == names(ConsistencySpec, "mode")
    assert {spec.correction.name for spec in specs} == names(CorrectionSpec, "name")
