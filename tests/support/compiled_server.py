"""A server in a test whose pushes go through compiled code where it takes them, and through the reference where not."""

from __future__ import annotations

import numpy as np

from psgd.core.server.parameter_server import ParameterServer
from psgd.serving.compiled.arrays import server_arrays, worker_arrays
from psgd.serving.compiled.push import HEADER, apply_push
from psgd.serving.compiled.rule import write_rule
from psgd.spec import Settings
from psgd_workers.messages import Encoded, Gradient, Receipt
from psgd_workers.transport.frames import VERSION
from tests.support.jobs import push_header

__all__ = ["CompiledServer"]


class CompiledServer:
    """Has the methods of the server that tests drive.

    Args:
        server: the server.

    Attributes:
        server: the server.
        compiled: number of pushes that compiled code applied.
        weights: weights after the last of them, as it copied them for the worker.
    """

    def __init__(self, server: ParameterServer) -> None:
        self.server = server
        self.compiled = 0
        self.weights = np.empty_like(server.published)
        self._arrays = server_arrays(server, np.zeros(64, np.uint8), np.zeros(1, np.int64))
        write_rule(self._arrays.rule, server)

    def push(self, gradient: Gradient, now: float) -> tuple[Receipt, ...]:
        live = self.server.live_worker(gradient.worker)
        if live is not None and not isinstance(gradient.values, Encoded):
            packed = push_header(gradient, gradient.slot, True, self.server.version.incarnation, 0)
            header = np.frombuffer(bytearray(packed), HEADER)
            others = np.frombuffer(b"".join(VERSION.pack(*version) for version in gradient.others), np.uint8)
            worker = worker_arrays(gradient.worker, live)
            if apply_push(self._arrays, worker, header[0], gradient.values, others, now, self.weights):
                self.compiled += 1
                return ()
        return self.server.push(gradient, now)

    def change(self, settings: Settings, now: float) -> None:
        self.server.change(settings, now)
        write_rule(self._arrays.rule, self.server)
