from __future__ import annotations

import pytest

from psgd.spec import AdamOptimizer, JobSpec, RunConfig, SgdOptimizer
from psgd.spec.places import Place, field_names, field_paths, models_of, tag_field, tags_of


@pytest.mark.parametrize(
    ("steps", "names"),
    [
        ((), ()),
        (("seed",), ("seed",)),
        (("optimizer", "adam", "betas", 0), ("optimizer", "betas", "0")),
        (("optimizer", "adam", "adam"), ("optimizer", "adam")),
        (("optimizer", "sgd", "schedule", "step", "every"), ("optimizer", "schedule", "every")),
        (("data", "csv", "label", "function-before[whole(), int]"), ("data", "label")),
        (("scaling", "workers", "range", "max"), ("scaling", "workers", "max")),
        (("simulate", "modes", 1, "consistency", "bsp", "s"), ("simulate", "modes", "1", "consistency", "s")),
        (("model", "python", "kwargs", 7, "[key]"), ("model", "kwargs", "7")),
    ],
)
def test_pydantics_path_becomes_the_names_in_the_file(steps: tuple[str | int, ...], names: tuple[str, ...]) -> None:
    assert Place.of(steps, JobSpec).names == names


def test_a_place_knows_the_chosen_member_of_a_union_and_the_others() -> None:
    place = Place.of(("optimizer", "adam", "momentum"), JobSpec)
    assert place.owners == (AdamOptimizer,)
    assert SgdOptimizer in place.siblings
    assert "betas" in place.known
    assert "momentum" not in place.known
    assert place.field is None


def test_a_place_knows_what_it_may_hold() -> None:
    place = Place.of(("optimizer",), JobSpec)
    assert place.options["adam"] is AdamOptimizer
    run = Place.of(("run",), JobSpec)
    assert (run.models, run.options) == ([RunConfig], {})


def test_all_fields_of_a_job_are_listed_the_outermost_first() -> None:
    paths = field_paths(JobSpec)
    assert paths.index("seed") < paths.index("optimizer.lr") < paths.index("optimizer.schedule.warmup")
    assert {"optimizer.learning_rate", "scaling.workers.max", "simulate.modes.lr", "data.label"} <= set(paths)


def test_a_class_is_chosen_by_a_tag_only_if_it_has_one() -> None:
    assert (tag_field(AdamOptimizer), tags_of(AdamOptimizer)) == ("name", ["adam"])
    assert (tag_field(JobSpec), tags_of(JobSpec)) == ("", [])
    assert [model.__name__ for model in models_of(RunConfig, "target")] == ["TargetConfig"]
    assert field_names(SgdOptimizer)[-1] == "learning_rate"
