"""Gathering: the weights of all partitions, brought together for the worker that is to evaluate them."""

from __future__ import annotations

from dataclasses import dataclass, field

from psgd_workers.messages import FloatArray

__all__ = ["Asked", "Gathering"]


@dataclass(eq=False, slots=True)
class Asked:
    """One evaluation whose weights are on their way."""

    worker: str
    epochs: int | None  # the name of the weights
    parts: dict[int, FloatArray] = field(default_factory=dict)  # by partition, as far as they are there


class Gathering:
    """What is on its way. An evaluation ends once, however many partitions refuse their part or are lost.

    Args:
        partitions: how many parts there are.
    """

    def __init__(self, partitions: int) -> None:
        self._partitions = partitions
        self._open: list[Asked] = []

    def begin(self, worker: str, epochs: int | None) -> Asked:
        """Every partition is asked for its part."""
        asked = Asked(worker, epochs)
        self._open.append(asked)
        return asked

    def add(self, asked: Asked, partition: int, part: FloatArray) -> list[FloatArray] | None:
        """A part is there; all of them in their order, if it was the last and none was refused."""
        asked.parts[partition] = part
        if len(asked.parts) < self._partitions or not self.give_up(asked):
            return None
        return [asked.parts[number] for number in range(self._partitions)]

    def give_up(self, asked: Asked) -> bool:
        """A part will not come, or all are there; whether that was not known."""
        if asked not in self._open:
            return False
        self._open.remove(asked)
        return True

    def lost(self, partition: int) -> list[Asked]:
        """A partition is lost: those that lack its part, which end here."""
        lacking = [asked for asked in self._open if partition not in asked.parts]
        self._open = [asked for asked in self._open if partition in asked.parts]
        return lacking
