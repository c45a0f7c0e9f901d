from __future__ import annotations

from math import inf, isnan

from psgd.core.server.tally import Tally
from psgd.jsontext import parse_json, to_json


def test_a_loss_that_is_not_finite_is_saved_as_unknown_and_read_back() -> None:
    """Check that a server continues from a checkpoint whose JSON has null in place of an infinite loss."""
    metadata = {
        "samples": 9,
        "counted": 9,
        "bytes": 0,
        "pushes": {},
        "staleness": [],
        "losses": [[0, inf, 4], [1, 2.0, 4]],
    }
    tally = Tally()
    tally.load(parse_json(to_json(metadata).encode(), "server-0.json"))
    losses = tally.epoch_losses()
    assert isnan(losses[0].mean)
    assert losses[1].mean == 0.5
    assert tally.state()["losses"][1] == [1, 2.0, 4]
