from __future__ import annotations

import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from psgd.errors import SpecError
from psgd.spec import JobSpec
from psgd.spec.reader import as_spec, load_spec, parse_spec
from psgd_workers.spec import MlpModel, PythonModel

TEXT = """\
model: {kind: mlp, hidden: [8]}
data: {format: sklearn, dataset: iris}
optimizer: {lr: 1e-3}
run: {epochs: 3}
"""

Load = Callable[..., JobSpec]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load a job file of this text, with overrides."""

    def write_and_load(text: str, *overrides: str) -> JobSpec:
        path = tmp_path / "iris.yaml"
        path.write_text(text, encoding="utf-8")
        return load_spec(path, overrides)

    return write_and_load


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("my job.yaml", "my-job"),
        (".hidden.yaml", "hidden"),
        ("日本.yaml", "job"),
        ("a.b.yaml", "a.b"),
        (f"{'x' * 99}.yaml", "x" * 63),
    ],
)
@pytest.mark.parametrize("line", ["", "name:\n", "name: ~\n"])
def test_a_job_without_a_name_gets_one_that_a_run_may_have(tmp_path: Path, file: str, name: str, line: str) -> None:
    path = tmp_path / file
    path.write_text(TEXT + line, encoding="utf-8")
    assert load_spec(path).name == name
    assert load_spec(path, name="ok").name == "ok"
    assert load_spec(path, ["name=null"]).name == name


@pytest.mark.parametrize("name", ["my job", "", "a/b", "x" * 64])
def test_a_name_that_is_given_is_checked_whatever_the_file_is_called(load: Load, tmp_path: Path, name: str) -> None:
    load(TEXT)
    with pytest.raises(SpecError, match="name: expected at most 63 letters, digits, dots"):
        load_spec(tmp_path / "iris.yaml", name=name)


def test_a_name_and_a_storage_that_are_given_are_text(load: Load, tmp_path: Path) -> None:
    load(TEXT)
    job = load_spec(tmp_path / "iris.yaml", name="010", storage="yes: [/b] # {")
    assert (job.name, job.run.storage) == ("010", "yes: [/b] # {")


def test_a_number_with_a_leading_zero_is_decimal(load: Load) -> None:
    assert load(TEXT + "seed: 010\n").seed == 10
    assert load(TEXT + "seed: 0128\n").seed == 128
    assert load(TEXT, "seed=007").seed == 7


def test_a_job_file_has_at_most_256_kibibytes(load: Load) -> None:
    assert load(TEXT + "#" * (2**18 - len(TEXT))).name == "iris"
    with pytest.raises(SpecError, match="larger than 256 KiB"):
        load(TEXT + "#" * (2**18 - len(TEXT) + 1))


def test_a_byte_order_mark_is_no_part_of_the_job(load: Load) -> None:
    assert load("\ufeff" + TEXT).name == "iris"


def test_a_setting_fills_a_section_that_is_empty(load: Load) -> None:
    assert load(TEXT + "scaling:\n", "scaling.workers=3").scaling.workers == 3


def test_a_setting_changes_one_of_two_places_that_an_alias_fills(load: Load) -> None:
    text = TEXT.replace("{kind: mlp, hidden: [8]}", "{kind: python, path: 'nets:build', kwargs: {a: &x {w: 1}, b: *x}}")
    model = load(text, "model.kwargs.a.w=2").model
    assert isinstance(model, PythonModel)
    assert model.kwargs == {"a": {"w": 2}, "b": {"w": 1}}


def test_a_job_is_named_after_its_file_unless_it_says_a_name(load: Load) -> None:
    assert load(TEXT).name == "iris"
    assert load(TEXT + "name: flowers\n").name == "flowers"
    assert load(TEXT, "name=roses").name == "roses"


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-3", 1e-3), ("1E-3", 1e-3), ("2.5e-1", 0.25), (".5", 0.5), ("5", 5.0), ("+1e-2", 0.01), ("1_0.5", 10.5)],
)
def test_numbers_are_numbers_however_they_are_written(load: Load, written: str, value: float) -> None:
    assert load(TEXT.replace("1e-3", written)).optimizer.lr == value
    assert load(TEXT, f"optimizer.lr={written}").optimizer.lr == value


@pytest.mark.parametrize("written", ["1e", "e3", "1e-3x", "'fast'", ".inf", ".nan"])
def test_what_is_no_number_is_refused(load: Load, written: str) -> None:
    with pytest.raises(SpecError, match=r"optimizer\.lr: "):
        load(TEXT.replace("1e-3", written))


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (TEXT.replace("hidden", "hiden"), r"model\.hiden: unknown field; did you mean 'hidden'\?"),
        (TEXT.replace("epochs", "epoch"), r"run\.epoch: unknown field; did you mean 'epochs'\?"),
        (TEXT.replace("lr:", "learning_rat:"), r"did you mean 'learning_rate'\?"),
        (TEXT + "scalling: {workers: 3}", r"scalling: unknown field; did you mean 'scaling'\?"),
        (TEXT + "consistency: {mode: bsp, depth: 3}", r"consistency\.depth: unknown field; the only field is mode"),
        (TEXT.replace("epochs: 3", "epochs: 3, target: {metrik: x}"), r"run\.target\.metrik: .* 'metric'\?"),
    ],
)
def test_an_unknown_field_is_told_what_was_perhaps_meant(load: Load, text: str, hint: str) -> None:
    with pytest.raises(SpecError, match=hint):
        load(text)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (TEXT.replace("optimizer: {lr: 1e-3}\n", ""), r"  optimizer: missing"),
        (TEXT.replace("lr: 1e-3", ""), r"  optimizer\.lr: missing"),
        (TEXT.replace("[8]", "[8, 0]"), r"  model\.hidden\.1: expected at least 1, not 0"),
        (
            TEXT.replace("mlp", "mpl"),
            r"  model\.kind: expected one of linear, mlp, python, torch, not 'mpl'; did you mean 'mlp'",
        ),
        (TEXT + "scaling: {workers: many}", r"  scaling\.workers: expected a whole number, not 'many'"),
        (TEXT.replace("epochs: 3", "storage: runs"), r"  run: a run must end: give at least one of epochs"),
    ],
)
def test_a_fault_says_where_it_is_and_what_was_given(load: Load, text: str, fault: str) -> None:
    with pytest.raises(SpecError, match=fault):
        load(text)


def test_every_fault_is_listed(load: Load) -> None:
    with pytest.raises(SpecError) as refused:
        load(TEXT.replace("hidden", "hiden").replace("1e-3", "-1") + "seed: -1\n")
    assert [line.split(":")[0].strip() for line in str(refused.value).splitlines()[1:]] == [
        "seed",
        "model.hiden",
        "optimizer.lr",
    ]


@pytest.mark.parametrize(
    ("text", "key"),
    [(TEXT + "model: {kind: linear}", "'model'"), (TEXT.replace("[8]", "[8], hidden: [9]"), "'hidden'")],
)
def test_a_key_given_twice_is_refused(load: Load, text: str, key: str) -> None:
    with pytest.raises(SpecError, match=f"{key} is given twice"):
        load(text)


@pytest.mark.parametrize("text", ["", "- 1", "job", "3"])
def test_a_job_file_is_a_mapping(load: Load, text: str) -> None:
    with pytest.raises(SpecError, match="a job file is a mapping"):
        load(text)


@pytest.mark.parametrize("text", ["model: [1", "a: b: c", "\tmodel: x", "a: !!python/object:os.system x"])
def test_what_is_not_plain_yaml_is_refused(load: Load, text: str) -> None:
    with pytest.raises(SpecError, match="is not YAML"):
        load(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"cannot read the job file .*nothing\.yaml"):
        load_spec(tmp_path / "nothing.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="cannot read"):
        load_spec(binary)


# Hostile files

MANY = 100_000
KWARGS = TEXT.replace("{kind: mlp, hidden: [8]}", "{kind: python, path: 'nets:build', kwargs: {a: &a 'X', b: [Y]}}")
HOSTILE = {
    "nested aliases": "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else '1'] * 10)}]" for n in range(9)),
    "nested merges": "a0: &a0 {x: 1}\n"
    + "\n".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}], y{n}: 1}}" for n in range(1, 9)),
    "aliases of a long text": KWARGS.replace("X", "x" * MANY).replace("Y", "*a," * 9_000),
    "a list of aliases of a long text": f"- &a '{'x' * MANY}'\n" + "- *a\n" * 9_000,
    "digits and an x": f"{TEXT}seed: {'1' * MANY}x\n",
    "a number of 5,000 digits": f"{TEXT}seed: {'1' * 5_000}\n",
    "a number of 100 digits": f"{TEXT}seed: {'1' * 100}\n",
    "an infinite number": TEXT.replace("1e-3", f"1e{'9' * 90}"),
    "a list of many values": TEXT.replace("[8]", f"[{'1,' * MANY}]"),
    "many wrong values": TEXT.replace("[8]", f"[{'x,' * 9_000}]"),
    "many fields": TEXT + "".join(f"f{i}: 1\n" for i in range(4_000)),
    "many modes": f"{TEXT}simulate: {{modes: '{'async,' * 40_000}'}}\n",
    "a list of many modes": f"{TEXT}simulate: {{modes: [{'async,' * 9_000}]}}\n",
    "deep lists": f"{TEXT}x: {'[' * MANY}",
    "deep mappings": "".join(f"{' ' * i}a:\n" for i in range(600)),
    "deep keys": "? " * MANY,
    "a list that contains itself": "a: &a [&b [*a, *b]]\n",
    "a mapping that contains itself": "model: &a {x: *a}\n",
    "a list as a key, twice": "? [a, b]\n: 1\n? [a, b]\n: 2\n",
    "a mapping as a key, twice": "? {a: b}\n: 1\n? {a: b}\n: 2\n",
    "a date that does not exist": f"{TEXT}seed: 2001-13-45\n",
    "a NUL": f"{TEXT}name: a\0b\n",
    "control characters": f"{TEXT}name: a\x07\x1b[31m\n",
    "escaped control characters": f'{TEXT}"a\\0\\e[31m\\n": 1\nname: "\\e[31m\\u2028"\n',
    "a control character in a tag": "a: !x%1b%5b31m b\n",
    "half a character": f'{TEXT}name: "\\ud800"\n',
    "a long name of a field": f"? {'k' * MANY}\n: 1\n",
    "a long text": TEXT.replace("mlp", "m" * MANY),
    "many lines of one text": "a: b\n" + " x\n" * 80_000,
    "empty lines": "\n" * 200_000,
    "escapes": f'a: "{chr(92)}x41{"z" * 3}' * 30_000,
    "many documents": "---\n" * 60_000,
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_with_a_short_sentence(load: Load, text: str) -> None:
    with pytest.raises(SpecError) as refused:
        load(text)
    assert str(refused.value).replace("\n", "").isprintable()
    assert len(str(refused.value)) < 10_000


LOAD_ALL = """
import resource, sys
from psgd.errors import SpecError
from psgd.spec.reader import load_spec

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB

