"""What the coordinator is told (events) and what it wants done (actions): frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from psgd.core.server.report import Report
from psgd.result import Status
from psgd.spec import Settings
from psgd_workers.messages import BatchId, Evaluation, Lease

__all__ = [
    "Action",
    "AskReport",
    "Cancel",
    "Change",
    "ChangeServer",
    "Commit",
    "Committed",
    "Evaluate",
    "Evaluated",
    "EvaluationLost",
    "Event",
    "Finish",
    "Grant",
    "Join",
    "LaneFailed",
    "LeaseClosed",
    "Leave",
    "Note",
    "Reported",
    "Save",
    "SaveFailed",
    "Saved",
    "Scale",
    "ServerLost",
    "Skip",
    "StartServer",
    "StartWorker",
    "Started",
    "Stop",
    "StopWorker",
    "Tick",
    "WorkerFailed",
    "WorkerLost",
    "WorkerUp",
]


# Events ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """The host is ready to act."""


@dataclass(frozen=True, slots=True)
class WorkerUp:
    """A worker was started and waits for a lease."""

    worker: str
    process: str = ""  # host:pid, for people
    lanes: tuple[str, ...] = ()  # how it reaches each partition, likewise


@dataclass(frozen=True, slots=True)
class LeaseClosed:
    """A lease returned."""

    worker: str
    lease: int
    residual_norm: float = 0.0  # of what compression has left out of the worker's pushes so far


@dataclass(frozen=True, slots=True)
class LaneFailed:
    """A lease ended because a server did not answer its worker; the worker lives."""

    worker: str
    lease: int
    cause: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker's process is gone, and with it all its leases."""

    worker: str
    cause: str
    preempted: bool = False  # its node was taken away on purpose: not charged as a failure
    died: bool = True  # else it could not be built


@dataclass(frozen=True, slots=True)
class WorkerFailed:
    """The model's own code raised: it would again, anywhere."""

    worker: str
    cause: str


@dataclass(frozen=True, slots=True)
class ServerLost:
    """A server's process is gone, or does not answer."""

    partition: int
    cause: str
    died: bool = True  # else it refused to start, or nobody knows


@dataclass(frozen=True, slots=True)
class Reported:
    """A server answered `AskReport`."""

    report: Report
    asked: int


@dataclass(frozen=True, slots=True)
class Saved:
    """A partition's part of a checkpoint is written."""

    partition: int
    checkpoint: int
    updates: int  # in the saved state
    epochs: int


@dataclass(frozen=True, slots=True)
class SaveFailed:
    """A part of a checkpoint, or its COMMITTED, could not be written."""

    checkpoint: int
    cause: str


@dataclass(frozen=True, slots=True)
class Committed:
    """A checkpoint is whole."""

    checkpoint: int


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An evaluation returned."""

    worker: str
    epochs: int | None
    evaluation: Evaluation


@dataclass(frozen=True, slots=True)
class EvaluationLost:
    """An evaluation did not begin: the weights were lost with their server."""

    worker: str
    epochs: int | None


@dataclass(frozen=True, slots=True)
class Stop:
    """Somebody wants the run to end here: `stopped` by command, `interrupted` by a signal."""

    status: Status


@dataclass(frozen=True, slots=True)
class Change:
    """Somebody wants the run to go on by other settings, which were checked."""

    settings: Settings


@dataclass(frozen=True, slots=True)
class Scale:
    """Somebody wants so many workers from now on; checked against the job."""

    workers: int


@dataclass(frozen=True, slots=True)
class Tick:
    """The time `next_deadline` named has come."""


Event = (
    Started
    | WorkerUp
    | LeaseClosed
    | LaneFailed
    | WorkerLost
    | WorkerFailed
    | ServerLost
    | Reported
    | Saved
    | SaveFailed
    | Committed
    | Evaluated
    | EvaluationLost
    | Stop
    | Change
    | Scale
    | Tick
)


# Actions --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartServer:
    """Of the newest checkpoint, if there is one; as a new incarnation. Whoever served the partition is ended."""

    partition: int


@dataclass(frozen=True, slots=True)
class StartWorker:
    worker: str


@dataclass(frozen=True, slots=True)
class StopWorker:
    """End the worker's process; no event follows."""

    worker: str
    cause: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """Ask a worker to end its leases up to this one after the batch in hand."""

    worker: str
    lease: int


@dataclass(frozen=True, slots=True)
class Join:
    """Tell every server that a worker gets a lease; done before any later action."""

    worker: str


@dataclass(frozen=True, slots=True)
class Leave:
    """Tell every server that a worker has no lease any more."""

    worker: str


@dataclass(frozen=True, slots=True)
class ChangeServer:
    """A partition goes on by other settings, from whatever version it has then."""

    partition: int
    settings: Settings


@dataclass(frozen=True, slots=True)
class Skip:
    """Every partition is to do without a batch."""

    batch: BatchId


@dataclass(frozen=True, slots=True)
class Note:
    """Something to be written into the run's record of events."""

    event: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Grant:
    worker: str
    lease: Lease


@dataclass(frozen=True, slots=True)
class AskReport:
    partition: int
    asked: int  # stamp, handed back with the answer
    wait: bool  # answer when an epoch completes, or after a moment; else at once


@dataclass(frozen=True, slots=True)
class Save:
    """Every partition writes its part of a checkpoint."""

    checkpoint: int


@dataclass(frozen=True, slots=True)
class Commit:
    checkpoint: int
    updates: int
    epochs: int


@dataclass(frozen=True, slots=True)
class Evaluate:
    """A worker evaluates the weights as they were when `epochs` epochs were complete; None: as they are."""

    worker: str
    epochs: int | None


@dataclass(frozen=True, slots=True)
class Finish:
    """The run is over; nothing is asked for after this."""

    status: Status
    error: str | None = None


Action = (
    StartServer
    | StartWorker
    | StopWorker
    | Cancel
    | ChangeServer
    | Join
    | Leave
    | Skip
    | Note
    | Grant
    | AskReport
    | Save
    | Commit
    | Evaluate
    | Finish
)
