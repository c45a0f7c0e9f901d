from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from psgd.errors import SpecError
from psgd.spec import JobSpec
from psgd.spec.places import field_paths, models_of
from psgd.spec.reader import parse_spec, with_setting
from psgd.spec.yaml_values import read_yaml

JOB: dict[str, Any] = {
    "model": {"kind": "linear"},
    "data": {"format": "csv", "path": "table.csv"},
    "optimizer": {"lr": 0.1},
    "run": {"epochs": 1},
}


def said(text: str) -> str:
    """Return the error message for a job with these sections."""
    with pytest.raises(SpecError) as refused:
        parse_spec(JOB | read_yaml(text, "it"), "it")
    first, *lines = str(refused.value).splitlines()
    assert first == "it is not a valid job:"
    return " | ".join(line.removeprefix("  ") for line in lines)


ANSWERS = r"""
# A boolean is neither a number nor a name
$ data: {format: csv, path: a, label: yes}
    data.label: expected text or a whole number, not true: YAML reads yes, on and true without quotes as true;
    for the text, write it in quotes, such as 'yes'
$ optimizer: {lr: 1, weight_decay: true}
    optimizer.weight_decay: expected a number, not true: YAML reads yes, on and true without quotes as true
$ run: {epochs: on}
    run.epochs: expected a whole number, not true: YAML reads yes, on and true without quotes as true
$ run: {epochs: off}
    run.epochs: expected a whole number, not false: YAML reads no, off and false without quotes as false
$ model: {kind: mlp, hidden: [true]}
    model.hidden.0: expected a whole number, not true: YAML reads yes, on and true without quotes as true
$ scaling: {workers: {max: yes}}
    scaling.workers.max: expected a whole number, not true: YAML reads yes, on and true without quotes as true
$ name: no
    name: expected text, not false: YAML reads no, off and false without quotes as false; for the text, write it
    in quotes, such as 'no'
$ version: yes
    version: expected 1, not true
$ scaling: {lane: no}
    scaling.lane: expected one of auto, shm, tcp, ray, not false: YAML reads no, off and false without quotes as false
# A number is neither a boolean nor a name
$ data: {format: csv, path: a, header: 0}
    data.header: expected true or false, not 0
$ optimizer: {lr: 1, nesterov: 'yes'}
    optimizer.nesterov: expected true or false, not 'yes'; write it without quotes
$ name: 2024
    name: expected text, not 2024; for the text, write it in quotes, '2024'
$ name: 1.10
    name: expected text, not 1.1; for the text, write it in quotes
$ name: my job
    name: expected at most 63 letters, digits, dots, underscores and hyphens, beginning with a letter or a
    digit, not 'my job'
# Numbers
$ optimizer: {lr: '0.1'}
    optimizer.lr: expected a number, not '0.1'; write it without quotes
$ optimizer: {lr: [0,1]}
    optimizer.lr: expected a number, not [0, 1]
$ optimizer: {lr: "0,1"}
    optimizer.lr: expected a number, not '0,1'; a decimal has a point, 0.1
$ optimizer: {lr: 2001-99-99}
    optimizer.lr: expected a number, not '2001-99-99'
$ optimizer: {lr: -1}
    optimizer.lr: expected a number above 0, not -1
$ optimizer: {lr: }
    optimizer.lr: expected a number, not null; give a value
$ run: {epochs: 2.5}
    run.epochs: expected a whole number, not 2.5
$ scaling: {servers: 100}
    scaling.servers: expected at most 64, not 100
$ scaling: {workers: auto}
    scaling.workers: expected a whole number, not 'auto'; for example workers: 4 or workers: {min: 2, max: 8}
# Sections
$ optimizer: adam
    optimizer: expected fields, not 'adam'; write optimizer: {name: adam, lr: ...}
$ optimizer: {lr: 1, schedule: cosine}
    optimizer.schedule: expected fields, not 'cosine'; write schedule: {name: cosine, epochs: ...}
$ optimizer: 0.1
    optimizer: expected fields, not 0.1; for example optimizer: {name: sgd, lr: 0.1}
$ optimizer:
    optimizer: empty; give its fields, for example optimizer: {name: sgd, lr: 0.1}
$ scaling:
    scaling: empty; give its fields, for example scaling: {workers: 4}, or leave it out
$ model: mlp
    model: expected fields, not 'mlp'; write model: {kind: mlp}
$ data: iris
    data: expected fields, not 'iris'; write data: {format: sklearn, dataset: iris}
$ data: mnist.npz
    data: expected fields, not 'mnist.npz'; write data: {format: npz, path: mnist.npz}
$ consistency: sync
    consistency: expected fields, not 'sync'; write consistency: {mode: bsp}
$ run: {epochs: 1, target: 0.9}
    run.target: expected fields, not 0.9; for example target: {metric: val/accuracy, value: 0.97}
$ model: {type: mlp}
    model: missing 'kind', which says what the other fields mean: one of linear, mlp, python, torch; write kind
    in place of type
# Lists
$ model: {kind: mlp, hidden: 32}
    model.hidden: expected a list, not 32; write [32]
$ model: {kind: mlp, hidden: '32'}
    model.hidden: expected a list, not '32'; write [32]
$ model: {kind: mlp, hidden: []}
    model.hidden: expected a list of at least 1, not []
$ optimizer: {name: adam, lr: 1, betas: 0.9}
    optimizer.betas: expected a list, not 0.9; for example betas: [0.9, 0.999]
$ scaling: {ports: 2000}
    scaling.ports: expected a list, not 2000; for example ports: [20000, 20100]
# Values of a choice
$ optimizer: {name: SGD, lr: 1}
    optimizer.name: expected one of sgd, adagrad, adam, adamw, delayed_nesterov, not 'SGD'; did you mean 'sgd'?
$ consistency: {mode: sync}
    consistency.mode: expected one of async, backup, bsp, buffered, k_sync, local, malenia, rennala, ringleader,
    ringmaster, softsync, ssp, not 'sync'; did you mean 'bsp'?
$ model: {kind: mlp, activation: ReLU}
    model.activation: expected one of relu, tanh, gelu, not 'ReLU'; did you mean 'relu'?
$ model: {kind: linear, loss: mean_squared_error}
    model.loss: expected one of cross_entropy, mse, binary_cross_entropy, not 'mean_squared_error'; did you mean
    'mse'?
# Unknown fields
$ optimizer: {lr: 1, learning_rate: 1}
    optimizer.learning_rate: unknown field; lr and learning_rate mean the same: give one of them
$ optimizer: {kind: adam, lr: 1}
    optimizer.kind: unknown field; did you mean 'name'?
$ optimizer: {lr: 1, betas: [0, 0]}
    optimizer.betas: unknown field; betas is a field of optimizer adam and adamw, not of sgd
$ consistency: {mode: async, s: 3}
    consistency.s: unknown field; s is a field of consistency malenia, rennala, softsync and ssp, not of async
$ run: {epochs: 1, max_steps: 3}
    run.max_steps: unknown field; did you mean 'max_updates'?
$ run: {epochs: 1, max_time: 3}
    run.max_time: unknown field; did you mean 'max_time_s'?
$ run: {epochs: 1, lr: 3}
    run.lr: unknown field; did you mean 'optimizer.lr'?
$ run: {epochs: 1, seed: 3}
    run.seed: unknown field; 'seed' belongs to the top level of the job
$ epochs: 3
    epochs: unknown field; did you mean 'run.epochs'?
$ mode: bsp
    mode: unknown field; did you mean 'consistency.mode'?
$ checkpoint: {every: 3}
    checkpoint.every: unknown field; did you mean 'every_s' or 'every_updates'?
$ data: {format: csv, path: a, target: y}
    data.target: unknown field; did you mean 'label'?
$ data: {format: csv, path: a, labels: y}
    data.labels: unknown field; did you mean 'label'?
$ 'run:{epochs': 3
    run:{epochs: unknown field; a field is written NAME: VALUE, with a space after the colon
$ model: {kind: torch, path: 'a:b', width: 3}
    model.width: unknown field; the fields are device, kind, kwargs, loss, path; arguments of your own function
    go into kwargs
$ run: {epochs: 1, target: val/accuracy}
    run.target: expected fields, not 'val/accuracy'; for example target: {metric: val/accuracy, value: 0.97}
$ version: '1'
    version: expected 1, not '1'
$ optimizer: {lr: 1, adam: {}}
    optimizer.adam: unknown field; write name: adam, and its fields beside it
$ model: {mlp: {}}
    model: missing 'kind', which says what the other fields mean: one of linear, mlp, python, torch; write kind: mlp
$ optimizer: {name: torch.optim.Adam, lr: 1}
    optimizer.name: expected one of sgd, adagrad, adam, adamw, delayed_nesterov, not 'torch.optim.Adam'; did you
    mean 'adam'?
$ scaling: {parameter_servers: 2}
    scaling.parameter_servers: unknown field; did you mean 'servers'?
$ scaling: {ps: 2}
    scaling.ps: unknown field; did you mean 'servers'?
$ compression: {name: fp16, k: 2}
    compression.k: unknown field; the only field is name
$ optimizer: {lr: 1, schedule: {name: step, every: 1, gamma: 0.1}}
    optimizer.schedule.gamma: unknown field; did you mean 'factor'?
$ optimizer: {lr: 1, nesterov_momentum: true}
    optimizer.nesterov_momentum: unknown field; did you mean 'momentum' or 'nesterov'?
$ '': 3
    '': unknown field; the fields are checkpoint, compression, consistency, correction, data, failure, model, name,
    optimizer, run, scaling, seed, simulate, version
# Missing fields
$ model: {kind: torch}
    model.path: missing (The function that returns the `nn.Module`, as `package.module:function`. Workers import
    it and call it with `kwargs`.)
# Functions and their arguments
$ model: {kind: python, path: my_models.build}
    model.path: expected 'package.module:factory', not 'my_models.build'; for example my_models:build
$ model: {kind: torch, path: 'src/nets.py:Net'}
    model.path: expected 'package.module:factory', not 'src/nets.py:Net'; for example src.nets:Net
$ model: {kind: torch, path: nets.py}
    model.path: expected 'package.module:factory', not 'nets.py'; for example nets:build
$ model: {kind: torch, path: 'a b'}
    model.path: expected 'package.module:factory', not 'a b'; for example my_models:build
$ model: {kind: torch, path: 'a:b', kwargs: {x: [.nan]}}
    model.kwargs: nan is not finite: leave it out, and let the function choose the value
$ data: {format: csv, path: a, delimiter: tab}
    data.delimiter: expected one character, not 'tab'; a tab is written "\t", in double quotes
"""


