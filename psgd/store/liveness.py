"""Liveness: the state of a run's driver, as far as other processes can know it.

On the driver's own machine, the state follows from the driver's process. On other machines, it follows from the signs
of life that the driver writes: lines of the log, and a heartbeat while there are none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from psgd.store.owner import Owner

__all__ = ["HEARTBEAT_S", "Liveness", "judge_liveness"]

HEARTBEAT_S = 10.0  # longest time without a sign of life, unless the driver waits for storage or an actor
MOST_WAITS = 3  # waits of `failure.timeout_s` that may follow each other without a sign of life


@dataclass(frozen=True, slots=True)
class Liveness:
    """The state of a run's driver."""

    status: Literal["running", "ended", "lost"]
    reason: str  # reason why it counts as lost, or empty
    last_sign: float  # time of the last sign of life, Unix seconds


def judge_liveness(owner: Owner | None, ended: bool, signs: list[float], timeout_s: float, now: float) -> Liveness:
    """Return the state of a run's driver: running, ended or lost.

    Args:
        owner: the driver that owns the run; None if no driver has owned it yet.
        ended: True if the run's log says that the run ended.
        signs: times of the driver's signs of life, Unix seconds.
        timeout_s: the job's `failure.timeout_s`.
        now: present time, Unix seconds.
    """
    last = max([*signs, *([owner.started] if owner else [])], default=0.0)
    if ended:
        return Liveness("ended", "", last)
    if owner is None:
        return Liveness("lost", "no driver owns the run", last)
    if owner.is_here:
        gone = f"its driver, process {owner.pid} on {owner.host}, is gone"
        return Liveness("running", "", last) if owner.is_alive else Liveness("lost", gone, last)
    limit_s = HEARTBEAT_S + MOST_WAITS * timeout_s
    if now - last <= limit_s:
        return Liveness("running", "", last)
    return Liveness("lost", f"its driver on {owner.host} gave no sign of life for {now - last:.0f} s", last)
