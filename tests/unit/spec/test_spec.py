from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from psgd.spec import (
    AdagradOptimizer,
    AdamOptimizer,
    AdamwOptimizer,
    CheckpointConfig,
    ConstantSchedule,
    DelayedNesterovOptimizer,
    FailureConfig,
    JobSpec,
    OptimizerSpec,
    RunConfig,
    SgdOptimizer,
    StepSchedule,
    TargetConfig,
)

MINIMAL: dict[str, Any] = {
    "model": {"kind": "linear"},
    "data": {"format": "sklearn", "dataset": "iris"},
    "optimizer": {"lr": 0.1},
    "run": {"epochs": 1},
}


def spec(**changes: Any) -> JobSpec:
    return JobSpec.model_validate(MINIMAL | changes)


def test_a_minimal_job_is_asynchronous_on_two_workers() -> None:
    job = spec()
    assert job.consistency.mode == "async"
    assert (job.scaling.workers, job.scaling.servers, job.scaling.pipeline, job.seed) == (2, 1, 0, 0)
    assert (job.scaling.lane, job.scaling.ports) == ("auto", None)
    assert job.optimizer == SgdOptimizer(lr=0.1, momentum=0.0)
    assert (job.checkpoint, job.failure) == (CheckpointConfig(), FailureConfig())


@pytest.mark.parametrize("part", list(MINIMAL))
def test_every_part_of_a_minimal_job_is_needed(part: str) -> None:
    with pytest.raises(ValidationError, match=part):
        JobSpec.model_validate({name: value for name, value in MINIMAL.items() if name != part})


def test_a_job_is_frozen() -> None:
    job = spec()
    for part, field in [(job, "seed"), (job.optimizer, "lr"), (job.run, "epochs"), (job.data, "batch_size")]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, field, 3)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("seed", -1),
        ("seed", 2**63),
        ("name", "a/b"),
        ("name", ".hidden"),
        ("name", "x" * 64),
        ("version", 2),
        ("optimizer", {"lr": 0}),
        ("optimizer", {"lr": float("nan")}),
        ("optimizer", {"lr": 1, "momentum": 1}),
        ("optimizer", {"lr": 1, "dampening": 1}),
        ("optimizer", {"lr": 1, "weight_decay": -1}),
        ("optimizer", {"lr": 1, "max_grad_norm": 0}),
        ("optimizer", {"lr": 1, "clip_value": 0}),
        ("optimizer", {"lr": 1, "name": "adamm"}),
        ("optimizer", {"lr": 1, "name": None}),
        ("optimizer", {"lr": 1, "name": "adam", "momentum": 0.9}),
        ("optimizer", {"lr": 1, "name": "adam", "amsgrad": True}),
        ("optimizer", {"lr": 0, "name": "adam"}),
        ("optimizer", {"lr": 1, "name": "adam", "betas": [0.9, 1]}),
        ("optimizer", {"lr": 1, "name": "adamw", "betas": [-0.1, 0.9]}),
        ("optimizer", {"lr": 1, "name": "adamw", "betas": [0.9]}),
        ("optimizer", {"lr": 1, "name": "adagrad", "eps": 0}),
        ("optimizer", {"lr": 1, "name": "adagrad", "initial_accumulator_value": -1}),
        ("optimizer", {"lr": 1, "name": "delayed_nesterov"}),
        ("optimizer", {"lr": 1, "name": "delayed_nesterov", "every": 0}),
        ("optimizer", {"lr": 1, "name": "delayed_nesterov", "every": 2, "momentum": 1}),
        ("optimizer", {"lr": 1, "schedule": {"name": "cosin"}}),
        ("optimizer", {"lr": 1, "schedule": {"warmup": -1}}),
        ("optimizer", {"lr": 1, "schedule": {"name": "step"}}),
        ("optimizer", {"lr": 1, "schedule": {"name": "step", "every": 0}}),
        ("optimizer", {"lr": 1, "schedule": {"name": "step", "every": 1, "factor": 0}}),
        ("optimizer", {"lr": 1, "schedule": {"name": "cosine"}}),
        ("optimizer", {"lr": 1, "schedule": {"name": "cosine", "epochs": 0}}),
        ("optimizer", {"lr": 1, "schedule": {"name": "cosine", "epochs": 1, "final": 1.1}}),
        ("consistency", {"mode": "lockstep"}),
        ("consistency", {"mode": "async", "slack": 1}),
        ("scaling", {"workers": 0}),
        ("scaling", {"workers": 4097}),
        ("scaling", {"cpus_per_worker": 0}),
        ("scaling", {"gpus_per_worker": -1}),
        ("scaling", {"servers": 0}),
        ("scaling", {"servers": 65}),
        ("scaling", {"pipeline": -1}),
        ("scaling", {"pipeline": 3}),
        ("scaling", {"lane": "udp"}),
        ("scaling", {"ports": [1023, 2000]}),
        ("scaling", {"ports": [2000, 65536]}),
        ("scaling", {"ports": [2000]}),
        ("run", {"epochs": 0}),
        ("run", {"max_updates": 0}),
        ("run", {"max_time_s": 0}),
        ("run", {"epochs": 1, "storage": ""}),
        ("run", {"epochs": 1, "target": {"metric": "accuracy", "value": 1}}),
        ("checkpoint", {"every_s": 0}),
        ("checkpoint", {"every_updates": 0}),
        ("checkpoint", {"keep": 0}),
        ("failure", {"max_failures": -2}),
        ("failure", {"max_rejected": -1}),
        ("failure", {"timeout_s": 0}),
        ("failure", {"start_timeout_s": -1}),
    ],
)
def test_values_out_of_bounds_are_refused(section: str, values: Any) -> None:
    with pytest.raises(ValidationError):
        spec(**{section: values})