def cases() -> list[tuple[str, str]]:
    """Return the jobs and the messages above: a job after each `$`, and its message below it."""
    lines = [line for line in ANSWERS.splitlines() if not line.startswith("#")]
    jobs = "\n".join(lines).split("\n$ ")[1:]
    return [(job.partition("\n")[0], " ".join(job.partition("\n")[2].split())) for job in jobs]


@pytest.mark.parametrize(("text", "answer"), cases())
def test_a_mistake_is_answered_with_what_to_write(text: str, answer: str) -> None:
    assert said(text) == answer


@pytest.mark.parametrize(
    ("digits", "answer"),
    [
        (99, "seed: expected a number below 9.22337e+18, not a number of 99 digits"),
        (999, f"seed: expected a whole number, not '{'1' * 60}'... (999 characters)"),
    ],
)
def test_a_value_is_shown_shortened(digits: int, answer: str) -> None:
    assert said("seed: " + "1" * digits) == answer


def test_many_mistakes_and_long_names_make_a_short_answer() -> None:
    answer = said("{" + ", ".join(f"x{n}: 1" for n in range(1001)) + "}")
    assert answer.startswith("x0: unknown field; the fields are checkpoint, ")
    assert answer.endswith(" | and 981 more")
    assert answer.count(" | ") == 20
    assert said(f"? {'y' * 5000}\n: 1").startswith(f"{'y' * 57}...: unknown field")


