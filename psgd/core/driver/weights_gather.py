"""Gathers the weights of all partitions for the worker that will evaluate them."""

from __future__ import annotations

from dataclasses import dataclass, field

from psgd_workers.messages import FloatArray

__all__ = ["EvaluationRequest", "WeightsGather"]


@dataclass(eq=False, slots=True)
class EvaluationRequest:
    """An evaluation that waits for its weights."""

    worker: str
    epochs: int | None  # number of complete epochs in the weights; None: the present weights
    parts: dict[int, FloatArray] = field(default_factory=dict)  # partition -> its slice, once it has arrived


class WeightsGather:
    """All evaluation requests that wait for weights.

    A request is closed by its last part, by a refusal or by the loss of a server, whichever comes first. Later
    answers change nothing.

    Args:
        partitions: number of partitions.
    """

    def __init__(self, partitions: int) -> None:
        self._partitions = partitions
        self._open: list[EvaluationRequest] = []

    def begin(self, worker: str, epochs: int | None) -> EvaluationRequest:
        """Open a request. The caller must ask every partition for its part."""
        request = EvaluationRequest(worker, epochs)
        self._open.append(request)
        return request

    def add(self, request: EvaluationRequest, partition: int, part: FloatArray) -> list[FloatArray] | None:
        """Add a part. Return all parts in partition order if it was the last one and the request is still open."""
        request.parts[partition] = part
        if len(request.parts) < self._partitions or not self.give_up(request):
            return None
        return [request.parts[number] for number in range(self._partitions)]

    def give_up(self, request: EvaluationRequest) -> bool:
        """Close a request. Return True if it was open."""
        if request not in self._open:
            return False
        self._open.remove(request)
        return True

    def lost(self, partition: int) -> list[EvaluationRequest]:
        """Close and return the requests that still lack the part of a lost partition."""
        lacking = [request for request in self._open if partition not in request.parts]
        self._open = [request for request in self._open if partition in request.parts]
        return lacking
