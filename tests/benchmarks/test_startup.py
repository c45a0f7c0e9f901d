"""Tests of the time of the first applied gradient, and of the figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from psgd.cluster import session
from psgd.core.server.journal import Journal, RecordKind
from psgd.spec import JobSpec
from psgd_workers.messages import BatchId, Outcome, Version
from tests.benchmarks.peers.psgd_job import job
from tests.benchmarks.startup import OPTIONS, STAGES, findings, first_applied
from tests.support.jobs import push


def test_the_first_push_that_was_applied_counts(tmp_path: Path) -> None:
    journal = Journal()
    journal.member(RecordKind.JOIN, 10.0, "worker-0", Version(1, 0))
    for now, outcome in ((11.0, Outcome.REQUEUED), (12.5, Outcome.APPLIED), (13.0, Outcome.APPLIED)):
        journal.push(now, push(BatchId(0, 0, int(now)), Version(1, 0)), outcome, Version(1, 1))
    records = journal.take()
    (tmp_path / "journal").mkdir()
    np.save(tmp_path / "journal" / "000001-1-server-0.npy", records[:3])
    np.save(tmp_path / "journal" / "000002-1-server-0.npy", records[3:])
    assert first_applied(tmp_path) == 12.5


def test_what_ray_takes_is_subtracted_turn_by_turn() -> None:
    beyond, *_ = findings({"psgd": [7.0, 8.0, 6.0], "ray": [5.0, 5.5, 5.0], **{stage: [1.0] for stage in STAGES}})
    assert (beyond.value, beyond.turns, beyond.met) == (2.0, (2.0, 2.5, 1.0), True)


def test_ray_alone_is_started_as_psgd_starts_it() -> None:
    assert session._local_options(JobSpec.model_validate(job(1.0))) == OPTIONS
