from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from psgd.core.server.journal import RecordKind
from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd.errors import PushRefusedError, RunError, StorageError, WeightsNotKeptError
from psgd.serving import host as host_module
from psgd.serving.host import ServerHost
from psgd_workers.errors import EncodingError, FrameError, LaneTimeoutError, SharedMemoryError
from psgd_workers.messages import BatchId, EpochGrid, Outcome, Receipt, Version
from tests.support.jobs import GRID, START, job, push

LIMIT_S = 10.0
V0 = Version(1, 0)
FIRST = BatchId(0, 0, 0)
SECOND = BatchId(0, 0, 1)


def hosting(test: Callable[[ServerHost], Coroutine[Any, Any, None]], mode: str = "async") -> None:
    """Run a test with the host of a server whose two workers have leases."""

    async def run() -> None:
        spec = job(mode, 2)
        whole = Partition(0, 0, len(START), len(START))
        host = ServerHost(ParameterServer(spec, whole, START, GRID, V0))
        for worker in ("worker-0", "worker-1"):
            host.join(worker)
        await asyncio.wait_for(test(host), LIMIT_S)

    asyncio.run(run())


def ignore(receipt: Receipt) -> None:
    """Ignore the receipt."""


def fill_epoch(host: ServerHost) -> None:
    for position in range(GRID.num_batches):
        host.push(push(GRID.batch(0, position), host.server.version), ignore)


# Reports


def test_a_waiting_report_is_given_when_an_epoch_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "REPORT_S", 10 * LIMIT_S)

    async def test(host: ServerHost) -> None:
        waiting = asyncio.create_task(host.report(wait=True))
        await asyncio.sleep(0)
        host.push(push(FIRST, V0), ignore)
        assert (await host.report(wait=False)).epochs == 0
        assert not waiting.done()
        for position in range(1, GRID.num_batches):
            host.push(push(GRID.batch(0, position), host.server.version), ignore)
        assert (await waiting).epochs == 1

    hosting(test)


def test_an_epochs_end_between_two_reports_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "REPORT_S", 10 * LIMIT_S)

    async def test(host: ServerHost) -> None:
        fill_epoch(host)
        assert (await host.report(wait=True)).epochs == 1

    hosting(test)


def test_a_waiting_report_is_given_after_a_moment_if_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "REPORT_S", 0.01)

    async def test(host: ServerHost) -> None:
        assert (await host.report(wait=True)).version == V0

    hosting(test)


# Receipts


def test_a_receipt_goes_to_who_pushed(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, Receipt]] = []

    async def test(host: ServerHost) -> None:
        for worker in ("worker-0", "worker-1"):
            batch = BatchId(0, 0, int(worker[-1]))
            host.push(push(batch, V0, worker=worker), lambda receipt, worker=worker: given.append((worker, receipt)))  # type: ignore[misc]
            assert len(given) == (0 if worker == "worker-0" else 2)

    hosting(test, "bsp")
    assert [worker for worker, _ in given] == ["worker-0", "worker-1"]
    assert all(worker == receipt.worker for worker, receipt in given)
    assert {receipt.version for _, receipt in given} == {Version(1, 1)}


def test_a_batch_pushed_twice_by_one_worker_while_it_waits_is_answered_in_order() -> None:
    given: list[tuple[int, Outcome]] = []

    async def test(host: ServerHost) -> None:
        for number in range(3):
            host.push(push(FIRST, V0), lambda receipt, number=number: given.append((number, receipt.outcome)))  # type: ignore[misc]
        assert given == []
        host.push(push(SECOND, V0, worker="worker-1"), lambda receipt: given.append((3, receipt.outcome)))

    hosting(test, "bsp")
    assert given == [(0, Outcome.APPLIED), (1, Outcome.DUPLICATE), (2, Outcome.DUPLICATE), (3, Outcome.APPLIED)]


def test_who_waits_for_a_worker_that_leaves_is_answered() -> None:
    given: list[Receipt] = []

    async def test(host: ServerHost) -> None:
        host.push(push(FIRST, V0), given.append)
        host.leave("worker-1")

    hosting(test, "bsp")
    assert given == [Receipt("worker-0", FIRST, Outcome.APPLIED, Version(1, 1))]