def test_names_of_fields_that_python_gives_are_text() -> None:
    with pytest.raises(SpecError, match=r"  optimizer\.7: expected text as a field's name, not 7"):
        parse_spec(JOB | {"optimizer": {"lr": 0.1, 7: 1}}, "it")
    with pytest.raises(SpecError, match=r"  model\.kwargs\.7: expected text, not 7"):
        parse_spec(JOB | {"model": {"kind": "python", "path": "a:b", "kwargs": {7: 1}}}, "it")


@pytest.mark.parametrize("tree", ["job", [1], None, 10**5000], ids=lambda tree: type(tree).__name__)
def test_a_job_is_a_mapping(tree: Any) -> None:
    with pytest.raises(
        SpecError, match=r"it is not a valid job:\n  (job: )?(expected fields, not|empty; give its fields)"
    ):
        parse_spec(tree, "it")


def test_numbers_too_long_to_print_are_refused_all_the_same() -> None:
    for section in ({"name": 10**5000}, {"model": {"kind": "mlp", "hidden": 10**5000}}, {"seed": 10**5000}):
        with pytest.raises(SpecError, match="a number of 5,001 digits"):
            parse_spec(JOB | section, "it")


def test_a_missing_section_is_shown() -> None:
    with pytest.raises(SpecError, match=r"  optimizer: missing; for example optimizer: \{name: sgd, lr: 0\.1\}"):
        parse_spec({name: section for name, section in JOB.items() if name != "optimizer"}, "it")


