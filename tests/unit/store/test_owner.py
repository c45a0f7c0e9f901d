from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from psgd.store import owner as module
from psgd.store.owner import Owner, this_machine


def test_this_process_is_here_and_alive() -> None:
    owner = Owner.this_process(1)
    assert (owner.is_here, owner.is_alive, owner.incarnation) == (True, True, 1)
    assert owner.driver != Owner.this_process(1).driver


def test_a_process_that_has_ended_is_gone_even_before_it_is_waited_for() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        owner = replace(Owner.this_process(1), pid=process.pid, process_start=module._start_ticks(process.pid))
        living = owner.is_alive
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # wait for its end without reaping it
        assert (living, owner.is_alive) == (True, False)
    assert not owner.is_alive


def test_another_process_with_the_same_number_is_not_the_driver() -> None:
    owner = Owner.this_process(1)
    assert owner.process_start is not None
    assert not replace(owner, process_start=owner.process_start - 1).is_alive


def test_a_driver_on_another_machine_is_not_here() -> None:
    assert not replace(Owner.this_process(1), machine="elsewhere").is_here
    assert this_machine() == this_machine()


def test_a_process_whose_name_looks_like_a_line_of_its_own_is_read_right(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = " ".join(["S", *("0" for _ in range(18)), "4711", "0"])
    monkeypatch.setattr(module, "_read", lambda path: f"7 (a) Z 1 (b) {fields}")
    assert module._start_ticks(7) == 4711