# Fields that depend on each other


@pytest.mark.parametrize("wrong", [{}, {"momentum": 0.9, "dampening": 0.1}])
def test_nesterov_needs_plain_momentum(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="nesterov needs momentum above 0 and dampening 0"):
        SgdOptimizer.model_validate({"lr": 0.1, "nesterov": True} | wrong)
    assert SgdOptimizer(lr=0.1, nesterov=True, momentum=0.9).nesterov


def test_a_run_must_end() -> None:
    target = {"metric": "val/loss", "value": 0.1}
    with pytest.raises(ValidationError, match="give at least one of epochs, max_updates, max_time_s"):
        RunConfig.model_validate({"target": target})
    for limit in ("epochs", "max_updates", "max_time_s"):
        assert RunConfig.model_validate({limit: 1, "target": target})


def test_cuda_needs_a_gpu() -> None:
    model = {"kind": "torch", "path": "models:net", "device": "cuda"}
    with pytest.raises(ValidationError, match="give each worker a GPU"):
        spec(model=model)
    assert spec(model=model, scaling={"gpus_per_worker": 0.5})
    assert spec(model=model | {"device": "auto"})


def test_ports_are_a_range_with_one_for_each_server() -> None:
    with pytest.raises(ValidationError, match=r"ports is \[2002, 2000\]: expected .* the lower number first"):
        spec(scaling={"ports": [2002, 2000]})
    with pytest.raises(ValidationError, match=r"ports \[2000, 2002\] has 3 ports, but all 4 servers .*: widen"):
        spec(scaling={"ports": [2000, 2002], "servers": 4})
    assert spec(scaling={"ports": [2000, 2002], "servers": 3}).scaling.ports == (2000, 2002)


def test_a_validation_part_is_named_whole_and_once() -> None:
    data = {"format": "npz", "path": "mnist.npz"}
    for wrong in (
        {"validation_features": "x"},
        {"validation_labels": "y"},
        {"validation_features": "x", "validation_labels": "y", "validation_fraction": 0.1},
    ):
        with pytest.raises(ValidationError, match="validation_features and validation_labels"):
            spec(data=data | wrong)
    assert spec(data=data | {"validation_features": "x", "validation_labels": "y"})


def test_a_label_by_name_needs_a_header() -> None:
    data = {"format": "csv", "path": "table.csv", "header": False}
    with pytest.raises(ValidationError, match="give the column's number"):
        spec(data=data | {"label": "price"})
    assert spec(data=data | {"label": 3})
    assert spec(data={"format": "csv", "path": "table.csv", "label": "price"})


