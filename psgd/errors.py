"""All errors that psgd raises on purpose, in one tree.

    PsgdError
    ├── InputError (ValueError)       refused before anything starts; exit code 2
    │   ├── SpecError                 the job file or an override is not a valid job
    │   ├── DataError                 the data is missing, malformed, or does not fit the model
    │   ├── ModelError                the model cannot be built
    │   ├── MissingExtraError         an optional dependency is not installed
    │   ├── StorageError              the storage cannot be read or written
    │   │   └── DamagedFileError      a file of a run is not as psgd wrote it
    │   ├── RunExistsError            a run of this name exists already
    │   ├── RunNotFoundError          no run of this name exists
    │   ├── RunNotRunningError        the run has no running driver that could obey the command
    │   ├── ResumeError               the run belongs to another job, or cannot be continued as asked
    │   ├── UntrustedRunError         the run of another user names code, which is not executed
    │   ├── JournalError              a journal is incomplete, or belongs to another run
    │   └── ClusterError              the cluster cannot be reached, or is too small for the job
    ├── CheckpointError (ValueError)  a checkpoint is damaged or incomplete
    └── RunError (RuntimeError)       failed while running; exit code 3
        ├── WorkerError               the model's own code raised an exception on a worker
        ├── LaneError                 a lane cannot be used any more; it is unknown which of its pushes arrived
        │   ├── ServerGoneError       the server cannot be reached, or closed the connection
        │   │   └── LaneTimeoutError  the server did not answer within the time limit
        │   ├── FrameError            a message does not belong to this run, or breaks the protocol
        │   ├── SharedMemoryError     memory cannot be shared on this machine
        │   └── ListenError           a server cannot listen for workers
        ├── EncodingError             a compressed gradient cannot be decoded
        ├── StateUnchangedError       a server refused a call; its state is as before
        │   ├── PushRefusedError      the push cannot belong to this run and partition
        │   └── WeightsNotKeptError   the server does not hold the weights of the end of that epoch
        ├── NotCompiledError          there is no compiled code of the push path
        ├── OwnershipError            another driver has taken the run over
        ├── ClusterStartError         Ray did not start on this machine
        ├── ClusterLostError          the cluster was lost during the run
        ├── ReplayError               a replay did not give the run's own result
        └── RunFailedError            the run as a whole failed; holds its `result`

Errors that workers raise are defined in `psgd_workers.errors`, because workers do not import psgd.
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
    "NotCompiledError",
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
    "UntrustedRunError",
    "WeightsNotKeptError",
    "WorkerError",
]


class SpecError(InputError):
    """The job file or an override is not a valid job."""


class StorageError(InputError):
    """The storage cannot be read or written."""


class DamagedFileError(StorageError):
    """A file of a run is not as psgd wrote it: damaged, cut short or replaced."""


class RunExistsError(InputError):
    """A run of this name exists already."""


class RunNotFoundError(InputError):
    """No run of this name exists."""


class RunNotRunningError(InputError):
    """The run has no running driver that could obey the command."""


class ResumeError(InputError):
    """The run belongs to another job, or cannot be continued as asked."""


class UntrustedRunError(InputError):
    """The run belongs to another user and names code, which is not executed without the present user's consent."""


class JournalError(InputError):
    """A journal is incomplete, or belongs to another run."""


class ClusterError(InputError):
    """The cluster cannot be reached, or is too small for the job."""


class CheckpointError(PsgdError, ValueError):
    """A checkpoint is damaged or incomplete."""


class StateUnchangedError(RunError):
    """A server refused a call before it changed its state. After any other error its state may have changed."""


class PushRefusedError(StateUnchangedError):
    """A server refused a push that no worker of this run could have sent to its partition."""


class WeightsNotKeptError(StateUnchangedError):
    """The server does not hold the weights of the end of that epoch: it is too old, or not complete yet."""


class NotCompiledError(RunError):
    """There is no compiled code of the push path."""


class OwnershipError(RunError):
    """Another driver has taken the run over; this driver stops and writes nothing more."""


class ClusterStartError(RunError):
    """Ray did not start on this machine, for example because memory or a process limit is exhausted."""


class ClusterLostError(RunError):
    """The cluster was lost during the run: no node is up, or Ray does not answer."""


class ReplayError(RunError):
    """A replay did not give the run's own result."""


class RunFailedError(RunError):
    """A run ended as `failed` or `unsaved`.

    Attributes:
        result: result of the run up to its end.
    """

    def __init__(self, message: str, result: Result) -> None:
        super().__init__(message)
        self.result = result
