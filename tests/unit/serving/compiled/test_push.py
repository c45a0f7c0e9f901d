"""Compiled code and the reference are given the same calls, and must have the same bits in every array."""

from __future__ import annotations

from itertools import product
from math import inf, nan
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd.errors import PushRefusedError
from psgd.serving.compiled.push import HEADER
from psgd.spec import JobSpec
from psgd_workers.messages import BatchId, EpochGrid, FloatArray, Gradient, Version
from psgd_workers.transport.frames import FIELDS, Frame, FrameKind
from tests.support.compiled_server import CompiledServer
from tests.support.jobs import job
from tests.support.server_harness import IS_COMPILED

if not IS_COMPILED:
    pytest.skip("the push path is not compiled", allow_module_level=True)

SIZE = 21
PARTITION = Partition(0, 0, SIZE, 17)  # with four buffers
GRID = EpochGrid((4, 3), 19, 3, (11, 8))
START = np.linspace(-1, 1, SIZE, dtype=np.float32)
V0 = Version(1, 0)

OPTIMIZERS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.01},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    {"momentum": 0.9, "nesterov": True},
    {"name": "adagrad"},
    {"name": "adagrad", "initial_accumulator_value": 0.1, "weight_decay": 0.01},
    {"name": "adam"},
    {"name": "adam", "betas": [0.5, 0.9], "weight_decay": 0.01},
    {"name": "adamw", "weight_decay": 0.01},
    {"name": "adamw", "weight_decay": 0.0},
    {"name": "delayed_nesterov", "every": 3},
    {"name": "delayed_nesterov", "every": 1, "momentum": 0.5},
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"max_grad_norm": 0.5},
    {"clip_value": 0.2},
    {"max_grad_norm": 2.0, "clip_value": 0.4},
    {"ema": 0.9},
    {"schedule": {"name": "step", "every": 0.3, "factor": 0.7}},
    {"schedule": {"name": "cosine", "epochs": 1.5, "final": 0.1, "warmup": 0.4}},
    {"schedule": {"name": "constant", "warmup": 0.5}, "ema": 0.5},
]
MODES: list[dict[str, Any]] = [{"mode": "async"}, {"mode": "ringmaster", "r": 2}]
CORRECTIONS = ["none", "staleness_lr", "delay_adaptive", "rescaled"]
CHANGES: list[dict[str, Any]] = [
    {"optimizer": {"lr": 0.3}},
    {"optimizer": {"max_grad_norm": 0.1}},
    {"consistency": {"mode": "ssp", "s": 1}},
    {"consistency": {"mode": "bsp"}},
    {"consistency": {"mode": "async"}},
]


def specified(optimizer: dict[str, Any], mode: dict[str, Any], correction: str, **scaling: Any) -> JobSpec:
    return job(
        optimizer={"lr": 0.1} | optimizer,
        consistency=mode,
        correction={"name": correction},
        scaling={"workers": 3, **scaling},
    )


def randoms(number: int) -> FloatArray:
    return np.random.default_rng(number).standard_normal(SIZE, dtype=np.float32)


def gradient(target: ParameterServer, number: int, worker: str, batch: BatchId, stale: int) -> Gradient:
    """Return a push as a worker would send it."""
    values = randoms(number)
    norm = float(np.linalg.norm(values[: PARTITION.num_trainable]))
    read = Version(target.version.incarnation, max(0, target.version.updates - stale))
    examples = GRID.examples(batch)
    return Gradient(worker, 1, number + 1, batch, examples, read, values, 0.1 * number, norm, 0.003 * number)


