from __future__ import annotations

import json
from typing import Any

import yaml

from psgd.spec import JobSpec
from psgd.spec.reader import load_spec


def test_validate_prints_the_job_with_every_default(psgd: Any) -> None:
    code, out, err = psgd("validate", "job.yaml", "--set", "scaling.workers=5")
    assert (code, err) == (0, "")
    assert JobSpec.model_validate(yaml.safe_load(out)) == load_spec("job.yaml", ["scaling.workers=5"])
    assert {"consistency", "checkpoint", "failure"} <= yaml.safe_load(out).keys()


def test_schema_is_that_of_the_job(psgd: Any) -> None:
    code, out, err = psgd("schema")
    assert (code, err) == (0, "")
    assert json.loads(out) == JobSpec.model_json_schema()
