from __future__ import annotations

from psgd.spec import JobSpec
from psgd.spec.places import field_paths
from psgd.spec.synonyms import FIELDS, VALUES


def test_every_synonym_is_of_a_field_or_a_value_of_ours() -> None:
    ours = {path.rpartition(".")[2] for path in field_paths(JobSpec)}
    assert set(FIELDS.values()) <= ours
    schema = str(JobSpec.model_json_schema())
    assert [value for value in VALUES.values() if repr(value) not in schema] == []


def test_synonyms_are_written_as_they_are_looked_up() -> None:
    for name in (*FIELDS, *VALUES):
        assert name == name.lower().replace("-", "_")
