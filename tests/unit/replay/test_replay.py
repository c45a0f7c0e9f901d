from __future__ import annotations

import json
import os
import pwd
import sys
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load, load_file, save

import psgd
from psgd.cli import main
from psgd.core.driver.events import Change
from psgd.core.server.journal import RecordKind
from psgd.core.server.observer import ServerObserver
from psgd.core.server.parameter_server import ParameterServer
from psgd.errors import CheckpointError, DataError, JournalError, ReplayError, RunNotFoundError, UntrustedRunError
from psgd.job import OpenJob
from psgd.replay.lineage import Record, read_lineage
from psgd.replay.replay import replay
from psgd.spec.changes import change_settings
from psgd.store.checkpoints import Checkpoints
from psgd.store.run_directory import RunDirectory
from psgd.store.storage import Storage
from psgd_workers.messages import BatchId, FloatArray, Outcome
from tests.support.in_process import START_S, Fault
from tests.support.recorded_run import RecordedRun, digits, record, run_directory

PLAIN = {"lr": 0.1}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """The directory of a run that has not begun."""
    return run_directory(tmp_path)


@pytest.fixture
def recorded(run: RunDirectory) -> RunDirectory:
    """An asynchronous run of two epochs, recorded in `run`."""
    record(run, digits())
    return run


def assert_agrees(run: RunDirectory, **expected: Any) -> None:
    replayed = replay(run)
    assert (replayed.agrees, replayed.largest_difference, replayed.tensor) == (True, 0.0, None), str(replayed)
    assert {name: getattr(replayed, name) for name in expected} == expected


def assert_stops_where_it_says(run: RunDirectory, refused: pytest.ExceptionInfo[JournalError]) -> None:
    """Check that `--until` with the number in the message replays the run up to there."""
    until = int(str(refused.value).partition("--until ")[2].split()[0])
    assert until > 0
    assert replay(run, until=until).updates == until


@pytest.mark.parametrize(
    "sections",
    [
        {"scaling": {"workers": 1}},
        {"consistency": {"mode": "bsp"}},
        {"consistency": {"mode": "k_sync", "k": 2}},
        {"consistency": {"mode": "ssp", "s": 1}},
        {"consistency": {"mode": "softsync", "s": 1}},
        {"consistency": {"mode": "ringmaster", "r": 2, "stop": False}},
        {"consistency": {"mode": "rennala", "s": 3}},
        {"consistency": {"mode": "malenia", "s": 3}},
        {"consistency": {"mode": "ringleader"}},
        {"consistency": {"mode": "local", "h": 3, "lr": 0.05, "synchronous": False}, "optimizer": {"lr": 1.0}},
        {"optimizer": {"name": "adam", "lr": 0.01, "max_grad_norm": 0.5}},
        {"correction": {"name": "dc_asgd", "variant": "adaptive"}},
        {"correction": {"name": "dana", "momentum": 0.9}, "optimizer": PLAIN},
        {"correction": {"name": "gap_aware"}},
        {"correction": {"name": "delay_adaptive"}},
        {"correction": {"name": "rescaled"}},
        {"compression": {"name": "top_k", "ratio": 0.05}},
        {"compression": {"name": "int8"}, "consistency": {"mode": "bsp"}},
    ],
    ids=lambda sections: "-".join(str(value) for section in sections.values() for value in section.values()),
)
def test_a_run_comes_out_bit_for_bit(run: RunDirectory, sections: dict[str, Any]) -> None:
    ended = record(run, digits(**{"optimizer": {"lr": 0.1, "momentum": 0.9}} | sections))
    assert_agrees(run, updates=ended.servers[0].version.updates, incarnations=1)


def test_what_was_refused_repeated_or_lost_is_replayed_as_such(run: RunDirectory) -> None:
    faults = [Fault("worker-1", 9, "late"), Fault("worker-0", 5, "after"), Fault("worker-2", 4, "before")]
    spec = digits(compression={"name": "top_k", "ratio": 0.05}, checkpoint={"every_s": None})
    ended = record(run, spec, faults=faults)
    counts = ended.servers[0].report().pushes
    assert counts[Outcome.DUPLICATE.value] > 0
    assert_agrees(run, pushes=sum(counts.values()))


