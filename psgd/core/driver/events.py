"""Events, which tell the coordinator what happened, and actions, which it asks the host to carry out.

All of them are frozen values, so a test can compare them. They contain no times: the host passes the time of its clock
to `Coordinator.handle`.
"""

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
    "Paused",
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
    """The host is ready to carry out actions."""


@dataclass(frozen=True, slots=True)
class WorkerUp:
    """A worker has started and waits for a lease."""

    worker: str
    process: str = ""  # host:pid, for logs
    lanes: tuple[str, ...] = ()  # lane to each partition, for logs


@dataclass(frozen=True, slots=True)
class LeaseClosed:
    """A lease has ended without a failure: it was finished or cancelled."""

    worker: str
    lease: int
    residual_norm: float = 0.0  # norm of the worker's gradients that compression has not sent yet


@dataclass(frozen=True, slots=True)
class LaneFailed:
    """A lease ended because a server did not answer the worker. The worker lives."""

    worker: str
    lease: int
    cause: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker's process is gone. All its leases have ended."""

    worker: str
    cause: str
    preempted: bool = False  # True if its node was taken away on purpose: this counts as no failure
    died: bool = True  # False if it never began to work: its model or runtime environment could not be built


@dataclass(frozen=True, slots=True)
class WorkerFailed:
    """The model's own code raised an error, which it would raise on every worker."""

    worker: str
    cause: str


@dataclass(frozen=True, slots=True)
class ServerLost:
    """A server's process is gone or does not answer."""

    partition: int
    cause: str
    died: bool = True  # False if it failed to start, or if it is unknown whether it died


@dataclass(frozen=True, slots=True)
class Reported:
    """A server answered `AskReport`."""

    report: Report
    asked: int  # stamp of the request


@dataclass(frozen=True, slots=True)
class Saved:
    """One partition's part of a checkpoint was written."""

    partition: int
    checkpoint: int
    updates: int  # number of updates in the saved state
    epochs: int  # number of complete epochs in the saved state


@dataclass(frozen=True, slots=True)
class SaveFailed:
    """A part of a checkpoint, or its file COMMITTED, could not be written."""

    checkpoint: int
    cause: str


@dataclass(frozen=True, slots=True)
class Committed:
    """A checkpoint is complete: its file COMMITTED was written."""

    checkpoint: int


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A worker has finished an evaluation."""

    worker: str
    epochs: int | None  # as in `Evaluate`
    evaluation: Evaluation


@dataclass(frozen=True, slots=True)
class EvaluationLost:
    """An evaluation did not begin, because its weights were lost with their server."""

    worker: str
    epochs: int | None  # as in `Evaluate`


@dataclass(frozen=True, slots=True)
class Stop:
    """Request to end the run early: `stopped` by a command, `interrupted` by a signal."""

    status: Status


@dataclass(frozen=True, slots=True)
class Change:
    """Request to continue with other settings. They were checked against the job."""

    settings: Settings


@dataclass(frozen=True, slots=True)
class Scale:
    """Request to continue with another number of workers. It was checked against the job."""

    workers: int


@dataclass(frozen=True, slots=True)
class Paused:
    """The driver did not run for a while: it was stopped, swapped out, or waited for storage. It heard no worker."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Tick:
    """The time that `Coordinator.next_deadline` returned has come."""


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
    | Paused
    | Tick
)


# Actions --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartServer:
    """Start a server as a new incarnation, from the newest checkpoint if there is one. End the old one first."""

    partition: int


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Start a worker process."""

    worker: str


@dataclass(frozen=True, slots=True)
class StopWorker:
    """End a worker's process. No event of this worker follows."""

    worker: str
    cause: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """Ask a worker to end its leases after its current batch."""

    worker: str
    lease: int  # id of the newest lease to end; leases with a higher id go on


@dataclass(frozen=True, slots=True)
class Join:
    """Tell every server that a worker will get a lease. The host does this before any later action."""

    worker: str


@dataclass(frozen=True, slots=True)
class Leave:
    """Tell every server that a worker has no lease left."""

    worker: str


@dataclass(frozen=True, slots=True)
class ChangeServer:
    """Tell a server to continue with other settings. They hold from the server's version at that time."""

    partition: int
    settings: Settings


@dataclass(frozen=True, slots=True)
class Skip:
    """Tell every server to count a batch as settled without training on it."""

    batch: BatchId


@dataclass(frozen=True, slots=True)
class Note:
    """Append a record to the run's event log."""

    event: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Grant:
    """Give a worker a lease."""

    worker: str
    lease: Lease


@dataclass(frozen=True, slots=True)
class AskReport:
    """Ask a server for a report."""

    partition: int
    asked: int  # stamp, which the answer repeats
    wait: bool  # True: answer when an epoch completes or some time has passed; False: answer immediately


@dataclass(frozen=True, slots=True)
class Save:
    """Tell every server to write its part of a checkpoint."""

    checkpoint: int


@dataclass(frozen=True, slots=True)
class Commit:
    """Write the file COMMITTED of a checkpoint whose parts are all written."""

    checkpoint: int
    updates: int  # number of updates in the partition with the fewest
    epochs: int  # number of epochs that are complete in every partition


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Tell a worker to evaluate some weights."""

    worker: str
    epochs: int | None  # number of complete epochs in the weights; None: the present weights


@dataclass(frozen=True, slots=True)
class Finish:
    """End the run. No action follows."""

    status: Status
    error: str | None = None  # cause, if the run failed or its final state was not saved


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
