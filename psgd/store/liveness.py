"""Liveness: whether a run's driver still works, as far as other processes can know.

On the driver's own machine its process is looked for. From elsewhere its signs of life count: lines of the log, and a
heartbeat when there are none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from psgd.store.owner import Owner

__all__ = ["HEARTBEAT_S", "Liveness", "judge"]

HEARTBEAT_S = 10.0  # a driver gives no sign of life for so long at most, unless storage or an actor keeps it waiting
WAITS = 3  # time limits that a driver may wait for, one after the other


@dataclass(frozen=True, slots=True)
class Liveness:
    """The state of a run's driver."""

    status: Literal["running", "ended", "lost"]
    reason: str  # why it counts as lost; empty if it does not
    last_sign: float  # Unix time of the last sign of life, seconds


def judge(owner: Owner | None, ended: bool, signs: list[float], timeout_s: float, now: float) -> Liveness:
    """Return whether a driver runs, has ended, or was lost.

    Args:
        owner: the driver; None: none has owned the run yet.
        ended: True if the run's log says that it ended.
        signs: Unix times of signs of life.
        timeout_s: the job's `failure.timeout_s`.
        now: Unix time.
    """
    last = max([*signs, *([owner.started] if owner else [])], default=0.0)
    if ended:
        return Liveness("ended", "", last)
    if owner is None:
        return Liveness("lost", "no driver owns the run", last)
    if owner.is_here:
        gone = f"process {owner.pid} on {owner.host}, its driver, is gone"
        return Liveness("running", "", last) if owner.is_alive else Liveness("lost", gone, last)
    limit_s = HEARTBEAT_S + WAITS * timeout_s
    if now - last <= limit_s:
        return Liveness("running", "", last)
    return Liveness("lost", f"its driver on {owner.host} gave no sign of life for {now - last:.0f} s", last)
