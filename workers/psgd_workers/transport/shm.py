"""The shm lane: worker and server on one node.

Weights and gradients lie in shared memory. A push is one small frame each way over a Unix socket.
"""

from __future__ import annotations

from psgd_workers.errors import FrameError, SharedMemoryError
from psgd_workers.messages import Gradient, Receipt, Version
from psgd_workers.transport.frames import Frame, FrameKind, PushFormat
from psgd_workers.transport.handshake import Address
from psgd_workers.transport.lane import LaneKind, Pending
from psgd_workers.transport.memory import PublishedVector, Segment, stores_are_ordered
from psgd_workers.transport.server_connection import ServerConnection

__all__ = ["ShmLane"]

EMPTY = memoryview(b"")


class ShmLane:
    """A worker's lane to a server on the same node. Only one thread may use it.

    Args:
        worker: name of the worker.
        segment: memory of the worker, which the lane shares with the server.
        part: slice of the weights that the partition holds.
        push_format: layout of the pushes that the partition accepts.
        address: address of the server.
        timeout_s: seconds that connecting and the handshake may take together.

    Raises:
        ServerGoneError: the server cannot be reached.
        FrameError: the server at this address does not belong to this run.
        SharedMemoryError: worker and server cannot share memory.
    """

    kind: LaneKind = "shm"

    def __init__(
        self, worker: str, segment: Segment, part: slice, push_format: PushFormat, address: Address, timeout_s: float
    ) -> None:
        if address.path is None or segment.file is None:
            raise SharedMemoryError(
                f"no memory can be shared: {segment.fault or 'the server does not listen on a Unix socket'}"
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
        self._copies_itself = stores_are_ordered()  # without asking the server
        self._arrived: dict[int, Frame] = {}  # answers by slot that arrived while another slot's was awaited

    def pull(self, slot: int, timeout_s: float) -> Version:
        """Copy the weights from shared memory, or ask the server to copy if it changes them all the time."""
        if self._copies_itself and (version := self._published.snapshot(self._weights[slot])):
            return version
        self._connection.limit(timeout_s)
        self._connection.send(Frame(FrameKind.PULL, slot, 0, False, self._incarnation, 0).pack())
        return self._answer(FrameKind.WEIGHTS, slot).version

    def version(self, timeout_s: float) -> Version:
        """Read the version from shared memory."""
        del timeout_s
        return self._published.version

    def push(self, gradient: Gradient, slot: int, wants: bool) -> Pending:
        """Send one frame with everything that is not in shared memory."""
        payload = self._push_format.payload(gradient, shared=True)
        size = sum(map(len, payload))
        frame = Frame.of_push(gradient, slot, wants and not self._copies_itself, self._incarnation, size)
        self._connection.send(frame.pack(), *payload)
        return _ShmPending(self, slot, wants)

    def receipt(self, slot: int, wants: bool, timeout_s: float) -> Receipt:
        """Wait for the receipt of the push from a slot; see `Pending.receipt`."""
        self._connection.limit(timeout_s)
        receipt = self._answer(FrameKind.RECEIPT, slot).receipt(self._worker)
        if wants and self._copies_itself:
            return Receipt(receipt.worker, receipt.batch, receipt.outcome, self.pull(slot, timeout_s))
        return receipt

    def _answer(self, kind: FrameKind, slot: int) -> Frame:
        """Wait for the next frame of a slot.

        Raises:
            FrameError: the frame is of another kind or server.
        """
        frame = self._next(slot)
        found = (frame.kind, frame.slot, frame.incarnation)
        expected = (kind, slot, self._incarnation)
        if found != expected:
            raise FrameError(f"the server answered {found}, expected {expected}: kind, slot, incarnation")
        return frame

    def _next(self, slot: int) -> Frame:
        if slot in self._arrived:
            return self._arrived.pop(slot)
        while (frame := self._connection.receive(_no_payload)).slot != slot:
            if frame.slot >= len(self._weights) or frame.slot in self._arrived:
                raise FrameError(f"the server answered slot {frame.slot} of {len(self._weights)}, which awaits nothing")
            self._arrived[frame.slot] = frame
        return frame

    def hang_up(self) -> None:
        """Implement `Lane.hang_up`."""
        self._connection.hang_up()

    def close(self) -> None:
        """Implement `Lane.close`."""
        self._connection.close()


def _no_payload(frame: Frame) -> memoryview:
    """Return an empty buffer: answers have no payload, because weights are in shared memory."""
    if frame.payload:
        raise FrameError(f"the server sent {frame.payload} bytes of payload, expected none")
    return EMPTY


class _ShmPending:
    __slots__ = ("_lane", "_slot", "_wants")

    def __init__(self, lane: ShmLane, slot: int, wants: bool) -> None:
        self._lane = lane
        self._slot = slot
        self._wants = wants

    def receipt(self, timeout_s: float) -> Receipt:
        return self._lane.receipt(self._slot, self._wants, timeout_s)