def test_the_learning_rate_has_two_names_and_one_value() -> None:
    assert SgdOptimizer.model_validate({"learning_rate": 0.5}).lr == 0.5
    with pytest.raises(ValidationError):
        SgdOptimizer.model_validate({"lr": 0.5, "learning_rate": 0.5})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"name": "sgd"}, SgdOptimizer(lr=1)),
        ({"name": "adagrad"}, AdagradOptimizer(name="adagrad", lr=1)),
        ({"name": "adam"}, AdamOptimizer(name="adam", lr=1)),
        ({"name": "adamw"}, AdamwOptimizer(name="adamw", lr=1)),
        ({"name": "delayed_nesterov", "every": 3}, DelayedNesterovOptimizer(name="delayed_nesterov", lr=1, every=3)),
        ({"schedule": {"warmup": 2}}, SgdOptimizer(lr=1, schedule=ConstantSchedule(warmup=2))),
        (
            {"schedule": {"name": "step", "every": 0.5}},
            SgdOptimizer(lr=1, schedule=StepSchedule(name="step", every=0.5)),
        ),
    ],
)
def test_optimizers_and_schedules_go_by_their_name(values: dict[str, Any], expected: OptimizerSpec) -> None:
    job = spec(optimizer={"learning_rate": 1} | values)
    assert job.optimizer == expected
    assert JobSpec.model_validate_json(job.model_dump_json()) == job
    assert spec(optimizer=expected) == job


@pytest.mark.parametrize(
    ("values", "loc"),
    [
        ({"lr": 0}, ("sgd", "lr")),
        ({"lr": 1, "name": "adamw", "eps": 0}, ("adamw", "eps")),
        ({"lr": 1, "schedule": {"name": "cosine"}}, ("sgd", "schedule", "cosine", "epochs")),
    ],
)
def test_a_fault_inside_an_optimizer_is_located_by_its_name(values: dict[str, Any], loc: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError) as refused:
        spec(optimizer=values)
    assert [error["loc"] for error in refused.value.errors()] == [("optimizer", *loc)]


@pytest.mark.parametrize(
    ("metric", "value", "reached"),
    [("val/accuracy", 0.9, True), ("val/accuracy", 0.89, False), ("val/loss", 0.9, True), ("train/loss", 0.91, False)],
)
def test_accuracy_is_to_rise_and_losses_are_to_fall(metric: Any, value: float, reached: bool) -> None:
    assert TargetConfig(metric=metric, value=0.9).reached(value) is reached


# Identity


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"scaling": {"workers": 9}},
        {"scaling": {"servers": 2, "pipeline": 1, "lane": "tcp", "ports": [2000, 2001]}},
        {"run": {"max_time_s": 3}},
        {"checkpoint": {"keep": 9}},
        {"failure": {"max_failures": -1}},
        {"optimizer": {"learning_rate": 0.1}},
    ],
)
def test_a_resumed_run_may_change_what_its_weights_do_not_depend_on(change: dict[str, Any]) -> None:
    assert spec(**change).identity_hash() == spec().identity_hash()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"model": {"kind": "mlp"}},
        {"data": {"format": "sklearn", "dataset": "iris", "batch_size": 8}},
        {"optimizer": {"lr": 0.2}},
        {"consistency": {"mode": "bsp"}},
    ],
)
def test_but_not_what_they_do_depend_on(change: dict[str, Any]) -> None:
    assert spec(**change).identity_hash() != spec().identity_hash()


def test_where_the_data_lies_is_no_part_of_a_job_and_how_it_is_cut_is() -> None:
    data = {"format": "csv", "path": "here.csv"}
    known = spec(data=data)
    assert spec(data=data | {"path": "s3://there/data.csv"}).identity_hash() == known.identity_hash()
    for change in ({"drop_last": True}, {"label": 0}, {"header": True}, {"num_shards": 2}):
        assert spec(data=data | change).identity_hash() != known.identity_hash()


def test_a_job_survives_the_way_to_json_and_back() -> None:
    job = spec(model={"kind": "mlp", "hidden": [8, 4]}, consistency={"mode": "bsp"}, name="x")
    assert JobSpec.model_validate_json(job.model_dump_json()) == job


# Schema


def properties(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every field of a JSON schema, including nested fields."""
    for title, definition in {"JobSpec": schema, **schema["$defs"]}.items():
        for name, field in definition["properties"].items():
            yield f"{title}.{name}", field


def test_the_json_schema_describes_every_field() -> None:
    schema = JobSpec.model_json_schema()
    fields = dict(properties(schema))
    assert len(fields) > 50
    assert [name for name, field in fields.items() if not field.get("description")] == []
    assert "lr" in schema["$defs"]["SgdOptimizer"]["properties"]
