"""Every error psgd raises on purpose, in one tree.

    PsgdError
    ├── InputError (ValueError)       refused before anything starts; exit code 2
    │   ├── SpecError                 the job file or an override is not a valid job
    │   ├── DataError                 the data is missing, malformed, or does not fit the model
    │   ├── ModelError                the model cannot be built
    │   ├── MissingExtraError         an optional dependency is not installed
    │   ├── StorageError              the storage cannot be read or written
    │   │   └── DamagedFileError      ... or a file of a run does not hold what psgd wrote there
    │   ├── RunExistsError            a run of this name is there already
    │   ├── RunNotFoundError          no run of this name is there
    │   ├── RunNotRunningError        no driver runs that could obey a command
    │   ├── ResumeError               the run there is of another job, or cannot go on as asked
    │   ├── JournalError              a run's journal is not whole, or not that run's
    │   └── ClusterError              the cluster cannot be reached, or cannot hold the job
    ├── CheckpointError (ValueError)  a checkpoint is damaged or incomplete
    └── RunError (RuntimeError)       failed while running; exit code 3
        ├── WorkerError               the model's own code raised on a worker
        ├── LaneError                 a lane cannot be used any more; its pushes are in doubt
        │   ├── ServerGoneError       the server cannot be reached, or closed the connection
        │   │   └── LaneTimeoutError  the server did not answer within the time limit
        │   ├── FrameError            a message does not belong to this run, or breaks the protocol
        │   ├── SharedMemoryError     memory cannot be shared on this machine
        │   └── ListenError           a server cannot listen for workers
        ├── EncodingError             a compressed gradient cannot be decoded
        ├── StateUnchangedError       a server refused a call; its state is as before
        │   ├── PushRefusedError      the push is not one of this partition
        │   └── WeightsNotKeptError   the weights of that epoch's end are not kept
        ├── OwnershipError            another driver has taken the run over
        ├── ClusterStartError         Ray did not start on this machine
        ├── ClusterLostError          the cluster went away from under the run
        ├── ReplayError               a replay came to something else than the run did
        └── RunFailedError            the run as a whole; carries its `result`

The lower part (input, lanes, workers' own code) lives with the workers, who must not import psgd.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from psgd_workers.errors import (
    DataError,
    EncodingError,
    FrameError,
    InputError,
    LaneError,
    LaneTimeoutError,
    ListenError,
    MissingExtraError,
    ModelError,
    PsgdError,
    RunError,
    ServerGoneError,
    SharedMemoryError,
    WorkerError,
)

if TYPE_CHECKING:
    from psgd.result import Result

__all__ = [
    "CheckpointError",
    "ClusterError",
    "ClusterLostError",
    "ClusterStartError",
    "DamagedFileError",
    "DataError",
    "EncodingError",
    "FrameError",
    "InputError",
    "JournalError",
    "LaneError",
    "LaneTimeoutError",
    "ListenError",
    "MissingExtraError",
    "ModelError",
    "OwnershipError",
    "PsgdError",
    "PushRefusedError",
    "ReplayError",
    "ResumeError",
    "RunError",
    "RunExistsError",
    "RunFailedError",
    "RunNotFoundError",
    "RunNotRunningError",
    "ServerGoneError",
    "SharedMemoryError",
    "SpecError",
    "StateUnchangedError",
    "StorageError",
    "WeightsNotKeptError",
    "WorkerError",
]


class SpecError(InputError):
    """The job file or an override is not a valid job."""


class StorageError(InputError):
    """The storage cannot be read or written."""


class DamagedFileError(StorageError):
    """A file of a run does not hold what psgd wrote there."""


class RunExistsError(InputError):
    """A run of this name is there already."""


class RunNotFoundError(InputError):
    """No run of this name is there."""


class RunNotRunningError(InputError):
    """No driver runs that could obey a command."""


class ResumeError(InputError):
    """The run there is of another job, or cannot go on as asked."""


class JournalError(InputError):
    """A run's journal is not whole, or not that run's."""


class ClusterError(InputError):
    """The cluster cannot be reached, or cannot hold the job."""


class CheckpointError(PsgdError, ValueError):
    """A checkpoint is damaged or incomplete."""


class StateUnchangedError(RunError):
    """A server refused a call before it changed anything. Only of these errors may that be concluded."""


class PushRefusedError(StateUnchangedError):
    """A push that no worker of this run sends to this partition."""


class WeightsNotKeptError(StateUnchangedError):
    """The weights of that epoch's end are not kept: it is too old, or has not come yet."""


class OwnershipError(RunError):
    """Another driver has taken the run over; this one stops without touching it again."""


class ClusterStartError(RunError):
    """Ray did not start on this machine, as when it has too little memory or may start no more processes."""


class ClusterLostError(RunError):
    """The cluster went away from under the run: no node is up, or Ray answers no calls."""


class ReplayError(RunError):
    """A replay came to something else than the run did."""


class RunFailedError(RunError):
    """A run that ended `failed` or `unsaved`; `result` says how far it came."""

    def __init__(self, message: str, result: Result) -> None:
        super().__init__(message)
        self.result = result
