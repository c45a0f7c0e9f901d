"""Fault injection: whole runs on a virtual cluster with random faults, all decided by one seed.

A seed draws a job, the speeds of its workers and a list of faults. Workers and servers die and hang. Messages are lost,
doubled, delayed and reordered. Links break, checkpoints fail, and the driver dies and is replaced by one that resumes
the run. The run must finish, and must not violate an invariant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf
from random import Random
from typing import Any

from pydantic import TypeAdapter

from psgd.core.driver.events import Action, Change, Commit, Save, SaveFailed, Scale
from psgd.core.server.parameter_server import ParameterServer
from psgd.errors import RunError, SpecError
from psgd.simulation.cluster import VirtualCheckpoint, VirtualCluster
from psgd.simulation.faults import FaultPlan, PushFault
from psgd.simulation.observer import ClusterObserver
from psgd.simulation.problem import Problem, Timing
from psgd.spec import ConsistencySpec, JobSpec, ModeTraits, Settings
from psgd.spec.changes import change_workers
from psgd_workers.messages import BatchId, EpochGrid, Evaluation, FloatArray, Receipt
from tests.simulation.invariants import Audit, one_hot

__all__ = ["FAULTS", "FinishedRun", "RandomFaults", "RandomRun", "describe_failure", "draw_run", "run_with_faults"]

MAX_EVENTS = 60_000  # largest number of events in one process of the driver
MAX_S = 300.0  # longest duration of one process of the driver, virtual seconds
START_S = 0.5  # time until a worker process has started, virtual seconds
RECEIPT_FACTOR = 2  # time limit for a receipt, as a multiple of `failure.timeout_s`, as in psgd_workers.worker
LATEST_S = 3.0  # longest delay of a message, virtual seconds

FAULTS = {  # kind -> relative frequency
    "crash": 4,
    "late": 3,  # the worker dies during its next push, which arrives later
    "torn": 3,  # the worker dies during its next push, which reaches only some servers
    "after": 2,  # the worker dies after its next push has reached all servers
    "preempt": 2,
    "hang": 2,
    "hang for ever": 1,
    "slow": 1,
    "server": 3,
    "server at a save": 2,
    "server at a commit": 2,
    "server at an epoch's end": 2,
    "server restored": 1,
    "cut": 3,
    "save": 2,
    "commit": 1,
    "driver": 2,
    "scale": 2,
    "set": 1,
}


@dataclass(frozen=True, slots=True)
class RandomRun:
    """A job and its faults, as drawn from a seed."""

    seed: int
    spec: JobSpec
    grid: EpochGrid
    epochs: int
    timing: Timing
    lease_s: float  # virtual seconds of work in a lease
    faults: tuple[tuple[float, str], ...]  # (virtual seconds after the start of the driver's process, kind)
    unreliable_s: float  # virtual time until which messages are lost, doubled and delayed
    lost: float  # until then, share of the messages that are lost
    late: float  # ... that are delayed
    doubled: float  # ... that arrive twice
    not_finite: int  # number of gradients that are not finite, at the start of the run
    evaluates: bool  # True if there is validation data


def draw_run(seed: int) -> RandomRun:
    """Draw a run from a seed."""
    random = Random(seed)  # noqa: S311 - no secret
    workers = random.randint(1, 6)
    servers = random.choice((1, 1, 2, 3))
    mode = _mode(random, workers, servers)
    pipeline = 0 if _traits(mode).workers_wait or _traits(mode).chooses_gradients else random.choice((0, 0, 1, 2))
    least = random.randint(1, workers) if mode["mode"] in ("async", "bsp", "ssp") and random.random() < 0.3 else workers
    poison = {"poison": "skip", "poison_tries": 2} if random.random() < 0.2 else {"poison_tries": 10**6}
    epochs = random.randint(1, 3)
    spec = JobSpec.model_validate(
        {
            "model": {"kind": "linear"},
            "data": {"format": "sklearn", "dataset": "iris"},
            "optimizer": {"lr": 1.0},
            "consistency": mode,
            "scaling": {"workers": {"min": least, "max": workers}, "servers": servers, "pipeline": pipeline},
            "compression": {"name": "top_k", "ratio": 0.5} if random.random() < 0.2 else {"name": "none"},
            "run": {"epochs": epochs},
            "checkpoint": {"every_s": None, "every_updates": random.choice((None, 3, 8))}
            if random.random() < 0.7
            else {"every_s": random.choice((0.5, 2.0))},
            "failure": {"max_failures": -1, "max_rejected": 10**6, "timeout_s": random.choice((1.0, 3.0))} | poison,
        }
    )
    shards = tuple(random.randint(1, 5) for _ in range(random.randint(1, 4)))
    kinds = list(FAULTS)
    weights = list(FAULTS.values())
    faults = sorted(
        (random.uniform(0, START_S + 5), kind) for kind in random.choices(kinds, weights, k=random.randint(0, 10))
    )
    lost, late, doubled = (random.choice((0.0, 0.0, 0.03, 0.1)) for _ in range(3))
    timing = Timing(
        start_s=START_S,
        link_s=random.choice((0.0, 0.0, 0.02)),
        poll_s=random.choice((0.2, 0.5)),
        death_s=random.choice((0.002, 0.05, 1.0)),
    )
    return RandomRun(
        seed,
        spec,
        EpochGrid(shards, sum(shards)),
        epochs,
        timing,
        random.choice((0.1, 0.5, 2.0)),
        tuple(faults),
        random.choice((0.0, 3.0, 6.0)),
        lost,
        late,
        doubled,
        not_finite=random.choice((0, 0, 0, 3)),
        evaluates=random.random() < 0.5,
    )


MODES: TypeAdapter[ConsistencySpec] = TypeAdapter(ConsistencySpec)


def _traits(mode: Mapping[str, Any]) -> ModeTraits:
    return MODES.validate_python(mode).traits


def _mode(random: Random, workers: int, servers: int) -> dict[str, Any]:
    """Draw a consistency mode that works with this number of servers."""
    late = random.choice(("requeue", "discard"))
    modes: list[dict[str, Any]] = [
        {"mode": "async"},
        {"mode": "async"},
        {"mode": "bsp"},
        {"mode": "ssp", "s": random.randint(0, 2)},
        {"mode": "softsync", "s": random.randint(1, workers)},
        {"mode": "ringmaster", "r": random.randint(1, 2 * workers), "late": late, "stop": random.random() < 0.3},
        {"mode": "buffered", "k": random.randint(1, 2 * workers)},
        {"mode": "local", "h": 2, "lr": 0.1, "synchronous": random.random() < 0.5},
        {"mode": "k_sync", "k": random.randint(1, workers), "late": late},
        {"mode": "backup", "b": random.randint(0, workers - 1), "late": late},
        {"mode": "rennala", "s": random.randint(1, 2 * workers), "late": late},
        {"mode": "malenia", "s": random.randint(1, 2 * workers), "late": late},
        {"mode": "ringleader"},
    ]
    return random.choice([mode for mode in modes if servers == 1 or not _traits(mode).chooses_gradients])


class RandomFaults(FaultPlan):
    """The faults during one process of the driver.

    Args:
        run: the run.
        random: random numbers that decide the details of each fault.
        faults: faults that have not happened yet, as in `RandomRun.faults`. A fault is removed when it happens.
    """

    def __init__(self, run: RandomRun, random: Random, faults: list[tuple[float, str]]) -> None:
        self._run = run
        self._random = random
        self._faults = faults
        self._timeout_s = run.spec.failure.timeout_s
        self.receipt_limit_s = RECEIPT_FACTOR * self._timeout_s
        self._armed: set[str] = set()  # kinds of faults that happen at the next opportunity
        self._next_push: dict[str, str] = {}  # worker -> fault of its next push
        self._hangs: dict[str, float] = {}  # worker -> virtual seconds by which its next gradient is delayed
        self._slow: dict[str, float] = {}  # worker -> factor of its compute times
        self._cuts: dict[tuple[str, int], float] = {}  # (worker, partition) -> virtual time until which the link is cut
        self._epochs: dict[int, int] = {}  # partition -> complete epochs after the last push

    def begin(self, cluster: VirtualCluster) -> None:
        """Schedule the faults."""
        self._cluster = cluster
        for fault in self._faults:
            cluster.after(fault[0], self._inject, fault)

    # Random numbers

    def compute_s(self, worker: str, batch: BatchId) -> float:
        """Draw the compute time of a gradient, in virtual seconds."""
        random = self._random
        seconds = random.expovariate(5.0) * self._slow.get(worker, 1.0) if random.random() < 0.8 else 0.2
        return seconds + self._hangs.pop(worker, 0.0)

    def _draw(self, share: float) -> bool:
        """Return True with this probability while messages are unreliable, and False later."""
        return share > 0 and self._cluster.now < self._run.unreliable_s and self._random.random() < share

    def _draw_delay_s(self) -> float:
        """Draw the delay of a message, in virtual seconds."""
        return self._random.uniform(0, LATEST_S) ** 2 / LATEST_S

    # Messages

    def reaches(self, worker: str, partition: int) -> bool:
        """Return False while the link between worker and server is cut."""
        return self._cuts.get((worker, partition), 0.0) <= self._cluster.now

    def push(self, worker: str, number: int, partitions: int) -> PushFault:
        """Draw the delays of each partition's part of a push, and add the fault that is due for the worker, if any."""
        fault = self._next_push.pop(worker, None)
        copies = [self._copies(worker, partition, fault) for partition in range(partitions)]
        return PushFault(copies) if fault is None else PushFault(copies, "dies", fault)

    def _copies(self, worker: str, partition: int, fault: str | None) -> Sequence[float]:
        """Draw the delays with which copies of one partition's part of a push arrive."""
        run = self._run
        if fault == "late":
            return (self._draw_delay_s(),)
        if fault == "torn" and self._random.random() < 0.5:
            return ()
        again = [self._draw_delay_s()] if self._draw(run.doubled) else []
        if not self.reaches(worker, partition) or self._draw(run.lost):
            return again
        return [*again, self._draw_delay_s() if self._draw(run.late) else 0.0]

    def receipt(self, partition: int, receipt: Receipt) -> float | None:
        """Draw the delay of a receipt, or None if it is lost."""
        if not self.reaches(receipt.worker, partition) or self._draw(self._run.lost):
            return None
        return self._draw_delay_s() if self._draw(self._run.late) else 0.0

    def arrived(self, partition: int) -> None:
        """Kill the server if its epoch has just ended and that fault is due."""
        epochs = self._cluster.servers[partition].epochs
        ended = epochs > self._epochs.get(partition, 0)
        self._epochs[partition] = epochs
        if ended and self._is_armed("server at an epoch's end"):
            self._cluster.kill_server(partition)

    # Checkpoints

    def allows(self, action: Action) -> bool:
        """Let checkpoints fail, and kill servers during them, if these faults are due."""
        cluster = self._cluster
        partition = self._random.randrange(len(self._cluster.parts))
        match action:
            case Save(number) | Commit(number) if self._is_armed(type(action).__name__.lower()):
                cluster.tell_soon(SaveFailed(number, "the disk is full"))
                return False
            case Save() if self._is_armed("server at a save"):
                if self._random.random() < 0.5:
                    cluster.kill_server(partition)
                else:
                    cluster.after(self._random.choice((0.0, 0.0015)), cluster.kill_server, partition)
            case Commit() if self._is_armed("server at a commit"):
                cluster.kill_server(partition)
        return True

    def _is_armed(self, kind: str) -> bool:
        """Return True if a fault of this kind is due, and disarm it."""
        armed = kind in self._armed
        self._armed.discard(kind)
        return armed

    # Faults

    def _inject(self, fault: tuple[float, str]) -> None:
        """Cause a fault now, or arm it for the next opportunity."""
        self._faults.remove(fault)
        cluster = self._cluster
        kind = fault[1]
        if kind in ("server at a save", "server at a commit", "server at an epoch's end", "save", "commit"):
            self._armed.add(kind)
        elif kind in ("server", "server restored"):
            partition = self._random.randrange(len(cluster.parts))
            cluster.kill_server(partition)
            if kind == "server restored":
                delay_s = cluster.timing.death_s + self._random.uniform(0, 2 * cluster.timing.restore_s)
                cluster.after(delay_s, cluster.kill_server, partition)
        elif kind == "driver":
            cluster.kill_driver()
        elif kind == "scale":
            self._scale()
        elif kind == "set":
            self._change()
        elif names := sorted(cluster.workers):
            self._inject_into(self._random.choice(names), kind)

    def _inject_into(self, worker: str, kind: str) -> None:
        """Cause a fault of a worker."""
        match kind:
            case "crash" | "preempt":
                self._cluster.lose_worker(worker, kind, preempted=kind == "preempt")
            case "hang":
                self._hangs[worker] = self._random.uniform(0, 4 * self._timeout_s)
            case "hang for ever":
                self._hangs[worker] = inf
            case "slow":
                self._slow[worker] = 10.0
            case "cut":
                partition = self._random.randrange(len(self._cluster.parts))
                self._cuts[worker, partition] = self._cluster.now + self._random.uniform(0, 4 * self._timeout_s)
            case _:
                self._next_push[worker] = kind

    def _scale(self) -> None:
        """Change the number of workers."""
        spec = self._run.spec
        workers = self._random.randint(1, spec.scaling.most_workers)
        with suppress(SpecError):  # a number of workers that is too small for the mode is refused
            change_workers(spec, str(workers))
            self._cluster.tell_soon(Scale(workers))

    def _change(self) -> None:
        """Change the numbers of the consistency mode, or switch between async and bsp."""
        spec = self._run.spec
        mode = spec.consistency.model_dump()
        for field in ("r", "s", "k"):
            if field in mode and mode["mode"] not in ("k_sync", "softsync"):
                mode[field] = max(1, mode[field] + self._random.choice((-1, 1)))
        if mode["mode"] in ("async", "bsp") and not spec.scaling.pipeline:
            mode = {"mode": self._random.choice(("async", "bsp"))}
        settings = Settings.model_validate({"consistency": mode, "optimizer": spec.optimizer.model_dump()})
        self._cluster.tell_soon(Change(settings))


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run that finished and passed all checks."""

    cluster: VirtualCluster  # of the driver's last process
    audit: Audit  # of all servers


def run_with_faults(
    seed: int, server: type[ParameterServer] = ParameterServer, observers: Sequence[ClusterObserver] = ()
) -> FinishedRun:
    """Draw a run from a seed, run it to its end, and check the invariants.

    Args:
        seed: seed of the run and of its faults.
        server: class of the servers.
        observers: observers of the run.

    Raises:
        ViolationError: an invariant does not hold.
        RunError: the run does not end.
    """
    run = draw_run(seed)
    random = Random(~seed)  # noqa: S311 - no secret
    audit = Audit(run.grid, compressed=run.spec.compression.name != "none")
    faults = list(run.faults)
    resume: VirtualCheckpoint | None = None
    while True:
        plan = RandomFaults(run, random, faults)
        cluster = VirtualCluster(
            _resumed(run.spec, resume),
            _problem(run, first=resume is None),
            plan.compute_s,
            timing=run.timing,
            faults=plan,
            resume=resume,
            lease_s=run.lease_s,
            observers=observers,
            server=server,
            server_observer=audit.observe,
        ).run(MAX_EVENTS, MAX_S)
        if cluster.finish and cluster.finish.status != "unsaved":  # else a new driver resumes it
            audit.check_end(cluster, run.epochs)
            return FinishedRun(cluster, audit)
        resume = cluster.newest_checkpoint


def describe_failure(seed: int) -> str | None:
    """Run a seed. Return the error and the command that repeats the run, or None if the run is correct."""
    try:
        run_with_faults(seed)
    except (AssertionError, LookupError, RunError, TypeError, ValueError) as error:  # anything that a bug may raise
        return f"seed {seed}: {type(error).__name__}: {error}\n  again: python -m tests.simulation --seed {seed}"
    return None


def _resumed(spec: JobSpec, resume: VirtualCheckpoint | None) -> JobSpec:
    """Return the job with the settings in the checkpoint."""
    if resume is None:
        return spec
    return spec.model_copy(update=dict(resume.states[0].settings))


def _problem(run: RandomRun, first: bool) -> Problem:
    """Return the toy problem, in which the loss of the first gradients may not be finite."""
    problem = one_hot(run.grid, run.epochs, run.spec.scaling.servers)
    gradient = problem.gradient
    not_finite = iter(range(run.not_finite if first else 0))

    def perhaps_finite(batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
        loss = gradient(batch, weights, out)
        return loss if next(not_finite, None) is None else float("nan")

    return replace(problem, gradient=perhaps_finite, evaluate=_evaluate if run.evaluates else None)


def _evaluate(weights: FloatArray) -> Evaluation:
    return Evaluation(float(weights.sum()), None, 1)
