"""Gathering: the weights of all partitions, brought together for the worker that is to evaluate them."""

from __future__ import annotations

from dataclasses import dataclass, field

from psgd_workers.messages import FloatArray

__all__ = ["EvaluationRequest", "WeightsGather"]


@dataclass(eq=False, slots=True)
class EvaluationRequest:
    """One evaluation whose weights are on their way."""

    worker: str
    epochs: int | None  # the name of the weights
    parts: dict[int, FloatArray] = field(default_factory=dict)  # by partition, as far as they are there


class WeightsGather:
    """What is on its way. An evaluation ends once, however many partitions refuse their part or are lost.

    Args:
        partitions: how many parts there are.
    """

    def __init__(self, partitions: int) -> None:
        self._partitions = partitions
        self._open: list[EvaluationRequest] = []

    def begin(self, worker: str, epochs: int | None) -> EvaluationRequest:
        """Every partition is asked for its part."""
        request = EvaluationRequest(worker, epochs)
        self._open.append(request)
        return request

    def add(self, request: EvaluationRequest, partition: int, part: FloatArray) -> list[FloatArray] | None:
        """A part is there; all of them in their order, if it was the last and none was refused."""
        request.parts[partition] = part
        if len(request.parts) < self._partitions or not self.give_up(request):
            return None
        return [request.parts[number] for number in range(self._partitions)]

    def give_up(self, request: EvaluationRequest) -> bool:
        """A part will not come, or all are there; whether that was not known."""
        if request not in self._open:
            return False
        self._open.remove(request)
        return True

    def lost(self, partition: int) -> list[EvaluationRequest]:
        """A partition is lost: those that lack its part, which end here."""
        lacking = [request for request in self._open if partition not in request.parts]
        self._open = [request for request in self._open if partition in request.parts]
        return lacking