def test_with_drop_last_an_epoch_is_every_full_batch_exactly_once_and_is_replayed_as_such(run: RunDirectory) -> None:
    data = digits().data.model_dump() | {"drop_last": True}
    faults = [Fault("worker-1", 8, "late"), Fault("worker-0", 5, "after"), Fault("worker-2", 4, "before")]
    ended = record(run, digits(data=data), faults=faults)
    shards = OpenJob.open(digits(data=data)).shards
    assert (shards.left_out, shards.grid.num_examples) == (5, 2 * 14 * 64)
    assert ended.servers[0].report().samples == 2 * shards.grid.num_examples
    assert_agrees(run, updates=2 * shards.grid.num_batches)


def test_a_gradient_that_is_not_finite_is_refused_again(run: RunDirectory) -> None:
    class Flaky(RecordedRun):
        computed = 0

        def gradient(self, batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
            self.computed += 1
            loss = super().gradient(batch, weights, out)
            if self.computed == 7:
                out[3] = np.nan
            return loss

    spec = digits(compression={"name": "top_k", "ratio": 0.05})
    ended = Flaky(run, OpenJob.open(spec), None).run()
    counts = ended.servers[0].report().pushes
    assert counts[Outcome.REJECTED.value] == 1
    assert_agrees(run, pushes=sum(counts.values()))


def test_a_change_while_it_ran_is_replayed_where_it_came(run: RunDirectory) -> None:
    spec = digits()
    events = []
    for at, change in ((2.0, "consistency.mode=bsp"), (3.0, "optimizer.lr=0.02")):
        spec = change_settings(spec, [change])
        events.append((at, Change(spec.settings)))
    ended = record(run, digits(), events=events)
    assert len(ended.servers[0].journal.settings) == 2
    assert_agrees(run)


@pytest.mark.parametrize(
    "sections",
    [
        {"compression": {"name": "top_k", "ratio": 0.05}},
        {"correction": {"name": "dana", "momentum": 0.9}, "optimizer": PLAIN},
        {"correction": {"name": "delay_adaptive"}},
        {"correction": {"name": "gap_aware"}},
        {"consistency": {"mode": "ringleader"}},
        {"consistency": {"mode": "bsp"}},
    ],
    ids=lambda sections: "-".join(str(value) for value in next(iter(sections.values())).values()),
)
def test_a_resumed_run_is_replayed_without_the_branch_it_gave_up(run: RunDirectory, sections: dict[str, Any]) -> None:
    sections |= {"checkpoint": {"every_s": None, "every_updates": 4}}
    first = record(run, digits(run={"epochs": 1}, **sections), events=[(1.0, Change(digits(**sections).settings))])
    *_, before, newest = Checkpoints(run.storage).committed()
    assert first.servers[0].version.updates > Checkpoints(run.storage).manifest(before).updates
    run.storage.delete(f"checkpoints/{newest}/server-0.safetensors")
    # Another number of workers is another mean for delay_adaptive, and other names in every table.
    second = record(run, digits(**sections | {"scaling": {"workers": 2}}))
    started = [line for line in run.read_lines("events.jsonl") if line["event"] == "started"]
    assert [line["resumed"] for line in started] == [None, before]
    assert f"{newest}-server-0.npy" in run.storage.names("journal")
    pushes = second.servers[0].report().pushes
    assert_agrees(run, incarnations=2, updates=second.servers[0].version.updates, pushes=sum(pushes.values()))


def test_three_incarnations_in_a_row(run: RunDirectory) -> None:
    for epochs in (1, 2, 3):
        record(run, digits(run={"epochs": epochs}, checkpoint={"every_s": None, "keep": 1}))
    assert_agrees(run, incarnations=3, updates=3 * 30)


def test_a_checkpoint_that_could_not_be_written_leaves_no_gap(run: RunDirectory) -> None:
    record(run, digits(), failing_saves=[1, 2])
    assert_agrees(run, updates=2 * 30)


# A server that is lost during the run


LOST = [1.8, 3.0]


@pytest.mark.parametrize(
    "sections",
    [
        {"optimizer": {"lr": 0.1, "momentum": 0.9}},
        {"optimizer": {"name": "adam", "lr": 0.01}},
        {"consistency": {"mode": "bsp"}},
        {"consistency": {"mode": "ringleader"}},
        {"consistency": {"mode": "local", "h": 3, "lr": 0.05, "synchronous": False}, "optimizer": {"lr": 1.0}},
        {"correction": {"name": "dana", "momentum": 0.9}, "optimizer": PLAIN},
        {"correction": {"name": "gap_aware"}},
        {"scaling": {"workers": 3, "pipeline": 2}},
        {"scaling": {"workers": {"min": 2, "max": 3}}, "correction": {"name": "delay_adaptive"}},
    ],
    ids=lambda sections: "-".join(str(value) for value in next(iter(sections.values())).values()),
)
def test_a_lost_server_is_replayed_from_what_it_was_restored_from(run: RunDirectory, sections: dict[str, Any]) -> None:
    spec = digits(**{"checkpoint": {"every_s": None, "every_updates": 4}} | sections)
    ended = record(run, spec, losses=2, events=[(1.5, Change(digits(**sections).settings))])
    assert ended.status.failures["server_lost"] == 2
    origins = [line["checkpoint"] for line in run.read_lines("events.jsonl") if line["event"] == "server_started"]
    assert [origin[-2:] for origin in origins] == ["-1", "-2"]
    pushes = sum(ended.servers[0].report().pushes.values())
    assert_agrees(run, incarnations=3, updates=ended.servers[0].version.updates, pushes=pushes)


def test_a_server_lost_before_the_first_checkpoint_began_anew(run: RunDirectory) -> None:
    cluster = RecordedRun(run, OpenJob.open(digits(checkpoint={"every_s": None})), None)
    cluster.after(2.0, cluster.kill_server, 0)
    cluster.run()
    assert_agrees(run, incarnations=1, updates=2 * 30)


def test_a_server_that_was_lost_after_the_run_was_resumed(run: RunDirectory) -> None:
    record(run, digits(run={"epochs": 1}))
    record(run, digits(), losses=1)
    assert_agrees(run, incarnations=3, updates=2 * 30)


def test_a_remainder_that_was_lost_with_a_server_ends_the_replay_before_it_is_carried_on(run: RunDirectory) -> None:
    record(run, digits(compression={"name": "int8"}), losses=1)
    with pytest.raises(
        JournalError, match=r"carries on what compression left out of push \d+ of its worker's slot 0, which no record"
    ) as refused:
        replay(run)
    assert_stops_where_it_says(run, refused)


def test_a_remainder_of_a_branch_that_was_given_up_is_carried_on(run: RunDirectory) -> None:
    """The server dies after writing its part of a checkpoint and its journal, and before the commit."""
    spec = digits(compression={"name": "top_k", "ratio": 0.05})
    ended = record(run, spec, dying=[(1, 0), (3, 0)])
    assert ended.status.failures["server_lost"] == 2
    assert_agrees(run, incarnations=3, updates=ended.servers[0].version.updates)


def test_the_remainder_of_a_push_whose_receipt_was_lost_is_carried_on_by_what_its_worker_knew(
    run: RunDirectory,
) -> None:
    """The server applied the push, but the worker, which lives on, had to assume that it was refused."""
    faults = [Fault(f"worker-{number}", push, "lane") for number, push in ((0, 2), (1, 5), (2, 4))]
    ended = record(run, digits(compression={"name": "top_k", "ratio": 0.05}), faults=faults)
    assert ended.servers[0].report().pushes["duplicate"] == 0
    assert_agrees(run)


@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("compression", [{"name": "int8"}, {"name": "top_k", "ratio": 0.05}], ids=lambda c: c["name"])
def test_each_slot_of_a_pipeline_carries_on_its_own_remainder(
    run: RunDirectory, compression: dict[str, Any], pipeline: int
) -> None:
    record(run, digits(scaling={"workers": 2, "pipeline": pipeline}, compression=compression))
    assert_agrees(run)


@pytest.mark.parametrize("servers", [1, 2])
def test_a_batch_that_was_done_without_is_replayed_as_such(run: RunDirectory, servers: int) -> None:
    class Poisoned(RecordedRun):
        def gradient(self, batch: BatchId, weights: FloatArray, out: FloatArray) -> float:
            loss = super().gradient(batch, weights, out)
            if batch == (1, 0, 3):
                out[3] = np.nan
            return loss

    scaling = {"workers": 3, "servers": servers}
    spec = digits(scaling=scaling, failure={"poison": "skip", "poison_tries": 2})
    ended = Poisoned(run, OpenJob.open(spec), None).run()
    assert ended.status.failures["poison"] == 1
    assert_agrees(run, updates=2 * 30 - 1)


# Several servers, each with its own order of pushes


SKEW_S = 0.1  # half a gradient's time: pushes overtake each other on their way to a server


def pushes_of(run: RunDirectory, partition: int) -> NDArray[np.void]:
    """Return the pushes of a server's journal, in its order."""
    names = [name for name in run.storage.names("journal") if name.endswith(f"-server-{partition}.npy")]
    records = np.concatenate([np.load(Path(run.storage.url, "journal", name)) for name in names])
    pushes: NDArray[np.void] = records[records["kind"] == RecordKind.PUSH]
    return pushes


def order(run: RunDirectory, partition: int) -> list[tuple[int, ...]]:
    """Return the batches of a server's journal, in its order."""
    return [tuple(batch) for batch in pushes_of(run, partition)[["epoch", "shard", "index"]].tolist()]


@pytest.mark.parametrize("servers", [2, 3])
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"scaling": {"pipeline": 1}},
        {"scaling": {"pipeline": 2}, "correction": {"name": "gap_aware"}},
        {"consistency": {"mode": "bsp"}},
        {"consistency": {"mode": "ssp", "s": 1}},
        {"consistency": {"mode": "softsync", "s": 1}},
        {"consistency": {"mode": "ringmaster", "r": 2}},
        {"consistency": {"mode": "local", "h": 3, "lr": 0.05}, "optimizer": {"lr": 1.0}},
        {"optimizer": {"name": "adam", "lr": 0.01, "max_grad_norm": 0.5}},
        {"correction": {"name": "dc_asgd", "variant": "adaptive"}},
        {"correction": {"name": "dana", "momentum": 0.9}, "optimizer": PLAIN},
        {"compression": {"name": "top_k", "ratio": 0.05}},
        {"compression": {"name": "int8"}, "consistency": {"mode": "softsync", "s": 1}},
    ],
    ids=lambda sections: "-".join(str(value) for section in sections.values() for value in section.values()),
)
def test_a_run_on_several_servers_comes_out_bit_for_bit(
    run: RunDirectory, sections: dict[str, Any], servers: int
) -> None:
    scaling = {"workers": 4, "servers": servers} | sections.get("scaling", {})
    ended = record(run, digits(**sections | {"scaling": scaling}), skew_s=SKEW_S)
    assert_agrees(run, updates=min(server.version.updates for server in ended.servers.values()), incarnations=1)
    assert order(run, 0) != order(run, 1)


