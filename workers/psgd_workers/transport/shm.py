"""The shm lane: worker and server on one node.

Weights and gradients lie in shared memory. A push is one small frame each way over a Unix socket.
"""

from __future__ import annotations

from psgd_workers.errors import FrameError, SharedMemoryError
from psgd_workers.messages import Gradient, Receipt, Version
from psgd_workers.transport.affinity import allowed_processors, current_processor, wake
from psgd_workers.transport.frames import Frame, FrameKind, PushFormat
from psgd_workers.transport.handshake import Address
from psgd_workers.transport.lane import LaneKind, Pending
from psgd_workers.transport.memory import PublishedVector, Segment, stores_are_ordered
from psgd_workers.transport.server_connection import ServerConnection

__all__ = ["ShmLane"]


class ShmLane:
    """The way to a server on the same node, to be used by one thread.

    Args:
        worker: its name.
        segment: its memory, shared.
        part: the partition's slice of the weights.
        form: of its pushes.
        address: of its server.
        timeout_s: for the handshake.

    Raises:
        ServerGoneError: the server cannot be reached.
        FrameError: the server there does not belong to this run.
        SharedMemoryError: worker and server cannot share memory.
    """

    kind: LaneKind = "shm"

    def __init__(
        self, worker: str, segment: Segment, part: slice, push_format: PushFormat, address: Address, timeout_s: float
    ) -> None:
        if address.path is None or segment.file is None:
            raise SharedMemoryError(
                f"no memory can be shared: {segment.fault or 'the server listens on no Unix socket'}"
            )
        self._worker = worker
        self._push_format = push_format
        self._incarnation = address.incarnation
        self._weights = [slot.weights[part] for slot in segment.slots]
        self._connection = ServerConnection.unix(address.path, timeout_s)
        try:
            file = self._connection.shake_hands(address, worker, segment, shared=True)
            assert file is not None
            self._published = PublishedVector(push_format.size, file)
        except BaseException:
            self._connection.close()
            raise
        self._reads_itself = stores_are_ordered()
        self._processors = len(allowed_processors())
        self._patient = False  # whether its thread waits for its turn when an answer wakes it
        self._arrived: dict[int, Frame] = {}  # answers of other slots, that came first

    def pull(self, slot: int, timeout_s: float) -> Version:
        """From shared memory; a server that never pauses is asked to copy. See `Lane.pull`."""
        if self._reads_itself and (version := self._published.snapshot(self._weights[slot])):
            return version
        self._connection.limit(timeout_s)
        self._connection.send(Frame(FrameKind.PULL, slot, 0, False, self._incarnation, 0).pack())
        return _checked(self.answer(slot), FrameKind.WEIGHTS, slot, self._incarnation, 0).version

    def version(self, timeout_s: float) -> Version:
        """From shared memory; see `Lane.version`."""
        del timeout_s
        return self._published.version

    def push(self, gradient: Gradient, slot: int, wants: bool) -> Pending:
        """One message; see `Lane.push`."""
        payload = self._push_format.payload(gradient, shared=True)
        size = sum(map(len, payload))
        frame = Frame.of_push(
            gradient, slot, wants and not self._reads_itself, self._incarnation, size, current_processor()
        )
        self._connection.send(frame.pack(), *payload)
        return _ShmPending(self, slot, wants)

    def receipt(self, slot: int, wants: bool, timeout_s: float) -> Receipt:
        """Of the push from that slot."""
        self._connection.limit(timeout_s)
        frame = _checked(self.answer(slot), FrameKind.RECEIPT, slot, self._incarnation, 0)
        receipt = frame.receipt(self._worker)
        # Where workers have to share processors, who is answered had better not stop the thread that answers the rest.
        self._wake(patiently=self._published.poller > self._processors)
        if wants and self._reads_itself:
            return Receipt(receipt.worker, receipt.batch, receipt.outcome, self.pull(slot, timeout_s))
        return receipt

    def _wake(self, patiently: bool) -> None:
        if patiently != self._patient:
            wake(patiently)
            self._patient = patiently

    def answer(self, slot: int) -> Frame:
        """The next frame of that slot."""
        if slot in self._arrived:
            return self._arrived.pop(slot)
        while (frame := self._connection.frame()).slot != slot:
            if frame.slot >= len(self._weights) or frame.slot in self._arrived:
                raise FrameError(f"the server answered slot {frame.slot} of {len(self._weights)} twice, or too often")
            self._arrived[frame.slot] = frame
        return frame

    def hang_up(self) -> None:
        """See `Lane.hang_up`."""
        self._connection.hang_up()

    def close(self) -> None:
        """See `Lane.close`."""
        self._wake(patiently=False)
        self._connection.close()


class _ShmPending:
    __slots__ = ("_lane", "_slot", "_wants")

    def __init__(self, lane: ShmLane, slot: int, wants: bool) -> None:
        self._lane = lane
        self._slot = slot
        self._wants = wants

    def receipt(self, timeout_s: float) -> Receipt:
        return self._lane.receipt(self._slot, self._wants, timeout_s)


def _checked(frame: Frame, kind: FrameKind, slot: int, incarnation: int, payload: int) -> Frame:
    came = (frame.kind, frame.slot, frame.incarnation, frame.payload)
    if came != (kind, slot, incarnation, payload):
        raise FrameError(f"the server answered with {came}, expected {(kind, slot, incarnation, payload)}")
    return frame
