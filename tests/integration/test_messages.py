"""Runs in which Ray loses its own messages and answers, by the setting `RAY_testing_rpc_failure`."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import mkdtemp

import pytest

from tests.support.command_line import DIGITS, CommandLine, recorded

BATCHES = 90
EXAMPLES = 1438
EPOCHS = 6
# Percentages of the calls to actors that do not arrive, and of those whose answer does not arrive.
LOST = {"CoreWorkerService.grpc_client.PushTask": {"num_failures": -1, "req_failure_prob": 1, "resp_failure_prob": 1}}


@pytest.mark.timeout(240)
def test_calls_and_answers_that_are_lost_change_no_epoch(
    tmp_path: Path, ray_home: Path, environment: dict[str, str]
) -> None:
    environment |= {"RAY_TMPDIR": mkdtemp(dir=ray_home), "RAY_AUTH_MODE": "disabled"}
    psgd = CommandLine(environment, tmp_path, limit_s=200.0)
    settings = [f"run.epochs={EPOCHS}", "scaling.lane=ray", "failure.max_failures=-1", "checkpoint.every_s=0.5"]
    settings.append("failure.timeout_s=10")  # a call to start a server that is lost costs this time
    arguments = [word for setting in settings for word in ("--set", setting)]
    done = psgd.run("train", DIGITS, "--json", "--name", "run", *arguments, RAY_testing_rpc_failure=json.dumps(LOST))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["status"], result["epochs"], result["samples"]) == ("finished", EPOCHS, EPOCHS * EXAMPLES)
    assert result["ledger"]["batches"] == result["ledger"]["applied"] == EPOCHS * BATCHES
    assert result["failures"] or recorded(tmp_path / "runs" / "run", "lane_failed")
