from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

from psgd.store.storage import Storage


@pytest.fixture(params=["local", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Return the folder of a run: on a disk, then in an object store."""
    return Storage(str(tmp_path / "run") if request.param == "local" else f"memory://{uuid4().hex}/run")
