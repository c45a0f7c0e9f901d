"""The tcp lane: worker and server on different nodes. Weights and gradients travel in the frames."""

from __future__ import annotations

from psgd_workers.errors import ServerGoneError
from psgd_workers.messages import Gradient, Receipt, Version
from psgd_workers.transport.exchange import Exchange, Request, SerialExchange, ThreadedExchange
from psgd_workers.transport.frames import Frame, FrameKind, PushFormat, PushHeader
from psgd_workers.transport.handshake import Address
from psgd_workers.transport.lane import LaneKind, Pending
from psgd_workers.transport.memory import Segment
from psgd_workers.transport.server_connection import ServerConnection

__all__ = ["TcpLane"]

EMPTY = memoryview(b"")


class TcpLane:
    """A worker's lane to a server on another node. See `ShmLane` for the arguments.

    Raises:
        ServerGoneError: the server cannot be reached, or does not listen on the network.
        FrameError: the server at this address does not belong to this run.
    """

    kind: LaneKind = "tcp"

    def __init__(
        self, worker: str, segment: Segment, part: slice, push_format: PushFormat, address: Address, timeout_s: float
    ) -> None:
        if address.port is None:
            raise ServerGoneError("the server does not listen on the network: set scaling.lane to auto or ray")
        self._worker = worker
        self._push_format = push_format
        self._incarnation = address.incarnation
        self._bytes = [slot.weights[part].data.cast("B") for slot in segment.slots]
        self._connection = ServerConnection.tcp(address.host, address.port, timeout_s)
        try:
            self._connection.shake_hands(address, worker, segment, False, push_format.authenticates)
        except BaseException:
            self._connection.close()
            raise
        slots = range(len(segment.slots))
        self._headers = [PushHeader(slot, push_format.encoding, address.incarnation) for slot in slots]
        self._pending = [_TcpPending(self, slot) for slot in slots]
        # With one batch in hand and one server, the worker has nothing to do while a push is sent and answered.
        waits = len(slots) == 1 and push_format.partitions == 1
        self._exchange: Exchange
        if waits:
            self._exchange = SerialExchange(self._connection, timeout_s)
        else:
            self._exchange = ThreadedExchange(self._connection)

    def pull(self, slot: int, timeout_s: float) -> Version:
        """Implement `Lane.pull`."""
        frame = Frame(FrameKind.PULL, slot, 0, True, self._incarnation, 0)
        request = Request(FrameKind.WEIGHTS, slot, self._incarnation, self._bytes[slot])
        self._exchange.send(request, frame.pack())
        return self._exchange.answer(request, timeout_s).version

    def version(self, timeout_s: float) -> Version:
        """Implement `Lane.version`."""
        frame = Frame(FrameKind.ASK, 0, 0, False, self._incarnation, 0)
        request = Request(FrameKind.VERSION, 0, self._incarnation, EMPTY)
        self._exchange.send(request, frame.pack())
        return self._exchange.answer(request, timeout_s).version

    def push(self, gradient: Gradient, slot: int, wants: bool) -> Pending:
        """Implement `Lane.push`."""
        payload = self._push_format.payload(gradient, shared=False)
        header = self._headers[slot].write(gradient, sum(map(len, payload)), wants)
        pending = self._pending[slot]
        pending.request = Request(FrameKind.RECEIPT, slot, self._incarnation, self._bytes[slot] if wants else EMPTY)
        self._exchange.send(pending.request, header, *payload)
        return pending

    def receipt(self, request: Request, timeout_s: float) -> Receipt:
        """Wait for the receipt of a push; see `Pending.receipt`."""
        return self._exchange.answer(request, timeout_s).receipt(self._worker)

    def hang_up(self) -> None:
        """Implement `Lane.hang_up`."""
        self._connection.hang_up()

    def close(self) -> None:
        """Implement `Lane.close`."""
        self._pending.clear()  # they refer to this lane, whose memory would otherwise live until a garbage collection
        self._exchange.close()
        self._connection.close()


class _TcpPending:
    """The push from one slot, as long as it has no receipt. The slot's next push uses the same object."""

    __slots__ = ("_lane", "request")

    def __init__(self, lane: TcpLane, slot: int) -> None:
        self._lane = lane
        self.request = Request(FrameKind.RECEIPT, slot, 0, EMPTY)

    def receipt(self, timeout_s: float) -> Receipt:
        return self._lane.receipt(self.request, timeout_s)