@pytest.mark.parametrize("dying", [[(1, 0)], [(1, 1)], [(1, 0), (2, 1)], [(2, 0), (3, 0)]], ids=str)
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"scaling": {"pipeline": 2}},
        {"consistency": {"mode": "softsync", "s": 1}, "checkpoint": {"every_s": None, "every_updates": 3}},
        {"compression": {"name": "top_k", "ratio": 0.05}},
        {"compression": {"name": "int8"}, "scaling": {"pipeline": 1}},
    ],
    ids=["async", "pipeline", "softsync", "top_k", "int8-pipeline"],
)
def test_one_of_several_servers_that_was_restored_alone_is_replayed(
    run: RunDirectory, sections: dict[str, Any], dying: list[tuple[int, int]]
) -> None:
    """Gradients that were computed from the abandoned branch are recomputed from the records in its journal."""
    scaling = {"workers": 4, "servers": 2} | sections.get("scaling", {})
    ended = record(run, digits(**sections | {"scaling": scaling}), dying=dying)
    assert ended.status.failures["server_lost"] == len(dying)
    assert_agrees(run)


def test_a_server_restored_alone_is_replayed_without_its_branch_where_nobody_read_from_it(run: RunDirectory) -> None:
    """In lockstep, no step lies between the checkpoint and the death: the next gradients read the same version."""
    saved = {"every_s": None, "every_updates": 3}
    spec = digits(scaling={"workers": 3, "servers": 2}, consistency={"mode": "bsp"}, checkpoint=saved)
    ended = record(run, spec, losses=2, compute_s=lambda worker, batch: 1.0)
    assert ended.status.failures["server_lost"] == 2
    assert_agrees(run)


