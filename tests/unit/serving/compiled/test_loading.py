from __future__ import annotations

import logging
import os
import subprocess
import sys

import numpy as np
import pytest

from psgd.core.server.parameter_server import ParameterServer
from psgd.core.server.partitions import Partition
from psgd.serving.compiled.loading import SWITCH, load_path
from psgd.serving.server_lock import ServerLock
from psgd_workers.messages import EpochGrid, Version
from tests.support.jobs import job


def server() -> ParameterServer:
    return ParameterServer(job(), Partition(0, 0, 3, 3), np.zeros(3, np.float32), EpochGrid((9,), 9), Version(1, 0))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_it_is_switched_off_with_one_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(SWITCH, "0")
    assert load_path(server(), ServerLock()) is None
    assert warnings_of(caplog) == [f"the push path is not compiled, so pushes take longer: {SWITCH} is 0"]


def test_without_numba_one_warning_names_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    for name in [name for name in sys.modules if name.startswith("psgd.serving.compiled.") and "loading" not in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "numba", None)
    assert load_path(server(), ServerLock()) is None
    (warning,) = warnings_of(caplog)
    assert "Numba cannot be imported" in warning
    assert "Install numba" in warning


def test_on_another_system_one_warning_names_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert load_path(server(), ServerLock()) is None
    assert warnings_of(caplog) == [
        "the push path is not compiled, so pushes take longer: it needs Linux, and this is darwin"
    ]


def test_only_a_process_that_compiles_imports_numba() -> None:
    code = "import sys, psgd.serving.host, psgd_workers.worker; sys.exit('numba' in sys.modules)"
    path = os.pathsep.join(path for path in sys.path if path)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=os.environ | {"PYTHONPATH": path})
