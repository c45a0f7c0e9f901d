"""The scaling section of a job: the number of workers and servers, their resources, and their connections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Strict, Tag, model_validator

from psgd_workers.counting import counted
from psgd_workers.spec import Count, Spec, Whole, whole

__all__ = ["ScalingConfig", "WorkerRange"]

Port = Annotated[int, Field(ge=1024, le=65535), BeforeValidator(whole)]
Workers = Annotated[int, Field(ge=1, le=4096), BeforeValidator(whole)]


class WorkerRange(Spec):
    """Bounds of a number of workers that grows and shrinks with the cluster."""

    min: Workers = 1
    """Number of workers at the start. Training waits until the cluster has room for them."""
    max: Workers
    """Largest number of workers. Workers beyond `min` are started whenever the cluster has room for them."""

    @model_validator(mode="after")
    def _in_order(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError(f"min is {self.min} and max is {self.max}: expected a min of at most max")
        return self


def _number_or_range(value: object) -> str:
    return "range" if isinstance(value, dict | WorkerRange) else "number"


class ScalingConfig(Spec):
    """The number of workers and servers, and their resources."""

    workers: Annotated[
        Annotated[Workers, Tag("number")] | Annotated[WorkerRange, Tag("range")], Discriminator(_number_or_range)
    ] = Field(default=2, examples=[4, {"min": 2, "max": 8}])
    """Number of worker processes, such as 4, or `{min: 2, max: 8}` for a cluster that grows and shrinks. More: faster
    epochs, and in mode `async` more staleness: on average the number of workers minus 1."""
    cpus_per_worker: Count = 1
    """Number of CPUs that Ray reserves for each worker, and of threads that NumPy may use in it. Ray reserves no CPU
    for servers."""
    gpus_per_worker: float = Field(default=0.0, ge=0)
    """Number of GPUs that Ray reserves for each worker, for models of kind `torch`. With a fraction, workers share a
    GPU."""
    servers: Whole = Field(default=1, ge=1, le=64)
    """Number of server processes. Each holds one slice of the weights (a partition), and they are spread over the
    nodes. More: each server needs less memory and has less traffic, and each push takes more messages. On one node, two
    servers are slower than one."""
    pipeline: Whole = Field(default=0, ge=0, le=2)
    """Number of batches that a worker may compute while it waits for the answer to a push. Higher: workers wait less
    for a slow network, and staleness grows by about the number of workers for each of these batches."""
    lane: Literal["auto", "shm", "tcp", "ray"] = "auto"
    """The way in which workers send gradients to servers. `shm`: shared memory, on one node only. `tcp`: sockets.
    `ray`: Ray's actor calls, which work everywhere. `auto`: the fastest of these that works between a worker and a
    server."""
    authenticate: bool = True
    """true: on lane `tcp`, each message has a tag, so that a computer on the network between worker and server cannot
    change, repeat or leave out a gradient unnoticed. Nothing is encrypted. false: saves some milliseconds for each 100
    MB, on a network that only trusted computers are connected to."""
    ports: Annotated[tuple[Port, Port], Strict(False)] | None = Field(default=None, examples=[[20000, 20100]])
    """First and last TCP port that servers may listen on, such as `[20000, 20100]`, if a firewall opens only some
    ports. null: any free port."""

    @property
    def least_workers(self) -> int:
        """Smallest number of workers that trains the job."""
        return self.workers if isinstance(self.workers, int) else self.workers.min

    @property
    def most_workers(self) -> int:
        """Largest number of workers that trains the job."""
        return self.workers if isinstance(self.workers, int) else self.workers.max

    @model_validator(mode="after")
    def _enough_ports(self) -> ScalingConfig:
        if self.ports is None:
            return self
        first, last = self.ports
        if first > last:
            raise ValueError(
                f"ports is [{first}, {last}]: expected the first and the last port, the lower number first"
            )
        if last - first + 1 < self.servers:
            raise ValueError(
                f"ports [{first}, {last}] has {counted(last - first + 1, 'port')}, but all {self.servers} servers may "
                "run on one node and need a port each: widen ports, or lower servers"
            )
        return self
