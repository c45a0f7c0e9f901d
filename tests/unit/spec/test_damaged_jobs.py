"""Damaged copies of the sample jobs, drawn by a seed: each is refused with a sentence, or is a valid job."""

from __future__ import annotations

from pathlib import Path

import pytest

from psgd.spec import JobSpec
from psgd.spec.reader import load_spec
from tests.support.fuzzing import check_reader
from tests.support.mutations import mutations

JOBS = sorted((Path(__file__).parents[3] / "deploy" / "jobs").glob("*.yaml"))


@pytest.mark.parametrize("number", [300, pytest.param(10_000, marks=[pytest.mark.chaos, pytest.mark.timeout(2_400)])])
def test_a_damaged_job_file_is_refused_or_is_a_job(tmp_path: Path, number: int) -> None:
    path = tmp_path / "job.yaml"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        job = load_spec(path)
        assert JobSpec.model_validate_json(job.model_dump_json()) == job

    assert JOBS
    for job in JOBS:
        share = -(-number // len(JOBS))
        num_read, num_refused = check_reader(read, mutations(job.read_bytes(), share, seed=3))
        assert num_read + num_refused == share
        assert num_refused > share / 4