class Twins:
    """A server with compiled code and its reference."""

    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec
        self.servers = [ParameterServer(spec, PARTITION, START, GRID, V0) for _ in range(2)]
        self.compiled = CompiledServer(self.servers[0])
        self.num_compiled = 0
        self.now = 1.0

    def join(self, worker: str) -> None:
        for server in self.servers:
            server.join(worker, self.now)

    def leave(self, worker: str) -> None:
        for server in self.servers:
            server.leave(worker, self.now)

    def skip(self, batch: BatchId) -> None:
        for server in self.servers:
            server.skip(batch, self.now)

    def push_next(self, number: int, worker: str, stale: int) -> None:
        """Push the first batch that is not settled."""
        report = self.servers[0].report()
        settled = report.settled.get(report.epochs, np.zeros(GRID.num_batches, np.bool_))
        batch = GRID.batch(report.epochs, int(np.argmin(settled)))
        self.push(gradient(self.servers[0], number, worker, batch, stale))

    def push(self, pushed: Gradient, compares: bool = True) -> None:
        self.now += 0.01
        try:
            self.servers[1].check(pushed)
        except PushRefusedError:
            before = self.compiled.compiled
            assert self._attempt(pushed) == before
            return
        before = self.compiled.compiled
        self.compiled.push(pushed, self.now)
        self.servers[1].push(pushed, self.now)
        if compares:
            self.compare()
        if self.compiled.compiled > before:
            assert self.compiled.weights.tobytes() == self.servers[0].published.tobytes()

    def _attempt(self, pushed: Gradient) -> int:
        """Give a push that the check refuses to compiled code only, which must refuse it as well."""
        reference = self.servers[0].push
        try:
            self.servers[0].push = lambda gradient, now: ()  # type: ignore[method-assign]
            self.compiled.push(pushed, self.now)
        finally:
            self.servers[0].push = reference  # type: ignore[method-assign]
        return self.compiled.compiled

    def change(self, change: dict[str, Any]) -> None:
        now = self.servers[0].settings.model_dump()
        optimizer = now["optimizer"] | change.get("optimizer", {})
        changed = {"optimizer": optimizer, "consistency": change.get("consistency", now["consistency"])}
        settings = type(self.servers[0].settings).model_validate(now | changed)
        self.compiled.change(settings, self.now)
        self.servers[1].change(settings, self.now)

    def restore(self) -> None:
        incarnation = self.servers[0].version.incarnation + 1
        if not self.servers[0].can_save:
            return
        self.num_compiled += self.compiled.compiled
        workers = list(self.servers[0].clocks)
        self.servers = [
            ParameterServer.restore(self._spec, GRID, server.state(), incarnation, self.now) for server in self.servers
        ]
        self.compiled = CompiledServer(self.servers[0])
        for worker in workers:
            self.join(worker)

    def compare(self) -> None:
        """Compare the servers: all arrays, reports, journals."""
        one, other = self.servers
        for name in one.arrays()._fields:
            if name != "sequence":
                assert getattr(one.arrays(), name).tobytes() == getattr(other.arrays(), name).tobytes(), name
        reports = [str(server.report()) for server in self.servers]
        assert reports[0] == reports[1]
        assert one.clocks == other.clocks
        assert one.journal.take().tobytes() == other.journal.take().tobytes()

    def compare_states(self) -> None:
        """Compare the saved states and the weights to evaluate."""
        states = [server.state() for server in self.servers if server.can_save]
        for state in states[1:]:
            assert str(state.metadata) == str(states[0].metadata)
            assert {name: array.tobytes() for name, array in state.arrays.items()} == {
                name: array.tobytes() for name, array in states[0].arrays.items()
            }
        weights = [server.epoch_weights(None).tobytes() for server in self.servers]
        assert weights[0] == weights[1]


def in_order(spec: JobSpec, epochs: int = 3) -> Twins:
    """Push every batch of some epochs, by three workers in turn, with growing staleness."""
    twins = Twins(spec)
    for worker in "abc":
        twins.join(worker)
    for number in range(epochs * GRID.num_batches):
        batch = GRID.batch(*divmod(number, GRID.num_batches))
        twins.push(gradient(twins.servers[0], number, "abc"[number % 3], batch, number % 4))
    twins.compare_states()
    return twins


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_optimizer_and_option_has_the_bits_of_the_reference(
    optimizer: dict[str, Any], option: dict[str, Any]
) -> None:
    twins = in_order(specified(optimizer | option, {"mode": "async"}, "none"))
    assert twins.compiled.compiled == 3 * (GRID.num_batches - 2)  # all but the first and the last batch of each epoch


