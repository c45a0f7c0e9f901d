"""The Ray lane, and the choice of a lane between a worker and a server.

On the Ray lane a push is an actor call that returns the receipt and the weights. This lane works wherever Ray does, and
it is the slowest: Ray copies every message through its object store, so a push and its weights take milliseconds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from psgd.core.server.partitions import Partition
from psgd.spec import JobSpec
from psgd_workers.errors import LaneError, LaneTimeoutError, ServerGoneError
from psgd_workers.messages import FloatArray, Gradient, Receipt, Version
from psgd_workers.transport.frames import PushFormat
from psgd_workers.transport.handshake import Address
from psgd_workers.transport.lane import Connect, Lane, LaneKind, Pending
from psgd_workers.transport.memory import Segment
from psgd_workers.transport.shm import ShmLane
from psgd_workers.transport.tcp import TcpLane
from psgd_workers.worker import Route

__all__ = ["RayLane", "push_format_of", "route"]

SOCKET_LANES: dict[LaneKind, type[ShmLane | TcpLane]] = {"shm": ShmLane, "tcp": TcpLane}

CONNECT_TIMEOUT_S = 10.0  # time limit: a firewall may drop packets instead of refusing the connection

log = logging.getLogger("psgd.lanes")


class RayLane:
    """A lane between a worker and a server on which every message is a Ray actor call.

    Args:
        server: handle of a `psgd.cluster.server_actor.ServerActor`.
        segment: memory of the worker for gradients and weights.
        part: slice of the weights that the partition holds.
    """

    kind: LaneKind = "ray"

    def __init__(self, server: ActorHandle[Any], segment: Segment, part: slice) -> None:
        self._server: Any = server  # Ray's type stubs declare no methods of a handle
        self._weights = [slot.weights[part] for slot in segment.slots]

    def pull(self, slot: int, timeout_s: float) -> Version:
        """Pull by one actor call; see `Lane.pull`."""
        reply = _get(self._server.pull.remote(), timeout_s, "the weights")
        self._weights[slot][:] = reply[1]
        return Version(*reply[0])

    def version(self, timeout_s: float) -> Version:
        """Ask for the version by one actor call; see `Lane.version`."""
        return Version(*_get(self._server.version.remote(), timeout_s, "the version"))

    def push(self, gradient: Gradient, slot: int, wants: bool) -> Pending:
        """Submit one actor call. The returned `Pending` waits for its answer; see `Lane.push`."""
        return _RayPending(self._server.push.remote(gradient, wants), self._weights[slot])

    def hang_up(self) -> None:
        """Do nothing: Ray itself ends calls to an actor that is gone."""

    def close(self) -> None:
        """Do nothing: an actor call needs no closing."""


class _RayPending:
    """A push whose actor call has not returned yet."""

    def __init__(self, reply: ray.ObjectRef[Any], into: FloatArray) -> None:
        self._reply = reply
        self._into = into

    def receipt(self, timeout_s: float) -> Receipt:
        receipt: Receipt
        receipt, weights = _get(self._reply, timeout_s, "a receipt")
        if weights is not None:
            self._into[:] = weights
        return receipt


def _get(reply: ray.ObjectRef[Any], timeout_s: float, what: str) -> Any:
    """Return the answer to an actor call; `what` names it in the error."""
    try:
        return ray.get(reply, timeout=timeout_s)
    except GetTimeoutError as error:
        raise LaneTimeoutError(
            f"the server did not send {what} within {timeout_s} s (see failure.timeout_s)"
        ) from error
    except RayTaskError as error:
        raise ServerGoneError(f"the server refused the call: {error.cause}") from error
    except RayError as error:
        raise ServerGoneError(f"the server did not answer: {error}") from error


def push_format_of(spec: JobSpec, partition: Partition) -> PushFormat:
    """Return the layout of the pushes that a partition of a job accepts."""
    encoding = "" if spec.compression.name == "none" or not partition.num_trainable else spec.compression.name
    size = partition.stop - partition.start
    scaling = spec.scaling
    sends_weights = spec.worker_options.sends_weights
    return PushFormat(size, partition.num_trainable, encoding, sends_weights, scaling.servers, scaling.authenticate)


def route(spec: JobSpec, worker: str, partition: Partition, find_server: Callable[[], Any], node: str) -> Route:
    """Return a worker's route to a server, by the lane that the job names. For `auto`, this is the fastest that works.

    Args:
        spec: the job.
        worker: name of the worker.
        partition: the partition that the server holds.
        find_server: returns the handle of the partition's present server.
        node: Ray's id of the worker's node.
    """
    part = slice(partition.start, partition.stop)
    push_format = push_format_of(spec, partition)

    def by_ray(segment: Segment) -> Lane:
        return RayLane(find_server(), segment, part)

    def by_socket(kind: LaneKind, address: Address) -> Connect:
        limit_s = min(CONNECT_TIMEOUT_S, spec.failure.timeout_s)
        return lambda segment: SOCKET_LANES[kind](worker, segment, part, push_format, address, limit_s)

    def connect(segment: Segment) -> Lane:
        if spec.scaling.lane == "ray":
            return by_ray(segment)
        address: Address = _get(find_server().address.remote(), spec.failure.timeout_s, "an address")
        if spec.scaling.lane != "auto":
            return by_socket(spec.scaling.lane, address)(segment)
        kinds: list[LaneKind] = ["shm", "tcp"] if address.node == node else ["tcp"]
        return _connect_first([*(by_socket(kind, address) for kind in kinds), by_ray], segment)

    return Route(part, connect)


def _connect_first(attempts: list[Connect], segment: Segment) -> Lane:
    """Return the first lane that can be connected. If all attempts fail, raise the error of the last one."""
    for connect in attempts[:-1]:
        try:
            return connect(segment)
        except LaneError as error:
            log.warning("the worker could not connect to a server, so it tries a slower lane: %s", error)
    return attempts[-1](segment)