def test_a_server_lost_before_its_first_step_began_anew_beside_the_others(run: RunDirectory) -> None:
    """No journal has a record of its first incarnation, which published the initial weights."""
    spec = digits(scaling={"workers": 3, "servers": 2})
    cluster = RecordedRun(run, OpenJob.open(spec), None, compute_s=lambda worker, batch: 0.5)
    cluster.after(START_S + 0.3, cluster.kill_server, 0)
    cluster.run()
    assert cluster.status.failures["server_lost"] == 1
    assert_agrees(run)


@pytest.mark.parametrize("sections", [{}, {"scaling": {"pipeline": 1}}], ids=["async", "pipeline"])
def test_what_others_read_of_records_that_were_lost_ends_the_replay_before_it(
    run: RunDirectory, sections: dict[str, Any]
) -> None:
    scaling = {"workers": 4, "servers": 2} | sections.get("scaling", {})
    record(run, digits(scaling=scaling), losses=1)
    with pytest.raises(
        JournalError,
        match=r"server 1's journal is a push .* from version \d+ of incarnation 1 of server 0, to which no",
    ) as refused:
        replay(run)
    assert_stops_where_it_says(run, refused)


@pytest.mark.parametrize("compression", [{"name": "none"}, {"name": "top_k", "ratio": 0.05}], ids=lambda c: c["name"])
def test_pushes_that_reached_some_servers_only_are_replayed(run: RunDirectory, compression: dict[str, Any]) -> None:
    """The versions that they read of the other servers are in no other journal."""
    faults = [
        *(Fault(f"worker-{number}", push, "torn") for number, push in ((0, 2), (1, 5), (4, 3))),
        Fault("worker-2", 4, "late"),
        Fault("worker-3", 3, "after"),
    ]
    spec = digits(scaling={"workers": 4, "servers": 3}, compression=compression)
    ended = record(run, spec, faults=faults, skew_s=SKEW_S)
    duplicates = [server.report().pushes["duplicate"] for server in ended.servers.values()]
    assert duplicates[0] == duplicates[1] + 3
    assert_agrees(run)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"scaling": {"pipeline": 1}},
        {"consistency": {"mode": "bsp"}},
        {"compression": {"name": "top_k", "ratio": 0.05}},
    ],
    ids=["async", "pipeline", "bsp", "top_k"],
)
def test_a_resumed_run_on_several_servers_is_replayed_across_its_cut(
    run: RunDirectory, sections: dict[str, Any]
) -> None:
    """When the checkpoint is made, some pushes have reached one server and not the other."""
    sections |= {"checkpoint": {"every_s": None, "every_updates": 7 if "consistency" in sections else 36}}
    scaling = {"workers": 5, "servers": 2} | sections.pop("scaling", {})
    record(run, digits(scaling=scaling, **sections), skew_s=SKEW_S)
    before, *others = Checkpoints(run.storage).committed()
    for name in others:
        run.storage.delete(f"checkpoints/{name}/server-1.safetensors")
    longer = digits(scaling=scaling | {"workers": 3}, run={"epochs": 3}, **sections)
    second = record(run, longer, skew_s=SKEW_S)
    started = [line for line in run.read_lines("events.jsonl") if line["event"] == "started"]
    assert [line["resumed"] for line in started] == [None, before]
    assert_agrees(run, incarnations=2, updates=second.servers[0].version.updates)
    manifest = Checkpoints(run.storage).manifest(Checkpoints(run.storage).committed()[-1])
    first = [read_lineage(run, manifest, partition)[0] for partition in (0, 1)]
    pushed = [
        {
            tuple(record.batch)
            for segment in journal.segments
            for record in Record.of(segment.records)
            if record.kind == RecordKind.PUSH
        }
        for journal in first
    ]
    assert pushed[0] != pushed[1] or "consistency" in sections


