"""Errors of a worker machine. `psgd.errors` draws the whole tree of errors; these classes are its lower part."""

from psgd_workers.redaction import redact

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
    """Base class of every error that psgd raises on purpose. Its message shows no password of a URL."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(redact(each) if isinstance(each, str) else each for each in arguments))


class InputError(PsgdError, ValueError):
    """The user's input cannot be used, and nothing was started. The command line exits with 2."""


class DataError(InputError):
    """The data is missing, malformed, or does not fit the model."""


class ModelError(InputError):
    """The model cannot be built, or violates the `Model` protocol."""


class MissingExtraError(InputError):
    """The job needs an optional dependency that is not installed."""


class RunError(PsgdError, RuntimeError):
    """Something failed while the job was running. The command line exits with 3."""


class WorkerError(RunError):
    """The model's own code raised on a worker. The same batch would raise again."""


class EncodingError(RunError):
    """A compressed gradient cannot be decoded."""


class LaneError(RunError):
    """A lane cannot be used any more.

    A push without a receipt may have been applied or not; only the servers know. Only subclasses of this error are
    raised. Code that handles all of them in the same way catches this class.
    """


class ServerGoneError(LaneError):
    """A server cannot be reached, or has closed the connection."""


class LaneTimeoutError(ServerGoneError):
    """A server did not answer within the time limit."""


class FrameError(LaneError):
    """A message from the other end of a connection does not belong to this run, or violates the protocol."""


class SharedMemoryError(LaneError):
    """Memory cannot be shared between the processes of this machine."""


class ListenError(LaneError):
    """A server cannot listen for workers on its machine."""
