"""The scaling section of a job: the number of workers and servers, their resources, and their connections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Strict, Tag, model_validator

from psgd_workers.spec import Count, Spec, Whole, whole

__all__ = ["ScalingConfig", "WorkerRange"]

Port = Annotated[int, Field(ge=1024, le=65535), BeforeValidator(whole)]
Workers = Annotated[int, Field(ge=1, le=4096), BeforeValidator(whole)]


class WorkerRange(Spec):
    """A number of workers that grows and shrinks with the cluster."""

    min: Workers = 1
    """Number of workers that training begins with. It waits until the cluster has room for them."""
    max: Workers
    """Largest number of workers. More than `min` are started while the cluster has room for them."""

    @model_validator(mode="after")
    def _in_order(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError(f"min is {self.min} and max is {self.max}: expected min ≤ max")
        return self


def _number_or_range(value: object) -> str:
    return "range" if isinstance(value, dict | WorkerRange) else "number"


class ScalingConfig(Spec):
    """The number of workers and servers, and their resources."""

    workers: Annotated[
        Annotated[Workers, Tag("number")] | Annotated[WorkerRange, Tag("range")], Discriminator(_number_or_range)
    ] = Field(default=2, examples=[4, {"min": 2, "max": 8}])
    """Number of worker processes, such as 4, or `{min: 2, max: 8}` for a cluster that grows and shrinks. More: faster
    epochs, and in mode `async` more staleness (about the number of workers minus 1)."""
    cpus_per_worker: Count = 1
    """CPUs that Ray reserves for each worker, and threads that NumPy may use in it. Servers reserve none."""
    gpus_per_worker: float = Field(default=0.0, ge=0)
    """GPUs that Ray reserves for each worker, for models of kind `torch`. A fraction lets workers share a GPU."""
    servers: Whole = Field(default=1, ge=1, le=64)
    """Number of parameter servers. Each holds one slice of the weights (a partition); they are spread over the nodes.
    More: faster for large models, and more messages per push."""
    pipeline: Whole = Field(default=0, ge=0, le=2)
    """Batches that a worker may compute while earlier pushes are on their way. Higher: slow networks hold workers up
    less, and staleness grows by about the number of workers for each batch."""
    lane: Literal["auto", "shm", "tcp", "ray"] = "auto"
    """How gradients travel to servers. `shm`: shared memory, on one node only. `tcp`: sockets. `ray`: Ray's actor
    calls, which work everywhere. `auto`: the fastest of these that works, for each pair of worker and server."""
    ports: Annotated[tuple[Port, Port], Strict(False)] | None = Field(default=None, examples=[[20000, 20100]])
    """First and last TCP port that servers may listen on, such as `[20000, 20100]`, for firewalls. null: any free
    port."""

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
            raise ValueError(f"ports is [{first}, {last}], first and last: expected the lower one first")
        if last - first + 1 < self.servers:
            raise ValueError(
                f"ports [{first}, {last}] are {last - first + 1}, and {self.servers} servers may share a node: widen "
                "ports, or lower servers"
            )
        return self