@settings(max_examples=6)
@given(st.data())
def test_whatever_befalls_a_run_on_several_servers_its_replay_agrees(data: st.DataObject) -> None:
    fault = st.builds(
        Fault,
        st.integers(0, 5).map("worker-{}".format),
        st.integers(0, 12),
        st.sampled_from(("before", "after", "late", "torn", "silent", "lane")),
    )
    scaling = {"workers": data.draw(st.integers(2, 5)), "servers": data.draw(st.integers(2, 3))}
    sections: dict[str, Any] = data.draw(
        st.sampled_from(
            [
                {"scaling": scaling | {"pipeline": 2}},
                {"scaling": scaling | {"pipeline": 1}, "consistency": {"mode": "ringmaster", "r": 3}},
                {"scaling": scaling, "compression": {"name": "top_k", "ratio": 0.05}},
                {"scaling": scaling | {"pipeline": 1}, "compression": {"name": "top_k", "ratio": 0.05}},
                {"scaling": scaling, "consistency": {"mode": "softsync", "s": 1}, "compression": {"name": "int8"}},
                {"scaling": scaling, "consistency": {"mode": "bsp"}},
            ]
        )
    )
    limits: dict[str, Any] = {
        "failure": {"timeout_s": 3.0, "max_failures": -1},
        "checkpoint": {"every_s": None, "every_updates": 15},
    }
    with TemporaryDirectory() as folder:
        run = run_directory(Path(folder))
        for epochs in (2, 3):
            faults = data.draw(st.lists(fault, max_size=3, unique_by=lambda fault: fault[:2]))
            skew_s = data.draw(st.sampled_from((0.05, 0.2)))
            dying = data.draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1)), max_size=2))
            record(run, digits(run={"epochs": epochs}, **limits, **sections), faults=faults, skew_s=skew_s, dying=dying)
            names = Checkpoints(run.storage).committed()
            if epochs == 2 and len(names) > 1 and data.draw(st.booleans()):
                run.storage.delete(f"checkpoints/{names[-1]}/server-1.safetensors")
        assert_agrees(run)