@pytest.mark.parametrize(("mode", "correction"), list(product(MODES, CORRECTIONS)), ids=str)
def test_every_mode_and_correction_has_the_bits_of_the_reference(mode: dict[str, Any], correction: str) -> None:
    twins = in_order(specified({"momentum": 0.9}, mode, correction))
    assert twins.compiled.compiled > 3


NUMBERS = st.sampled_from([0.5, 1.0, 0.0, -1.0, nan, inf, 1e300, 1e-300])
WORKERS = st.sampled_from("abcd")  # d has no lease


@st.composite
def pushes(draw: st.DrawFn) -> dict[str, Any]:
    """Return the fields of a push, of which one in two is as a worker would send it but for its batch."""
    fields: dict[str, Any] = {
        "worker": draw(WORKERS),
        "epoch": draw(st.sampled_from([0, 0, 0, 1, 1, 2, 7])),
        "position": draw(st.integers(0, 6)),
        "stale": draw(st.integers(0, 3)),
    }
    if draw(st.booleans()):
        fields |= {
            "norm": draw(NUMBERS),
            "loss": draw(NUMBERS),
            "compute_s": draw(NUMBERS),
            "value": draw(st.sampled_from([None, nan, -inf, 3e38])),
            "incarnation": draw(st.sampled_from([0, 0, 1, 2])),
            "ahead": draw(st.sampled_from([0, 0, 1, 1 << 62, 1 << 63])),
            "examples": draw(st.sampled_from([None, 0, 99])),
            "number": draw(st.sampled_from([1, 0, 1 << 63])),
            "carries": draw(st.sampled_from([0, 0, 5])),
            "index": draw(st.sampled_from([0, 0, 1, 1 << 31])),
        }
    return fields


NEXT = st.tuples(st.just("next"), st.tuples(st.sampled_from("abc"), st.integers(0, 3)))
CALLS = st.one_of(
    *[NEXT] * 6,
    *[pushes()] * 3,
    st.tuples(st.sampled_from(["join", "leave"]), st.sampled_from("abc")),
    st.tuples(st.just("skip"), st.integers(0, 6)),
    st.tuples(st.just("change"), st.sampled_from(CHANGES)),
    st.tuples(st.just("restore"), st.none()),
)


def carry_out(twins: Twins, number: int, call: Any) -> None:
    if isinstance(call, dict):
        twins.push(made(twins.servers[0], number, call))
        return
    name, argument = call
    if name == "skip":
        twins.skip(GRID.batch(twins.servers[0].epochs, argument))
    elif name == "restore":
        twins.restore()
    elif name == "next":
        twins.push_next(number, *argument)
    else:
        getattr(twins, name)(argument)


def made(target: ParameterServer, number: int, fields: dict[str, Any]) -> Gradient:
    batch = GRID.batch(fields["epoch"], fields["position"])
    usual = gradient(target, number, fields["worker"], batch, fields["stale"])
    if "norm" not in fields:
        return usual
    if fields["value"] is not None:
        usual.values[number % SIZE] = fields["value"]  # type: ignore[index]
    read = Version(usual.read.incarnation - min(fields["incarnation"], 1), usual.read.updates + fields["ahead"])
    return usual._replace(
        batch=batch._replace(index=batch.index + fields["index"]),
        examples=usual.examples if fields["examples"] is None else fields["examples"],
        norm=fields["norm"],
        loss=fields["loss"],
        compute_s=fields["compute_s"],
        number=fields["number"],
        carries=fields["carries"],
        read=read,
    )


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(OPTIMIZERS),
    st.sampled_from(OPTIONS),
    st.sampled_from(MODES),
    st.sampled_from(CORRECTIONS),
    st.lists(CALLS, min_size=5, max_size=50),
)
def test_any_calls_leave_the_bits_of_the_reference(
    optimizer: dict[str, Any], option: dict[str, Any], mode: dict[str, Any], correction: str, calls: list[Any]
) -> None:
    twins = Twins(specified(optimizer | option, mode, correction))
    for worker in "abc":
        twins.join(worker)
    for number, call in enumerate(calls):
        carry_out(twins, number, call)
    twins.compare()
    twins.compare_states()


