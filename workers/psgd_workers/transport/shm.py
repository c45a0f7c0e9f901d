"""The shm lane: worker and server on one node.

Weights and gradients lie in shared memory. A push is one small frame each way over a Unix socket.
"""

from __future__ import annotations

from psgd_workers.errors import FrameError, SharedMemoryError
from psgd_workers.messages import Gradient, Receipt, Version
from psgd_workers.transport.affinity import current_processor
from psgd_workers.transport.frames import Frame, FrameKind, PushFormat, PushHeader, ReceiptHeader
from psgd_workers.transport.handshake import Address
from psgd_workers.transport.lane import LaneKind, Pending
from psgd_workers.transport.memory import PublishedVector, Segment, stores_are_ordered
from psgd_workers.transport.server_connection import ServerConnection

__all__ = ["ShmLane"]


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
        slots = range(len(segment.slots))
        self._has_payload = bool(push_format.encoding or push_format.partitions > 1)
        self._headers = [PushHeader(slot, push_format.encoding, address.incarnation) for slot in slots]
        self._receipts = [ReceiptHeader(slot, address.incarnation, worker) for slot in slots]
        self._pending = [_ShmPending(self, slot) for slot in slots]
        self._arrived: dict[int, Receipt] = {}  # by slot, receipts that arrived while another slot's was awaited

    def pull(self, slot: int, timeout_s: float) -> Version:
        """Copy the weights from shared memory, or ask the server for a copy if it changes them during every attempt."""
        if self._copies_itself and (version := self._published.snapshot(self._weights[slot])):
            return version
        self._connection.limit(timeout_s)
        self._connection.send(Frame(FrameKind.PULL, slot, 0, False, self._incarnation, 0).pack())
        return self._pulled(slot)

    def version(self, timeout_s: float) -> Version:
        """Read the version from shared memory."""
        del timeout_s
        return self._published.version

    def push(self, gradient: Gradient, slot: int, wants: bool) -> Pending:
        """Send one frame with everything that is not in shared memory."""
        header = self._headers[slot]
        asks = wants and not self._copies_itself
        if self._has_payload:
            payload = self._push_format.payload(gradient, shared=True)
            self._connection.send(header.write(gradient, sum(map(len, payload)), asks, current_processor()), *payload)
        else:
            self._connection.send(header.write(gradient, 0, asks, current_processor()))
        pending = self._pending[slot]
        pending.wants = wants
        return pending

    def receipt(self, slot: int, wants: bool, timeout_s: float) -> Receipt:
        """Wait for the receipt of the push from a slot; see `Pending.receipt`."""
        if slot in self._arrived:
            receipt = self._arrived.pop(slot)
        else:
            self._connection.limit(timeout_s)
            receipt = self._next_receipt(slot)
        if wants and self._copies_itself:
            return Receipt(receipt.worker, receipt.batch, receipt.outcome, self.pull(slot, timeout_s))
        return receipt

    def _next_receipt(self, slot: int) -> Receipt:
        """Wait for the receipt of a slot, and keep those of other slots that come before."""
        while True:
            header = self._connection.receive_header()
            receipt = self._receipts[slot].read(header)
            if receipt is not None:
                return receipt
            self._keep(header, f"the receipt of slot {slot}", slot)

    def _pulled(self, slot: int) -> Version:
        """Wait until the server has copied the weights into a slot, and keep the receipts that come before."""
        while True:
            header = self._connection.receive_header()
            frame = Frame.unpack(header)
            if frame[:2] == (FrameKind.WEIGHTS, slot) and (frame.incarnation, frame.payload) == (self._incarnation, 0):
                return frame.version
            self._keep(header, f"the weights for slot {slot}", slot)

    def _keep(self, header: memoryview, expected: str, slot: int) -> None:
        """Keep the receipt of another slot. Raise FrameError if the header is not such a receipt."""
        frame = Frame.unpack(header)
        is_awaited = frame.slot < len(self._weights) and frame.slot != slot and frame.slot not in self._arrived
        receipt = self._receipts[frame.slot].read(header) if is_awaited else None
        if receipt is None:
            raise FrameError(f"the server answered {frame}, expected {expected}")
        self._arrived[frame.slot] = receipt

    def hang_up(self) -> None:
        """Implement `Lane.hang_up`."""
        self._connection.hang_up()

    def close(self) -> None:
        """Implement `Lane.close`."""
        self._pending.clear()  # they refer to this lane, whose memory would otherwise live until a garbage collection
        self._connection.close()


class _ShmPending:
    """The push from one slot, as long as it has no receipt. The slot's next push uses the same object."""

    __slots__ = ("_lane", "_slot", "wants")

    def __init__(self, lane: ShmLane, slot: int) -> None:
        self._lane = lane
        self._slot = slot
        self.wants = False

    def receipt(self, timeout_s: float) -> Receipt:
        return self._lane.receipt(self._slot, self.wants, timeout_s)
