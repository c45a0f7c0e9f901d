"""What a job says about its processes: how many, what each is given, and how they reach each other."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from psgd_workers.spec import Spec

__all__ = ["ScalingConfig", "WorkerRange"]

Port = Annotated[int, Field(ge=1024, le=65535)]
Workers = Annotated[int, Field(ge=1, le=4096)]


class WorkerRange(Spec):
    """How many workers, as the cluster has room."""

    min: Workers = 1
    """Training begins with so many."""
    max: Workers
    """More are started while there is room for them, up to this."""

    @model_validator(mode="after")
    def _in_order(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError(f"min is {self.min} and max is {self.max}: expected min ≤ max")
        return self


def _number_or_range(value: object) -> str:
    return "range" if isinstance(value, dict | WorkerRange) else "number"


class ScalingConfig(Spec):
    """How many workers and servers, and what each is given."""

    workers: Annotated[
        Annotated[Workers, Tag("number")] | Annotated[WorkerRange, Tag("range")], Discriminator(_number_or_range)
    ] = 2
    """Worker processes: a number, or `{min, max}` for a cluster that grows and shrinks. More: faster epochs, more
    staleness (about workers - 1) in `async`."""
    cpus_per_worker: int = Field(default=1, ge=1)
    """CPUs Ray reserves for each worker, and BLAS threads it may use. The servers ask for none."""
    gpus_per_worker: float = Field(default=0.0, ge=0)
    """GPUs Ray reserves for each worker, for models of kind `torch`."""
    servers: int = Field(default=1, ge=1, le=64)
    """Parameter servers; each holds one slice of the weights (a partition), spread over nodes. More: large models
    travel and step faster, and every push is more messages."""
    pipeline: int = Field(default=0, ge=0, le=2)
    """Batches a worker may compute ahead while earlier pushes travel; each adds one version of staleness per worker."""
    lane: Literal["auto", "shm", "tcp", "ray"] = "auto"
    """How workers reach servers: shared memory on one node, sockets between nodes, Ray's actor calls anywhere; `auto`
    picks per worker and server."""
    ports: tuple[Port, Port] | None = None
    """First and last of the TCP ports that servers may listen on, for firewalls; null: any free port."""

    @property
    def least_workers(self) -> int:
        """So many there must be."""
        return self.workers if isinstance(self.workers, int) else self.workers.min

    @property
    def most_workers(self) -> int:
        """So many there may be."""
        return self.workers if isinstance(self.workers, int) else self.workers.max

    @model_validator(mode="after")
    def _enough_ports(self) -> ScalingConfig:
        if self.ports is None:
            return self
        first, last = self.ports
        if first > last:
            raise ValueError(f"ports is [{first}, {last}], first and last: expected the lower one first")
        if last - first + 1 < self.servers:
            raise ValueError(
                f"ports [{first}, {last}] are {last - first + 1}, and {self.servers} servers may share a node: widen "
                "ports, or lower servers"
            )
        return self
