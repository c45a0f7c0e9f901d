"""Signals that are sent to a new process at moments that its script chooses: no test sleeps."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from psgd.interruption import Abandoned, Interruption, run_interruptibly

LIMIT_S = 60
PRELUDE = """
import os, signal, sys, threading
from psgd.interruption import Abandoned, Interruption, run_interruptibly

def send(number):
    os.kill(os.getpid(), number)

def wait_until_requested():
    if not requested.wait(30):
        raise TimeoutError("no signal was noticed")

class Watched(Interruption):
    def request(self, number):
        try:
            return super().request(number)
        finally:
            requested.set()

requested = threading.Event()
interruption = Watched()
"""
END = """
try:
    print("returned", run_interruptibly(work, interruption))
except Abandoned:
    print("abandoned")
    sys.stdout.flush()
    os._exit(130)
except KeyboardInterrupt:
    print("interrupted")
    sys.exit(130)
"""


def run_script(work: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a script with this function `work`, in a new process group."""
    command = [sys.executable, "-c", PRELUDE + work + END]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, start_new_session=True, check=False, **options
    )


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_work_that_leaves_nothing_behind_at_once(number: str) -> None:
    done = run_script(f"""
def work():
    interruption.outlook = "nothing was started"
    send(signal.{number})
    threading.Event().wait()
""")
    assert (done.returncode, done.stdout) == (130, "abandoned\n")
    assert done.stderr == "psgd: interrupted: nothing was started\n"


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_in_a_critical_section_waits_for_its_end(number: str) -> None:
    done = run_script(f"""
def work():
    with interruption.critical("the run is saved"):
        send(signal.{number})
        wait_until_requested()
        print("saved")
    return interruption.requested
""")
    assert (done.returncode, done.stdout) == (0, "saved\nreturned True\n")
    assert done.stderr == "psgd: interrupted: the run is saved. The same signal again ends psgd at once\n"


def test_the_same_signal_again_does_not_wait_and_another_one_does() -> None:
    done = run_script("""
def work():
    with interruption.critical("the run is saved"):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            requested.clear()
            send(number)
            wait_until_requested()
        threading.Event().wait()
""")
    assert (done.returncode, done.stdout) == (130, "abandoned\n")
    assert [line.endswith("at once") for line in done.stderr.splitlines()] == [True, True, False]


def test_work_ends_at_its_next_check_and_enters_no_critical_section() -> None:
    done = run_script("""
def work():
    with interruption.critical("a"):
        send(signal.SIGTERM)
        wait_until_requested()
        with interruption.critical("b"):
            print("inside")
    with interruption.critical("c"):
        print("never")
""")
    assert (done.returncode, done.stdout) == (130, "inside\ninterrupted\n")


def test_a_signal_during_a_fork_is_neither_lost_nor_leaves_a_lock_taken() -> None:
    """CPython drops an exception that a signal handler raises while a fork handler runs."""
    done = run_script("""
import logging

def at_fork():
    send(signal.SIGINT)
    wait_until_requested()

def work():
    os.register_at_fork(before=at_fork)
    with interruption.critical("Ray is stopped"):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        taken = threading.Thread(target=lambda: logging.getLogger("free").warning("logged"))
        taken.start()
        taken.join(30)
        print("lock", "taken" if taken.is_alive() else "free")
    interruption.check()
""")
    assert (done.returncode, done.stdout) == (130, "lock free\ninterrupted\n")
    assert "Exception ignored" not in done.stderr
    assert "logged" in done.stderr


def test_a_forked_child_dies_of_its_own_signals_and_its_parent_hears_of_none() -> None:
    done = run_script("""
def work():
    child = os.fork()
    if child == 0:
        send(signal.SIGTERM)
        threading.Event().wait()
    return os.WTERMSIG(os.waitpid(child, 0)[1]), interruption.requested
""")
    assert (done.returncode, done.stdout) == (0, "returned (15, False)\n")


def test_a_handler_that_a_library_installs_cannot_end_the_work() -> None:
    """`ray.init` installs a handler for SIGTERM, but only in the main thread."""
    done = run_script("""
def work():
    with interruption.critical("a"):
        try:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
        except ValueError:
            print("refused")
        send(signal.SIGTERM)
        wait_until_requested()
""")
    assert (done.returncode, done.stdout) == (0, "refused\nreturned None\n")


def test_a_handler_that_a_library_installs_beneath_python_is_replaced() -> None:
    """Ray's core installs a handler for SIGTERM that aborts the process, without Python's knowledge."""
    done = run_script("""
import ctypes, time

def is_ignored():
    (mask,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("SigIgn")]
    return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)

def work():
    with interruption.critical("a"):
        ctypes.CDLL(None).signal(ctypes.c_int(signal.SIGTERM), ctypes.c_void_p(1))
        assert is_ignored()
        deadline = time.monotonic() + 30
        while is_ignored() and time.monotonic() < deadline:
            time.sleep(0.01)
        send(signal.SIGTERM)
        wait_until_requested()
""")
    assert (done.returncode, done.stdout) == (0, "returned None\n"), done.stderr


def test_signals_that_were_ignored_stay_ignored() -> None:
    done = run_script(
        """
def work():
    send(signal.SIGHUP)
    return interruption.requested
""",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "returned False\n", "")


def test_a_closed_terminal_is_written_to_no_more(tmp_path: Path) -> None:
    main, terminal = pty.openpty()
    told = tmp_path / "told"
    script = f"""
def work():
    with interruption.critical("the run is saved"):
        print("working", flush=True)
        wait_until_requested()
        print("this goes nowhere", flush=True)
        print("nor does this", file=sys.stderr, flush=True)
        open({str(told)!r}, "w").write("saved")
"""
    take_terminal = f"import fcntl, termios; fcntl.ioctl(2, termios.TIOCSCTTY, 0)\n{PRELUDE}{script}{END}"
    with subprocess.Popen(
        [sys.executable, "-c", take_terminal], stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True
    ) as process:
        os.close(terminal)
        assert b"working" in os.read(main, 100)
        os.close(main)  # the kernel sends SIGHUP
        assert process.wait(LIMIT_S) == 0
    assert told.read_text() == "saved"


def test_what_work_returns_and_raises_goes_through() -> None:
    assert run_interruptibly(lambda: 7, Interruption()) == 7
    with pytest.raises(ZeroDivisionError):
        run_interruptibly(lambda: 1 // 0, Interruption())
    with pytest.raises(SystemExit, match="3"):
        run_interruptibly(lambda: sys.exit(3), Interruption())


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    run_interruptibly(lambda: None, Interruption())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_outside_the_main_thread_work_runs_where_it_is() -> None:
    seen: list[bool] = []
    thread = threading.Thread(
        target=lambda: run_interruptibly(lambda: seen.append(threading.current_thread() is thread), Interruption())
    )
    thread.start()
    thread.join(LIMIT_S)
    assert seen == [True]


def test_abandoned_work_is_a_keyboard_interrupt() -> None:
    assert issubclass(Abandoned, KeyboardInterrupt)