def test_who_waits_when_the_settings_change_is_answered() -> None:
    given: list[Receipt] = []

    async def test(host: ServerHost) -> None:
        host.push(push(FIRST, V0), given.append)
        host.change(job("async", 2).settings)

    hosting(test, "bsp")
    assert given == [Receipt("worker-0", FIRST, Outcome.APPLIED, Version(1, 1))]


def test_a_push_that_is_refused_takes_no_receipt_and_leaves_the_server_in_use() -> None:
    never: list[Receipt] = []
    given: list[Receipt] = []

    async def test(host: ServerHost) -> None:
        with pytest.raises(PushRefusedError):
            host.push(push(FIRST, V0, values=np.ones(len(START) + 1, np.float32)), never.append)
        host.push(push(FIRST, V0), given.append)

    hosting(test)
    assert never == []
    assert given == [Receipt("worker-0", FIRST, Outcome.APPLIED, Version(1, 1))]


IN_THE_MIDDLE = [EncodingError, FrameError, LaneTimeoutError, SharedMemoryError, MemoryError]


@pytest.mark.parametrize("kind", IN_THE_MIDDLE)
def test_no_other_error_of_a_push_is_taken_to_mean_that_nothing_happened(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    async def test(host: ServerHost) -> None:
        def decode(*arguments: Any) -> None:
            raise kind("out of order")

        monkeypatch.setattr(host.server, "_collect", decode)  # the push is already counted
        with pytest.raises(kind):
            host.push(push(FIRST, V0), ignore)
        monkeypatch.undo()
        with pytest.raises(RunError, match=r"failed in the middle of a call: .*out of order"):
            host.push(push(FIRST, V0), ignore)

    hosting(test)


@pytest.mark.parametrize("kind", IN_THE_MIDDLE)
def test_nor_of_a_reply_that_fails_after_the_step(kind: type[Exception]) -> None:
    async def test(host: ServerHost) -> None:
        def reply(receipt: Receipt) -> None:
            raise kind("no room for the answer")

        with pytest.raises(kind):
            host.push(push(FIRST, V0), reply)
        assert host.server.version == Version(1, 1)
        with pytest.raises(RunError, match=r"failed in the middle of a call: .*no room for the answer"):
            host.push(push(SECOND, V0), ignore)

    hosting(test)


def test_a_server_that_fails_in_the_middle_of_a_step_is_called_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of its weights may be a step ahead of the others: it cannot know which batches they contain."""

    async def test(host: ServerHost) -> None:
        monkeypatch.setattr(host.server._optimizer, "step", breaks)
        with pytest.raises(MemoryError):
            host.push(push(FIRST, V0), ignore)
        monkeypatch.undo()
        told = "this server failed in the middle of a call: MemoryError: no room; its log has the details"
        with pytest.raises(RunError, match=told):
            host.push(push(SECOND, V0), ignore)
        with pytest.raises(RunError, match=told):
            await host.report(wait=False)
        with pytest.raises(RunError, match=told):
            await host.snapshot(LIMIT_S)

    hosting(test)


def breaks(*arguments: Any) -> None:
    raise MemoryError("no room")


def test_weights_that_are_not_kept_are_no_fault_of_the_servers() -> None:
    async def test(host: ServerHost) -> None:
        with pytest.raises(WeightsNotKeptError, match="after 7 epochs are not kept; epochs kept: none"):
            host.epoch_weights(7)
        assert host.epoch_weights(None).tolist() == START.tolist()

    hosting(test)


def test_what_sends_a_receipt_holds_up_nobody() -> None:
    pulled: list[Version] = []

    async def test(host: ServerHost) -> None:
        into = np.empty(len(START), np.float32)
        host.push(push(FIRST, V0), lambda receipt: lambda: pulled.append(host.pull(into)))

    hosting(test)
    assert pulled == [Version(1, 1)]


@pytest.fixture
def restless() -> Iterator[None]:
    """Let the interpreter switch threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("restless")
def test_threads_that_push_at_once_are_served_one_after_the_other() -> None:
    """Every batch is applied once and no step is lost: the weights are those that one thread would have made."""
    given: list[Receipt] = []
    grid = EpochGrid((2000,), 2000)
    size = 1000
    server = ParameterServer(job(), Partition(0, 0, size, size), np.zeros(size, np.float32), grid, V0)
    host = ServerHost(server)
    positions = iter(range(grid.num_batches))

    def work(number: int) -> None:
        into = np.empty(size, np.float32)
        ones = np.ones(size, np.float32)
        for position in positions:
            read = host.pull(into)
            worker = f"worker-{number}"
            assert (into == into[0]).all(), "these weights are of two versions"
            gradient = push(grid.batch(0, position), read, worker=worker, values=ones)
            host.push(gradient, given.append)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, number) for number in range(4)]:
            done.result(LIMIT_S)
    assert server.epochs == 1
    np.testing.assert_allclose(server.weights, -0.1 * grid.num_batches, rtol=1e-4)
    assert [receipt.version.updates for receipt in given] == list(range(1, grid.num_batches + 1))
    assert {receipt.outcome for receipt in given} == {Outcome.APPLIED}