EXTREMES = [0, 1, 2, 1 << 7, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
FLOATS = [0.0, -0.0, 1.0, -1.0, nan, inf, -inf, 1e-320, 1e300, 1e9]


def fuzzed(rng: np.random.Generator, usual: Gradient) -> Gradient:
    """Return the push with one to three fields replaced by random or extreme numbers that fit a frame."""
    values: dict[str, Any] = {}
    for field in rng.choice(["batch", "examples", "number", "carries", "read", "loss", "norm", "compute_s"], 3):
        number = EXTREMES[rng.integers(len(EXTREMES))] if rng.random() < 0.5 else int(rng.integers(0, 1 << 62))
        if field == "batch":
            batch = list(usual.batch)
            batch[rng.integers(3)] = number & 0xFFFFFFFF
            values[field] = BatchId(*batch)
        elif field == "read":
            other = Version(number & 0xFFFFFFFF, usual.read.updates)
            values[field] = other if rng.random() < 0.5 else Version(usual.read.incarnation, number)
        elif field in ("loss", "norm", "compute_s"):
            values[field] = float(rng.choice(FLOATS))
        else:
            values[field] = number & (0xFFFFFFFF if field == "examples" else (1 << 64) - 1)
    names = list(values)[: rng.integers(1, 4)]
    return usual._replace(**{name: values[name] for name in names})


@pytest.mark.parametrize(
    "pushes",
    [3000, pytest.param(1_000_000, marks=[pytest.mark.chaos, pytest.mark.timeout(1800)])],
)
def test_no_fuzzed_push_is_accepted_that_the_reference_refuses(pushes: int) -> None:
    twins = Twins(specified({"momentum": 0.9}, {"mode": "ringmaster", "r": 3}, "staleness_lr"))
    rng = np.random.default_rng(0)
    for worker in "abc":
        twins.join(worker)
    for number in range(pushes):
        server = twins.servers[0]
        epoch = server.epochs
        settled = server.arrays().settled[epoch % 2]
        batch = GRID.batch(epoch, int(np.argmin(settled)))
        usual = gradient(server, number, "abc"[number % 3], batch, stale=number % 4)
        twins.push(usual if number % 50 == 0 else fuzzed(rng, usual), compares=number % 1000 == 0)
    twins.compare()
    twins.compare_states()
    assert twins.compiled.compiled > pushes / 100


def test_a_header_has_the_layout_of_a_frame() -> None:
    frame = Frame(FrameKind.PUSH, 1, 2, True, 3, 4, BatchId(5, 6, 7), 8, Version(9, 10), 1.1, 1.2, 1.3, 14, 15, 16)
    packed = frame.pack()
    assert HEADER.itemsize == len(packed) == FIELDS.size + 4
    fields = np.frombuffer(packed, HEADER)[0]
    names = "kind slot code wants incarnation payload epoch shard index examples read_incarnation read_updates"
    kind, slot, code, wants, incarnation, payload, batch, examples, version, loss, norm, *rest = frame
    expected = [kind, slot, code, wants, incarnation, payload, *batch, examples, *version, loss, norm]
    assert [fields[name] for name in [*names.split(), "loss", "norm"]] == expected
    assert [fields[name] for name in ("compute_s", "number", "carries", "processor")] == rest
