"""What can go wrong on a worker machine: the lower part of the tree drawn in `psgd.errors`."""

__all__ = [
    "DataError",
    "EncodingError",
    "FrameError",
    "InputError",
    "LaneError",
    "LaneTimeoutError",
    "ListenError",
    "MissingExtraError",
    "ModelError",
    "PsgdError",
    "RunError",
    "ServerGoneError",
    "SharedMemoryError",
    "WorkerError",
]


class PsgdError(Exception):
    """Everything psgd raises on purpose."""


class InputError(PsgdError, ValueError):
    """What the user gave cannot be used; nothing was started. The command line exits with 2."""


class DataError(InputError):
    """The data is missing, malformed, or does not fit the model."""


class ModelError(InputError):
    """The model cannot be built, or does not keep the `Model` protocol."""


class MissingExtraError(InputError):
    """The job needs an optional dependency that is not installed."""


class RunError(PsgdError, RuntimeError):
    """Something failed while the job was running. The command line exits with 3."""


class WorkerError(RunError):
    """The model's own code raised on a worker: the same batch would raise again."""


class EncodingError(RunError):
    """A compressed gradient cannot be decoded."""


class LaneError(RunError):
    """A lane cannot be used any more. Pushes without a receipt may have been applied or not; the servers know.

    Only its subclasses are raised; code that treats all of them alike catches this class.
    """


class ServerGoneError(LaneError):
    """A server cannot be reached, or has closed the connection."""


class LaneTimeoutError(ServerGoneError):
    """A server did not answer within the time limit."""


class FrameError(LaneError):
    """The other end of a connection sent a message that does not belong to this run or breaks the protocol."""


class SharedMemoryError(LaneError):
    """Memory cannot be shared between the processes of this machine."""


class ListenError(LaneError):
    """A server cannot listen for workers on its machine."""