def test_a_push_that_arrives_after_its_worker_gave_it_up_and_pushed_the_next_is_replayed(run: RunDirectory) -> None:
    """Its remainder is not added to any later push, and it does not change the remainder of the next push."""
    faults = [Fault(f"worker-{number}", push, "lane") for number in (0, 1, 2) for push in (2, 5, 7)]
    spec = digits(scaling={"workers": 3, "servers": 2}, compression={"name": "top_k", "ratio": 0.05})
    record(run, spec, faults=faults, skew_s=1.0)
    taken = [pushes_of(run, partition) for partition in (0, 1)]
    numbers = [pushes["number"][pushes["worker"] == b"worker-1"].astype(int) for pushes in taken]
    assert any((np.diff(mine) < 0).any() for mine in numbers)
    assert_agrees(run)


def test_a_replay_stops_where_every_server_made_so_many_updates(run: RunDirectory) -> None:
    record(run, digits(scaling={"workers": 4, "servers": 3}, checkpoint={"every_s": None}), skew_s=SKEW_S)
    stopped = replay(run, until=31)
    assert (stopped.updates, stopped.agrees) == (31, None)
    assert stopped.pushes >= 31
    assert (replay(run, until=0).updates, replay(run, until=0).pushes) == (0, 0)
    assert replay(run, until=60).agrees is True
    with pytest.raises(JournalError, match=r"--until 61: the newest checkpoint of .* has 60 updates"):
        replay(run, until=61)


def test_each_server_stops_with_the_weights_of_its_own_version(run: RunDirectory, tmp_path: Path) -> None:
    job = OpenJob.open(digits(scaling={"workers": 4, "servers": 2}))
    expected = np.full_like(job.weights, np.nan)
    out = tmp_path / "weights.safetensors"

    class WeightsAtVersion23(ServerObserver):
        def stepped(self, server: ParameterServer) -> None:
            if server.version.updates == 23:
                expected[server.partition.start : server.partition.stop] = server.weights

    RecordedRun(run, job, None, skew_s=SKEW_S, server_observer=lambda partition: WeightsAtVersion23()).run()
    assert replay(run, until=23, out=out).updates == 23
    np.testing.assert_array_equal(job.layout.pack(load_file(out)), expected)


