from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from psgd.cluster.run import _unless_taken_over, train
from psgd.core.driver.events import Change, Finish
from psgd.errors import RunExistsError, SpecError
from psgd.spec import JobSpec
from psgd.spec.changes import change_settings
from tests.support.recorded_run import digits, record, run_directory


def resume(folder: Path, spec: JobSpec) -> Any:
    """Resume the run `run`. The tests expect a refusal before Ray is started."""
    return train(spec, name="run", storage=str(folder), resume=True, progress=False)


def test_settings_of_a_run_must_go_with_the_scaling_it_is_resumed_with(tmp_path: Path) -> None:
    change = Change(change_settings(digits(), ["consistency.mode=bsp"]).settings)
    record(run_directory(tmp_path), digits(), events=[(1.5, change)])
    with pytest.raises(SpecError, match=r"settings of checkpoint .*\n.*pipeline is 1, but mode bsp makes workers wait"):
        resume(tmp_path, digits(scaling={"workers": 2, "pipeline": 1}))


def test_more_servers_than_values_are_refused(tmp_path: Path) -> None:
    data = {"format": "sklearn", "dataset": "iris"}
    spec = digits(model={"kind": "linear"}, data=data, scaling={"servers": 16})
    with pytest.raises(SpecError, match=r"scaling\.servers is 16, but the model has 15 parameters"):
        train(spec, name="run", storage=str(tmp_path), progress=False)


def test_a_mapping_is_checked_like_a_job_file(tmp_path: Path) -> None:
    wrong = digits().model_dump(exclude_unset=True) | {"optimizer": {"learning": 0.1}}
    with pytest.raises(SpecError, match=r"optimizer\.learning: unknown field; did you mean 'learning_rate'"):
        train(wrong, storage=tmp_path)


def test_a_folder_may_be_a_path(tmp_path: Path) -> None:
    spec = digits()
    record(run_directory(tmp_path), spec)
    with pytest.raises(RunExistsError, match=f"there is a run in {tmp_path}/run already"):
        train(spec.model_dump(exclude_unset=True), name="run", storage=tmp_path)


def test_ctrl_c_ends_training_that_has_not_begun_with_a_keyboard_interrupt(tmp_path: Path) -> None:
    """The script calls `train` in its main thread, and its own signal handlers are restored afterwards."""
    script = f"""
import os, signal, threading
import psgd, psgd.cluster.run as run

def block(*arguments):
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait()

run.OpenJob.open = block
data = {{"format": "sklearn", "dataset": "iris"}}
spec = psgd.JobSpec(model={{"kind": "linear"}}, data=data, optimizer={{"lr": 0.1}}, run={{"epochs": 1}})
try:
    psgd.train(spec, storage={str(tmp_path)!r})
except KeyboardInterrupt as error:
    print(error, signal.getsignal(signal.SIGINT) is signal.default_int_handler, flush=True)
os._exit(0)
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout == "interrupted: nothing was started True\n"
    assert told.stderr == "psgd: interrupted: nothing was started\n"
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_another_driver_took_over_ended_for_that_reason(tmp_path: Path) -> None:
    """A server that is started then sees another owner, as if it did not share the driver's storage."""
    run = run_directory(tmp_path)
    run.take_over(None)
    blamed = Finish("failed", "the server's machine does not see the driver's files")
    assert _unless_taken_over(run, blamed) == blamed
    later = run_directory(tmp_path)
    later.take_over(run.owned_by)
    ended = _unless_taken_over(run, blamed)
    assert ended.status == "failed"
    assert "was taken over by process" in str(ended.error)
    assert "machine" not in str(ended.error)
    assert not run.is_ours
    told = Finish("failed", f"{ended.error}; nothing is saved")
    assert _unless_taken_over(run, told) == told


def test_while_the_owner_cannot_be_read_the_run_ends_as_it_would(tmp_path: Path) -> None:
    run = run_directory(tmp_path)
    run.take_over(None)
    run.storage.write("owner", b"{")
    assert _unless_taken_over(run, Finish("finished", None)) == Finish("finished", None)
    assert run.is_ours
