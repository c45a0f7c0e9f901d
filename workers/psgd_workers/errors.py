"""What can go wrong on a worker machine: the lower part of the tree drawn in `psgd.errors`."""

__all__ = [
    "DataError",
    "InputError",
    "LaneError",
    "LaneTimeoutError",
    "MissingExtraError",
    "ModelError",
    "PsgdError",
    "RunError",
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


class LaneError(RunError):
    """A server did not answer as the lane promises; whether it applied the push is in doubt."""


class LaneTimeoutError(LaneError):
    """No receipt within the time limit."""