def test_it_stops_at_a_version_and_writes_those_weights(recorded: RunDirectory, tmp_path: Path) -> None:
    name, newest = Checkpoints(recorded.storage).committed()
    expected = psgd.load_weights(f"{recorded.storage.url}/checkpoints/{name}")
    updates = Checkpoints(recorded.storage).open(name).manifest.updates
    out = tmp_path / "new" / "weights.safetensors"
    stopped = replay(recorded, until=updates, out=out)
    assert (stopped.agrees, stopped.updates, stopped.checkpoint) == (None, updates, newest)
    found = load_file(out)
    assert found.keys() == expected.keys()
    for tensor, array in expected.items():
        np.testing.assert_array_equal(found[tensor], array)
    assert replay(recorded, until=2 * 30).agrees is True
    assert (replay(recorded, until=0).updates, replay(recorded, until=0).pushes) == (0, 0)
    with pytest.raises(JournalError, match=r"--until 61: the newest checkpoint of .* has 60 updates"):
        replay(recorded, until=61)


def change_weights(run: RunDirectory) -> None:
    """Change the weights in the newest checkpoint: one bias of the last layer becomes 0.5 higher."""
    checkpoints = Checkpoints(run.storage)
    name = checkpoints.committed()[-1]
    path = f"checkpoints/{name}/server-0.safetensors"
    arrays = {key: array.copy() for key, array in load(run.storage.read(path)).items()}
    arrays["weights"][-1] += np.float32(0.5)
    run.storage.write(path, save(arrays))
    manifest = checkpoints.manifest(name)
    files = manifest.files | {"server-0.safetensors": sha256(run.storage.read(path)).hexdigest()}
    checkpoints.commit(manifest.model_copy(update={"files": files}))


def test_weights_that_differ_are_told_by_tensor(recorded: RunDirectory) -> None:
    change_weights(recorded)
    replayed = replay(recorded)
    assert (replayed.agrees, replayed.tensor) == (False, "layers.1.bias")
    assert replayed.largest_difference == pytest.approx(0.5)
    assert "differs by up to 0.5, in layers.1.bias" in str(replayed)


