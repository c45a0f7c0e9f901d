from __future__ import annotations

from dataclasses import replace

import pytest

from psgd.store.liveness import HEARTBEAT_S, Liveness, judge_liveness
from psgd.store.owner import Owner

TIMEOUT_S = 20.0
LIMIT_S = HEARTBEAT_S + 3 * TIMEOUT_S
HERE = replace(Owner.this_process(1), started=1000.0)
ELSEWHERE = replace(HERE, machine="elsewhere", host="far")
GONE = replace(HERE, process_start=-1)


def judged(owner: Owner | None, ended: bool = False, signs: tuple[float, ...] = (), now: float = 1000.0) -> Liveness:
    return judge_liveness(owner, ended, [*signs], TIMEOUT_S, now)


def test_a_run_that_says_that_it_ended_has_ended() -> None:
    assert judged(GONE, ended=True) == Liveness("ended", "", 1000.0)


def test_here_the_process_decides_however_long_it_was_silent() -> None:
    assert judged(HERE, now=1e9) == Liveness("running", "", 1000.0)
    lost = judged(GONE, signs=(1005.0, 1003.0), now=1006.0)
    assert (lost.status, lost.last_sign) == ("lost", 1005.0)
    assert lost.reason == f"its driver, process {GONE.pid} on {GONE.host}, is gone"


@pytest.mark.parametrize(("silent_s", "status"), [(0.0, "running"), (LIMIT_S, "running"), (LIMIT_S + 1, "lost")])
def test_elsewhere_silence_decides(silent_s: float, status: str) -> None:
    found = judged(ELSEWHERE, signs=(2000.0,), now=2000.0 + silent_s)
    assert (found.status, found.last_sign) == (status, 2000.0)
    assert found.reason == ("" if status == "running" else "its driver on far gave no sign of life for 71 s")


def test_a_run_that_nobody_owns_is_lost() -> None:
    assert judged(None).status == "lost"
