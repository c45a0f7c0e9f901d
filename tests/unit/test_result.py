from __future__ import annotations

import json

from psgd.result import LedgerCounts, Result


def test_a_result_is_plain_values_in_the_order_of_its_fields() -> None:
    counts = LedgerCounts(batches=12, applied=12, duplicates=1, requeued=3, discarded=0)
    result = Result(
        status="finished",
        name="iris",
        path="runs/iris",
        epochs=3,
        updates=12,
        samples=360,
        duration_s=1.5,
        metrics={"train/loss": 0.5, "val/accuracy": None},
        ledger=counts,
        failures={"worker_lost": 1},
        goodput=0.9,
        checkpoint="000001-1",
        error=None,
    )
    plain = result.to_dict()
    assert list(plain) == list(Result.__dataclass_fields__)
    assert plain["ledger"] == {"batches": 12, "applied": 12, "duplicates": 1, "requeued": 3, "discarded": 0}
    assert json.loads(json.dumps(plain)) == plain