def test_other_data_is_refused(run: RunDirectory, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    path = tmp_path / "data.npz"
    features = random.standard_normal((64, 4), dtype=np.float32)
    data = {"format": "npz", "path": str(path), "features": "x", "labels": "y", "batch_size": 8}
    np.savez(path, x=features, y=np.arange(64) % 3)
    record(run, digits(data=data))
    assert_agrees(run)
    np.savez(path, x=features + 1, y=np.arange(64) % 3)
    with pytest.raises(DataError, match=r"has changed since the training: its fingerprint .* Restore the data"):
        replay(run)


def test_a_record_that_comes_out_otherwise_is_named_with_what_was_expected(recorded: RunDirectory) -> None:
    path = Path(recorded.storage.url) / first_segment(recorded)
    records = np.load(path)
    pushes = np.flatnonzero(records["kind"] == RecordKind.PUSH)

    def rewritten(number: int, **fields: int) -> None:
        changed = records.copy()
        for name, value in fields.items():
            changed[name][number] = value
        np.save(path, changed)

    duplicate = list(Outcome).index(Outcome.DUPLICATE)
    rewritten(pushes[4], outcome=duplicate)
    expected = (
        rf"record {pushes[4]} of .* by worker-\d of batch .*: duplicate, .* had version 5 .* came to "
        ".*: applied, .* had version 5"
    )
    with pytest.raises(ReplayError, match=expected):
        replay(recorded)
    rewritten(pushes[4], updates=6)
    with pytest.raises(
        ReplayError, match=rf"record {pushes[4]} .*: applied, .* version 6 .* came to .*: applied, .* version 5"
    ):
        replay(recorded)
    rewritten(pushes[4], shard=1, index=15)
    with pytest.raises(JournalError, match=r"batch 15 of shard 1 in epoch 1, which its job does not have"):
        replay(recorded)
    np.save(path, np.delete(records, pushes[4]))
    with pytest.raises(ReplayError, match=rf"record {pushes[4]} .* version"):
        replay(recorded)


def test_a_run_without_a_checkpoint_has_nothing_to_replay(run: RunDirectory) -> None:
    with pytest.raises(RunNotFoundError):
        replay(run)
    run.begin(digits())
    with pytest.raises(CheckpointError, match="nothing to replay"):
        replay(run)


def first_segment(run: RunDirectory) -> str:
    """Return the name of the first segment, which has no checksum because its checkpoint was deleted."""
    return f"journal/{run.storage.names('journal')[0]}"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Return a function that runs `psgd replay run ...` in this process.

    Its arguments are those of the command; it returns the exit code, stdout and stderr.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def replayed(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["psgd", "replay", "run", "--storage", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code, *capsys.readouterr())

    return replayed


def test_the_command_tells_agreement_by_its_exit_code(recorded: RunDirectory, command: Any, tmp_path: Path) -> None:
    code, out, err = command()
    assert (code, err) == (0, "")
    assert "agrees bit for bit" in out
    code, out, err = command("--json", "--until", "7", "--out", str(tmp_path / "weights.safetensors"))
    assert (code, err) == (0, "")
    assert {"updates": 7, "agrees": None, "tensor": None}.items() <= json.loads(out).items()
    assert (tmp_path / "weights.safetensors").exists()
    change_weights(recorded)
    code, out, _ = command("--json")
    assert code == 3
    assert {"agrees": False, "tensor": "layers.1.bias"}.items() <= json.loads(out).items()


def test_the_command_refuses_bad_input_with_exit_2(recorded: RunDirectory, command: Any) -> None:
    code, out, err = command("--until", "1000")
    assert (code, out) == (2, "")
    assert err.startswith("psgd: --until 1000: ")
    recorded.storage.delete(first_segment(recorded))
    code, out, err = command("--json")
    assert (code, out) == (2, "")
    assert "/journal lacks 000000-1-server-0.npy: " in err


# Code that a run names


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """Return the directory of a run of another user, whose model is a command of the system."""
    run = run_directory(tmp_path)
    spec = digits(model={"kind": "python", "path": "os:system", "kwargs": {"command": f"touch {tmp_path}/executed"}})
    run.begin(spec)
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    return run


def test_code_that_the_run_of_another_user_names_is_not_executed(foreign: RunDirectory, tmp_path: Path) -> None:
    user = pwd.getpwuid(os.getuid()).pw_name
    with pytest.raises(UntrustedRunError, match=rf"belongs to user {user}, .* the factory 'os:system', .*give --trust"):
        replay(foreign)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("owned", ["", "resolved.json"])
def test_one_foreign_file_or_folder_is_enough(
    foreign: RunDirectory, monkeypatch: pytest.MonkeyPatch, owned: str
) -> None:
    monkeypatch.setattr("os.geteuid", os.getuid)
    assert foreign.foreign_user is None
    users = {os.getuid(), 4_000_000_000}
    monkeypatch.setattr(Storage, "users", lambda storage, *names: users if owned in names else set())
    with pytest.raises(UntrustedRunError, match="belongs to user 4000000000"):
        replay(foreign)


def test_with_trust_or_as_the_present_users_run_it_is_replayed(
    foreign: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for trust in (True, False):
        with pytest.raises(CheckpointError, match="no committed checkpoint"):  # it has not been trained
            replay(foreign, trust=trust)
        monkeypatch.setattr("os.geteuid", os.getuid)


def test_an_object_store_names_no_user_so_that_its_code_needs_trust() -> None:
    run = RunDirectory(Storage(f"memory://{uuid4().hex}/run"))
    run.begin(digits(model={"kind": "torch", "path": "os:system"}))
    with pytest.raises(UntrustedRunError, match="belongs to an unknown user"):
        replay(run)


def test_psgds_own_models_need_no_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_directory(tmp_path)
    record(run, digits(run={"epochs": 1}))
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    assert replay(run).agrees