def specs(root: type[BaseModel] = JobSpec) -> set[type[BaseModel]]:
    below = [specs(model) for name in root.model_fields for model in models_of(root, name)]
    return {root}.union(*below)


SPECS: list[type[BaseModel]] = sorted(specs(), key=lambda spec: spec.__name__)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.__name__)
def test_no_field_takes_a_boolean_for_a_number_or_a_name(spec: type[BaseModel]) -> None:
    for name, field in spec.model_fields.items():
        if field.annotation in (bool, bool | None):
            continue
        lists = [[[True]]] if "tuple" in str(field.annotation) else []
        for given in (True, False, *lists):
            with pytest.raises(ValidationError) as refused:
                spec.model_validate({name: given})
            assert [error for error in refused.value.errors() if error["loc"][0] == name], name


@pytest.mark.parametrize("path", field_paths(JobSpec))
def test_no_answer_names_a_class(path: str) -> None:
    names = "|".join(spec.__name__ for spec in SPECS)
    for value in ("'x'", "val/accuracy", "iris", "adam", "3", "[3]", "null", "true", "{}", "{x: 1}", "{name: x}"):
        try:
            parse_spec(with_setting(JOB, f"{path}={value}"), "it")
        except SpecError as refused:
            assert not re.search(rf"\b({names})\b", str(refused))  # noqa: PT017


def test_every_example_is_a_job_that_can_be_given() -> None:
    for name, field in JobSpec.model_fields.items():
        for example in field.examples or ():
            assert parse_spec(JOB | {name: yaml.safe_load(yaml.safe_dump(example))}, "it")


def test_every_bound_is_in_the_schema_as_json_schema_calls_it() -> None:
    schema = json.dumps(JobSpec.model_json_schema())
    assert not re.search(r'"(ge|gt|le|lt|multiple_of)":', schema)
    assert schema.count('"maximum": 4096') == 3


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.__name__)
def test_every_field_is_described_in_the_schema(spec: type[BaseModel]) -> None:
    schema = spec.model_json_schema()
    assert schema["description"]
    assert [name for name, field in schema["properties"].items() if not field.get("description")] == []