# Snapshots


def test_a_snapshot_is_taken_at_once_between_rounds() -> None:
    async def test(host: ServerHost) -> None:
        state, records = await host.snapshot(LIMIT_S)
        assert state.metadata["version"] == [1, 0]
        assert records["kind"].tolist() == [RecordKind.JOIN, RecordKind.JOIN]

    hosting(test, "bsp")


def test_a_snapshot_waits_until_the_round_closes() -> None:
    async def test(host: ServerHost) -> None:
        host.push(push(FIRST, V0), ignore)
        snapshot = asyncio.create_task(host.snapshot(LIMIT_S))
        await asyncio.sleep(0)
        assert not snapshot.done()
        host.push(push(SECOND, V0, worker="worker-1"), ignore)
        host.push(push(BatchId(0, 0, 2), Version(1, 1)), ignore)  # the next round opens before the snapshot is awaited
        state, records = await snapshot
        assert state.metadata["version"] == [1, 1]
        assert state.arrays["weights"].tolist() == pytest.approx((START - np.float32(0.1)).tolist())
        assert records["kind"].tolist() == [RecordKind.JOIN, RecordKind.JOIN, RecordKind.PUSH, RecordKind.PUSH]

    hosting(test, "bsp")


def test_a_snapshot_of_a_round_that_does_not_close_is_given_up_and_the_journal_goes_on() -> None:
    async def test(host: ServerHost) -> None:
        host.push(push(FIRST, V0), ignore)
        with pytest.raises(StorageError, match=r"no round closed within 0\.01 s, and the state within a round cannot"):
            await host.snapshot(0.01)
        host.push(push(SECOND, V0, worker="worker-1"), ignore)
        _, records = await host.snapshot(LIMIT_S)
        assert records["kind"].tolist() == [RecordKind.JOIN, RecordKind.JOIN, RecordKind.PUSH, RecordKind.PUSH]

    hosting(test, "bsp")


@pytest.mark.parametrize("hops", range(6))
def test_a_round_that_closes_as_time_runs_out_is_in_one_journal_or_the_next(hops: int) -> None:
    """The event loop runs `hops` times between the time limit and the push that closes the round."""
    given: list[Receipt] = []

    async def test(host: ServerHost) -> None:
        loop = asyncio.get_running_loop()
        host.push(push(FIRST, V0), given.append)
        pushed = loop.create_future()

        def close_round(left: int) -> None:
            if left:
                loop.call_soon(close_round, left - 1)
                return
            host.push(push(SECOND, V0, worker="worker-1"), given.append)
            pushed.set_result(None)

        snapshot = asyncio.create_task(host.snapshot(0.01))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        loop.call_at(loop.time() + 0.01, close_round, hops)  # just after the snapshot's own limit
        taken, _ = await asyncio.gather(snapshot, pushed, return_exceptions=True)
        records = host.server.journal.take() if isinstance(taken, StorageError) else taken[1]  # type: ignore[index]
        assert records["kind"].tolist() == [RecordKind.JOIN, RecordKind.JOIN, RecordKind.PUSH, RecordKind.PUSH]

    hosting(test, "bsp")
    assert len(given) == 2


def test_a_snapshot_that_is_cancelled_takes_nothing_from_the_journal() -> None:
    async def test(host: ServerHost) -> None:
        host.push(push(FIRST, V0), ignore)
        snapshot = asyncio.create_task(host.snapshot(LIMIT_S))
        await asyncio.sleep(0)
        snapshot.cancel()
        with pytest.raises(asyncio.CancelledError):
            await snapshot
        host.push(push(SECOND, V0, worker="worker-1"), ignore)
        _, records = await host.snapshot(LIMIT_S)
        assert len(records) == 4

    hosting(test, "bsp")
