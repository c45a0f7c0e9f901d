"""The Ray lane, and the choice of a lane.

On the Ray lane a push is an actor call, its receipt the call's return, and the weights come back with it. It works
wherever Ray does; every message is copied through Ray's object store, so a push and its weights cost milliseconds.
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

SOCKETS: dict[LaneKind, type[ShmLane | TcpLane]] = {"shm": ShmLane, "tcp": TcpLane}

CONNECT_S = 10.0  # what drops packets instead of refusing them is tried so long

log = logging.getLogger("psgd.lanes")


class RayLane:
    """A worker's way to a server actor.

    Args:
        server: a `psgd.cluster.server_actor.ServerActor`.
        segment: the worker's memory.
        part: the partition's slice of the weights.
    """

    kind: LaneKind = "ray"

    def __init__(self, server: ActorHandle[Any], segment: Segment, part: slice) -> None:
        self._server: Any = server  # the stubs know no methods of a handle
        self._weights = [slot.weights[part] for slot in segment.slots]

    def pull(self, slot: int, timeout_s: float) -> Version:
        """One call; see `Lane.pull`."""
        reply = _get(self._server.pull.remote(), timeout_s, "the weights")
        self._weights[slot][:] = reply[1]
        return Version(*reply[0])

    def version(self, timeout_s: float) -> Version:
        """One call; see `Lane.version`."""
        return Version(*_get(self._server.version.remote(), timeout_s, "the version"))

    def push(self, gradient: Gradient, slot: int, wants: bool) -> Pending:
        """One call, submitted here and awaited at the receipt; see `Lane.push`."""
        return _RayPending(self._server.push.remote(gradient, wants), self._weights[slot])

    def hang_up(self) -> None:
        """Ray itself ends calls to an actor that is gone."""

    def close(self) -> None:
        """Calls need no closing."""


class _RayPending:
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
    try:
        return ray.get(reply, timeout=timeout_s)
    except GetTimeoutError as error:
        raise LaneTimeoutError(f"no {what} from the server within {timeout_s} s (see failure.timeout_s)") from error
    except RayTaskError as error:
        raise ServerGoneError(f"the server refused the call: {error.cause}") from error
    except RayError as error:
        raise ServerGoneError(f"the server did not answer: {error}") from error


def push_format_of(spec: JobSpec, partition: Partition) -> PushFormat:
    """What the pushes of a job to a partition look like."""
    encoding = "" if spec.compression.name == "none" or not partition.num_trainable else spec.compression.name
    size = partition.stop - partition.start
    return PushFormat(size, partition.num_trainable, encoding, spec.worker_options.sends_weights, spec.scaling.servers)


def route(spec: JobSpec, worker: str, partition: Partition, find: Callable[[], Any], node: str) -> Route:
    """A worker's way to a server, by the lane that the job asks for or, with `auto`, the fastest that works.

    Args:
        spec: the job.
        worker: the worker's name.
        partition: which one.
        find: its server's actor at present.
        node: Ray's id of the worker's node.
    """
    part = slice(partition.start, partition.stop)
    push_format = push_format_of(spec, partition)

    def by_ray(segment: Segment) -> Lane:
        return RayLane(find(), segment, part)

    def by_socket(kind: LaneKind, address: Address) -> Connect:
        limit_s = min(CONNECT_S, spec.failure.timeout_s)
        return lambda segment: SOCKETS[kind](worker, segment, part, push_format, address, limit_s)

    def connect(segment: Segment) -> Lane:
        if spec.scaling.lane == "ray":
            return by_ray(segment)
        address: Address = _get(find().address.remote(), spec.failure.timeout_s, "an address")
        if spec.scaling.lane != "auto":
            return by_socket(spec.scaling.lane, address)(segment)
        kinds: list[LaneKind] = ["shm", "tcp"] if address.node == node else ["tcp"]
        return _first([*(by_socket(kind, address) for kind in kinds), by_ray], segment)

    return Route(part, connect)


def _first(ways: list[Connect], segment: Segment) -> Lane:
    """By the first way that works; the last one must."""
    for way in ways[:-1]:
        try:
            return way(segment)
        except LaneError as error:
            log.warning("a faster lane does not work here: %s", error)
    return ways[-1](segment)
