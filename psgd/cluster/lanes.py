"""The Ray lane: a push is an actor call, its receipt the call's return, and the weights come back with it.

Works wherever Ray does. Every message is copied through Ray's object store, so this is the slow lane: a push and its
weights cost some milliseconds.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError

from psgd.core.server import ParameterServer
from psgd_workers.errors import LaneError, LaneTimeoutError
from psgd_workers.lanes import Pending
from psgd_workers.messages import BatchId, FloatArray, Gradient, Receipt, Version

__all__ = ["RayLane", "Receipts"]

Reply = asyncio.Future[tuple[Receipt, FloatArray]]


class RayLane:
    """A worker's way to a server actor.

    Args:
        server: a `psgd.cluster.actors.ServerActor`.
    """

    def __init__(self, server: ActorHandle[Any]) -> None:
        self._server: Any = server  # the stubs know no methods of a handle

    def pull(self, into: FloatArray, timeout_s: float) -> Version:
        """One call; see `Lane.pull`."""
        reply = _get(self._server.pull.remote(), timeout_s, "the weights")
        into[:] = reply[1]
        return Version(*reply[0])

    def version(self, timeout_s: float) -> Version:
        """One call; see `Lane.version`."""
        return Version(*_get(self._server.version.remote(), timeout_s, "the version"))

    def push(self, gradient: Gradient, into: FloatArray | None) -> Pending:
        """One call, submitted here and awaited at the receipt; see `Lane.push`."""
        return _RayPending(self._server.push.remote(gradient, into is not None), into)


class _RayPending:
    def __init__(self, reply: ray.ObjectRef[Any], into: FloatArray | None) -> None:
        self._reply = reply
        self._into = into

    def receipt(self, timeout_s: float) -> Receipt:
        receipt: Receipt
        receipt, weights = _get(self._reply, timeout_s, "a receipt")
        if self._into is not None:
            self._into[:] = weights
        return receipt


def _get(reply: ray.ObjectRef[Any], timeout_s: float, what: str) -> Any:
    try:
        return ray.get(reply, timeout=timeout_s)
    except GetTimeoutError as error:
        raise LaneTimeoutError(f"no {what} from the server within {timeout_s} s (see failure.timeout_s)") from error
    except RayError as error:
        raise LaneError(f"the server did not answer: {error}") from error


class Receipts:
    """The server's end: pushes that wait for their receipts.

    Args:
        server: whose receipts these are.
    """

    def __init__(self, server: ParameterServer) -> None:
        self._server = server
        self._parked: dict[tuple[str, BatchId], Reply] = {}

    def push(self, gradient: Gradient, now: float) -> Reply:
        """Push now; the future is done when the receipt is due, with the weights of that instant (shared: to read)."""
        self._server.check(gradient)
        key = (gradient.worker, gradient.batch)
        reply: Reply = asyncio.get_running_loop().create_future()
        self._parked[key] = reply
        self.deliver(self._server.push(gradient, now))
        return reply

    def deliver(self, receipts: tuple[Receipt, ...]) -> None:
        """Hand out receipts that are due."""
        if receipts:
            weights = self._server.published.copy()  # the reply is serialised later, when a step may be under way
            for receipt in receipts:
                self._parked.pop((receipt.worker, receipt.batch)).set_result((receipt, weights))