before = peak()
for path in sys.argv[1:]:
    try:
        load_spec(path)
    except SpecError:
        continue
    raise AssertionError(path)
print(peak() - before)
"""


def test_hostile_files_take_little_memory(tmp_path: Path) -> None:
    for number, text in enumerate(HOSTILE.values()):
        (tmp_path / f"{number}.yaml").write_text(text)
    command = [sys.executable, "-c", LOAD_ALL, *map(str, sorted(tmp_path.iterdir()))]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 150 * 1024


def test_a_file_of_a_gibibyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    with path.open("wb") as file:
        file.truncate(2**30)
    tracemalloc.start()
    with pytest.raises(SpecError, match="larger than 256 KiB"):
        load_spec(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6


@pytest.mark.parametrize("content", [b"name: \xff\n", TEXT.encode("utf-16"), b"\xed\xa0\x80", b"\xc0\x80"])
def test_a_file_in_another_encoding_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "job.yaml").write_bytes(content)
    with pytest.raises(SpecError, match="it is not text in UTF-8"):
        load_spec(tmp_path / "job.yaml")


@pytest.mark.timeout(20)
def test_a_pipe_a_device_and_a_directory_are_no_job_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "pipe"), ("/dev/zero", "device"), (tmp_path, "directory")):
        with pytest.raises(SpecError, match=f"cannot read the job file .*: it is a {kind}; expected a regular file"):
            load_spec(path)


@pytest.mark.parametrize("name", ["a\0b", "a\x1b[31m\nb", "a\ud800", "x" * 5_000])
def test_a_strange_name_of_a_file_is_shown_in_one_line(name: str) -> None:
    with pytest.raises(SpecError, match=r"cannot read the job file '[ax]") as refused:
        load_spec(name)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 600


def test_a_login_in_a_url_is_not_shown(load: Load) -> None:
    with pytest.raises(SpecError, match=re.escape("data: expected fields, not 'https://***@host/a?sig=***'")):
        load(TEXT.replace("{format: sklearn, dataset: iris}", "'https://me:secret@host/a?sig=secret'"))


def test_a_hostile_file_ends_the_command_with_2_and_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(HOSTILE["nested aliases"])
    command = [sys.executable, "-m", "psgd.cli", "validate", str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 2
    assert "more than 10,000 values" in ended.stderr
    assert "Traceback" not in ended.stderr


# Overrides


def test_overrides_win_over_the_file_and_the_last_over_the_first(load: Load) -> None:
    job = load(TEXT, "run.epochs=5", "run.epochs=7", "model.hidden=[4, 4]", "scaling.workers=3", "run.max_time_s=1e2")
    assert (job.run.epochs, job.run.max_time_s, job.scaling.workers) == (7, 100, 3)
    assert isinstance(job.model, MlpModel)
    assert job.model.hidden == (4, 4)


def test_an_override_can_make_a_section_and_empty_a_field(load: Load) -> None:
    job = load(TEXT, "run.target.metric=val/loss", "run.target.value=0.5", "run.max_updates=9", "run.epochs=null")
    assert job.run.target
    assert (job.run.target.metric, job.run.epochs) == ("val/loss", None)


def test_a_users_own_arguments_can_be_overridden(load: Load) -> None:
    text = TEXT.replace("{kind: mlp, hidden: [8]}", "{kind: python, path: 'nets:build', kwargs: {width: 3}}")
    model = load(text, "model.kwargs.depth=2").model
    assert isinstance(model, PythonModel)
    assert model.kwargs == {"width": 3, "depth": 2}


@pytest.mark.parametrize("in_file", ["lr", "learning_rate"])
@pytest.mark.parametrize("override", ["lr", "learning_rate"])
def test_the_learning_rate_is_overridden_under_either_name(load: Load, in_file: str, override: str) -> None:
    assert load(TEXT.replace("lr:", f"{in_file}:"), f"optimizer.{override}=3e-1").optimizer.lr == 0.3


def test_a_file_with_both_names_of_the_learning_rate_is_refused(load: Load) -> None:
    with pytest.raises(SpecError, match="learning_rate"):
        load(TEXT.replace("lr: 1e-3", "lr: 1e-3, learning_rate: 1e-3"))


@pytest.mark.parametrize("override", ["optimizer.lr", "=3", "optimizer.=3", "lr"])
def test_an_override_has_a_field_and_a_value(load: Load, override: str) -> None:
    with pytest.raises(SpecError, match="expected FIELD=VALUE"):
        load(TEXT, override)


def test_a_plain_value_has_no_fields(load: Load) -> None:
    with pytest.raises(SpecError, match="kind is a plain value, which has no fields"):
        load(TEXT, "model.kind.x=3")


def test_an_override_is_checked_like_the_file(load: Load) -> None:
    with pytest.raises(SpecError, match=r"scaling\.wokers: unknown field; did you mean 'workers'\?"):
        load(TEXT, "scaling.wokers=3")
    with pytest.raises(SpecError, match=r"setting 'optimizer\.lr=\[1' is not YAML"):
        load(TEXT, "optimizer.lr=[1")


def test_plain_values_are_parsed_alike() -> None:
    with pytest.raises(SpecError, match=r"the job is not a valid job:\n  model: missing"):
        parse_spec({"run": {"epochs": 1}}, "the job")


def test_a_section_that_does_not_say_what_its_fields_mean_is_told_so(load: Load) -> None:
    with pytest.raises(SpecError, match="consistency: missing 'mode', which says what the other fields mean"):
        load(TEXT, "consistency.k=3")


# Jobs from Python


JOB: dict[str, Any] = {
    "model": {"kind": "mlp", "hidden": [8]},
    "data": {"format": "sklearn", "dataset": "iris"},
    "optimizer": {"lr": 1e-3},
    "run": {"epochs": 3},
}


def test_a_mapping_is_the_job_that_its_fields_describe(load: Load) -> None:
    expected = load(TEXT)
    named = JOB | {"name": expected.name}
    assert as_spec(named) == as_spec(MappingProxyType(named)) == expected
    assert as_spec(expected) is expected


def test_a_mapping_is_refused_with_the_words_for_a_job_file(load: Load) -> None:
    wrong = JOB | {"optimizer": {"lr": "fast", "momentun": 0.9}}
    with pytest.raises(SpecError) as of_mapping:
        as_spec(wrong)
    with pytest.raises(SpecError) as of_file:
        load(TEXT.replace("{lr: 1e-3}", "{lr: fast, momentun: 0.9}"))
    assert str(of_mapping.value).splitlines()[1:] == str(of_file.value).splitlines()[1:]
    assert "did you mean 'momentum'?" in str(of_mapping.value)


@pytest.mark.parametrize("job", ["job.yaml", Path("job.yaml"), None, 3, [JOB]])
def test_what_is_no_job_is_refused_and_told_how_a_file_is_read(job: Any) -> None:
    with pytest.raises(
        SpecError, match=r"a job is a JobSpec, or a mapping .* psgd\.spec\.reader\.load_spec reads a job file"
    ):
        as_spec(job)


def test_an_error_is_of_bounded_length_whatever_the_names() -> None:
    long = "x" * 100_000
    tree = {long: 1, "compression": {f"{long}name": "none"}, "run": {long: long}, "name": long}
    with pytest.raises(SpecError, match="not a valid job") as refused:
        parse_spec(tree, "resolved.json")
    assert len(str(refused.value)) < 30_000
