"""Chaos: whole runs on the virtual cluster that everything befalls, all of it decided by one seed.

A seed draws a job, its workers' paces and a list of strikes. Processes die and hang; messages are lost, doubled, late
and out of order; links break; checkpoints fail; the driver itself dies and a new one resumes. At the end stands a run
that finished, or a `ViolationError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf
from random import Random
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from psgd.core.driver.events import Action, Change, Commit, Save, SaveFailed, Scale, WorkerLost
from psgd.core.server.parameter_server import ParameterServer
from psgd.errors import RunError, SpecError
from psgd.simulation.clock import without_collector
from psgd.simulation.cluster import VirtualCheckpoint, VirtualCluster
from psgd.simulation.invariants import WatchedServer, check_end, one_hot
from psgd.simulation.problem import Timing
from psgd.simulation.worker import Slot, VirtualWorker
from psgd.spec import ConsistencySpec, JobSpec, ModeTraits, Settings
from psgd.spec.changes import change_workers
from psgd_workers.errors import LaneError
from psgd_workers.messages import BatchId, EpochGrid, Evaluation, FloatArray, Gradient, Receipt, Version

__all__ = ["Chaos", "Plan", "draw_plan", "run_chaos"]

MAX_EVENTS = 60_000  # of one process of the driver
MAX_S = 300.0  # virtual, likewise
START_S = 0.5  # of a process
RECEIPT_FACTOR = 2  # a receipt may take so many time limits, as in psgd_workers.worker
LATEST_S = 3.0  # a message takes at most so long

STRIKES = {  # kind -> how often it is drawn
    "crash": 4,
    "late": 3,  # the next push is under way when its worker dies
    "torn": 3,  # ... reached some servers when its worker died
    "after": 2,  # ... reached all of them
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
class Plan:
    """What a seed means."""

    seed: int
    spec: JobSpec
    grid: EpochGrid
    epochs: int
    timing: Timing
    lease_s: float
    strikes: tuple[tuple[float, str], ...]  # virtual seconds after the process began, kind
    rough_s: float  # so long messages are lost, doubled and late
    lost: float  # share of the messages
    late: float
    doubled: float
    not_finite: int  # gradients, of the first that are computed
    evaluates: bool


def draw_plan(seed: int) -> Plan:
    """The run that a seed means."""
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
    kinds = list(STRIKES)
    weights = list(STRIKES.values())
    strikes = sorted(
        (random.uniform(0, START_S + 5), kind) for kind in random.choices(kinds, weights, k=random.randint(0, 10))
    )
    lost, late, doubled = (random.choice((0.0, 0.0, 0.03, 0.1)) for _ in range(3))
    timing = Timing(
        start_s=START_S,
        link_s=random.choice((0.0, 0.0, 0.02)),
        poll_s=random.choice((0.2, 0.5)),
        death_s=random.choice((0.002, 0.05, 1.0)),
    )
    return Plan(
        seed,
        spec,
        EpochGrid(shards, sum(shards)),
        epochs,
        timing,
        random.choice((0.1, 0.5, 2.0)),
        tuple(strikes),
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


class Chaos(VirtualCluster):
    """One process of the driver, and everything it started.

    Args:
        plan: what happens.
        random: decides whom it happens to.
        strikes: those of the plan that are still to come; taken out as they happen.
        resume: the checkpoint of the process before.
        server: what to start as servers.

    Attributes:
        dead: whether the driver was killed.
    """

    def __init__(
        self,
        plan: Plan,
        random: Random,
        strikes: list[tuple[float, str]],
        resume: VirtualCheckpoint | None,
        server: type[ParameterServer],
    ) -> None:
        problem = one_hot(plan.grid, plan.epochs, plan.spec.scaling.servers)
        gradient = problem.gradient
        left = iter(range(0 if resume else plan.not_finite))

        def perhaps_finite(batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
            loss = gradient(batch, weights, out)
            return loss if next(left, None) is None else float("nan")

        problem = replace(problem, gradient=perhaps_finite, evaluate=_evaluate if plan.evaluates else None)
        spec = plan.spec
        if resume:
            settings = Settings.model_validate(resume.states[0].metadata["settings"])
            spec = spec.model_copy(update=dict(settings))
        self.server = server
        super().__init__(spec, problem, self._pace, timing=plan.timing, resume=resume, lease_s=plan.lease_s)
        self.dead = False
        self._plan = plan
        self._timeout_s = spec.failure.timeout_s
        self._dice = random
        self._strikes = strikes
        self._armed: set[str] = set()
        self._doom: dict[str, str] = {}  # worker -> what befalls its next push
        self._hangs: dict[str, float] = {}  # worker -> seconds, once
        self._slow: dict[str, float] = {}  # worker -> factor
        self._cuts: dict[tuple[str, int], float] = {}  # link -> until when
        for strike in strikes:
            self.after(strike[0], self._strike, strike)

    def run(self, max_events: int = MAX_EVENTS) -> Chaos:
        """Run to the end, or to the driver's death.

        Raises:
            RunError: neither came in time.
        """
        return super().run(max_events)

    def _run(self, max_events: int) -> Chaos:
        for _ in range(max_events):
            if self.finish or self.dead:
                return self
            if self.now > MAX_S:
                break
            if not self.advance(self._deadline):
                self._tell_tick()
        raise RunError(f"no end at {self.now:.1f} s: {self.status.phase}")

    # What is drawn as it happens

    def _pace(self, worker: str, batch: BatchId) -> float:
        del batch
        seconds = self._dice.expovariate(5.0) * self._slow.get(worker, 1.0) if self._dice.random() < 0.8 else 0.2
        return seconds + self._hangs.pop(worker, 0.0)

    def _happens(self, share: float) -> bool:
        return share > 0 and self.now < self._plan.rough_s and self._dice.random() < share

    def _delay_s(self) -> float:
        return self._dice.uniform(0, LATEST_S) ** 2 / LATEST_S

    # Messages

    def pull(self, worker: str) -> tuple[list[Version], FloatArray] | None:
        """Nothing through a link that is cut."""
        if any(self._is_cut(worker, partition) for partition in range(len(self.parts))):
            return None
        return super().pull(worker)

    def _is_cut(self, worker: str, partition: int) -> bool:
        return bool(self._cuts) and self._cuts.get((worker, partition), 0.0) > self.now

    def push(self, worker: VirtualWorker, slot: Slot, gradients: Sequence[Gradient]) -> None:
        """Send it in pieces, each with a fate of its own."""
        doom = self._doom.pop(worker.name, None)
        if doom:
            self._lose(worker.name, doom)
        self.after(RECEIPT_FACTOR * self._timeout_s, self._expire, worker, worker.pushes, slot, gradients[0].batch)
        for partition, gradient in enumerate(gradients):
            if doom == "late":
                self.after(self._delay_s(), self._arrives, worker, partition, gradient)
            elif not (doom == "torn" and self._dice.random() < 0.5):
                self._send(worker, partition, gradient)

    def _send(self, worker: VirtualWorker, partition: int, gradient: Gradient) -> None:
        plan = self._plan
        if self._happens(plan.doubled):
            self.after(self._delay_s(), self._arrives, worker, partition, gradient)
        if self._is_cut(worker.name, partition) or self._happens(plan.lost):
            return
        if self._happens(plan.late):
            self.after(self._delay_s(), self._arrives, worker, partition, gradient)
        else:
            self._arrives(worker, partition, gradient)

    def _arrives(self, worker: VirtualWorker, partition: int, gradient: Gradient) -> None:
        server = self.servers.get(partition)
        epochs = server.epochs if server else 0
        try:
            if server:
                server.check(gradient)
            arrived = self.arrive((gradient,), partition) and server is not None
        except LaneError:
            arrived = False
        if server and server.epochs > epochs and self._armed_for("server at an epoch's end"):
            self.kill_server(partition)
        if server is None or not arrived:
            self._refuse(worker, partition, gradient.batch)

    def _refuse(self, worker: VirtualWorker, partition: int, batch: BatchId) -> None:
        if partition not in self.servers and any(
            slot.batch == batch and slot.outcomes[partition] is None for slot in worker.slots
        ):
            worker.lose_lane("nobody is there")

    def _expire(self, worker: VirtualWorker, push: int, slot: Slot, batch: BatchId) -> None:
        if slot.batch == batch and push > worker.pushes - len(worker.slots):
            worker.lose_lane("no receipt in time")

    def _deliver(self, partition: int, receipts: tuple[Receipt, ...]) -> None:
        plan = self._plan
        on_time = []
        for receipt in receipts:
            if self._is_cut(receipt.worker, partition) or self._happens(plan.lost):
                continue
            if self._happens(plan.late) and (worker := self.workers.get(receipt.worker)):
                shown = self.servers[partition].published.copy()
                self.after(self._delay_s(), worker.receive, partition, receipt, shown)
            else:
                on_time.append(receipt)
        super()._deliver(partition, tuple(on_time))

    # Strikes

    def _strike(self, strike: tuple[float, str]) -> None:
        self._strikes.remove(strike)
        kind = strike[1]
        if kind in ("server at a save", "server at a commit", "server at an epoch's end", "save", "commit"):
            self._armed.add(kind)
        elif kind in ("server", "server restored"):
            partition = self._dice.randrange(len(self.parts))
            self.kill_server(partition)
            if kind == "server restored":
                again = self.timing.death_s + self._dice.uniform(0, 2 * self.timing.restore_s)
                self.after(again, self.kill_server, partition)
        elif kind == "driver":
            self.dead = True
        elif kind == "scale":
            self._scale()
        elif kind == "set":
            self._change()
        elif names := sorted(self.workers):
            self._strike_worker(kind, self._dice.choice(names))

    def _strike_worker(self, kind: str, name: str) -> None:
        match kind:
            case "crash" | "preempt":
                self._lose(name, kind)
            case "hang":
                self._hangs[name] = self._dice.uniform(0, 4 * self._timeout_s)
            case "hang for ever":
                self._hangs[name] = inf
            case "slow":
                self._slow[name] = 10.0
            case "cut":
                partition = self._dice.randrange(len(self.parts))
                self._cuts[name, partition] = self.now + self._dice.uniform(0, 4 * self._timeout_s)
            case _:
                self._doom[name] = kind

    def _lose(self, name: str, cause: str) -> None:
        self.kill(name)
        self.tell_soon(WorkerLost(name, cause, preempted=cause == "preempt"), self.timing.death_s)

    def _scale(self) -> None:
        spec = self._plan.spec
        workers = self._dice.randint(1, spec.scaling.most_workers)
        with suppress(SpecError):  # too few for the mode: this is refused
            change_workers(spec, str(workers))
            self.tell_soon(Scale(workers))

    def _change(self) -> None:
        """The same mode with other numbers, or from one that needs no pipeline to another."""
        spec = self._plan.spec
        mode = spec.consistency.model_dump()
        for field in ("r", "s", "k"):
            if field in mode and mode["mode"] not in ("k_sync", "softsync"):
                mode[field] = max(1, mode[field] + self._dice.choice((-1, 1)))
        if mode["mode"] in ("async", "bsp") and not spec.scaling.pipeline:
            mode = {"mode": self._dice.choice(("async", "bsp"))}
        settings = Settings.model_validate({"consistency": mode, "optimizer": spec.optimizer.model_dump()})
        self.tell_soon(Change(settings))

    def _armed_for(self, kind: str) -> bool:
        armed = kind in self._armed
        self._armed.discard(kind)
        return armed

    def act(self, action: Action) -> None:
        """Let checkpoints fail, and servers die at them."""
        somebody = self._dice.randrange(len(self.parts))
        match action:
            case Save(number) | Commit(number) if self._armed_for(type(action).__name__.lower()):
                self.tell_soon(SaveFailed(number, "the disk is full"))
            case Save() if self._armed_for("server at a save"):
                before = self._dice.random() < 0.5
                if before:
                    self.kill_server(somebody)
                super().act(action)
                if not before:
                    self.after(self._dice.choice((0.0, 0.0015)), self.kill_server, somebody)
            case Commit() if self._armed_for("server at a commit"):
                self.kill_server(somebody)
                super().act(action)
            case _:
                super().act(action)


def _evaluate(weights: FloatArray) -> Evaluation:
    return Evaluation(float(weights.sum()), None, 1)


def run_chaos(seed: int, server: type[ParameterServer] = WatchedServer) -> Chaos:
    """Run what a seed means and check it.

    Raises:
        ViolationError: an invariant does not hold.
        RunError: the run does not end.
    """
    plan, random, resume = draw_plan(seed), Random(~seed), None  # noqa: S311 - no secret
    strikes = list(plan.strikes)
    with np.errstate(over="ignore", invalid="ignore"), without_collector():
        while True:
            cluster = Chaos(plan, random, strikes, resume, server).run()
            finish = cluster.finish
            if finish and finish.status != "unsaved":  # else somebody resumes it
                break
            resume = cluster.newest_checkpoint
    check_end(cluster, plan.epochs)
    return cluster
