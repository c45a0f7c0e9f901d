from __future__ import annotations

import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from psgd_workers.data import labels, memory, open_dataset
from psgd_workers.data.formats import csv
from psgd_workers.data.formats.csv import read_csv
from psgd_workers.data.labels import encode_labels
from psgd_workers.data.raw import RawArray, RawPart
from psgd_workers.errors import DataError
from psgd_workers.spec import CsvData

IRIS = "length,width,species\n5.1,3.5,setosa\n7,3.2,versicolor\n6.3,3.3,virginica\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "table.csv"


def read(path: Path, content: str | bytes, **fields: Any) -> RawPart:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (part,) = read_csv(CsvData(format="csv", path=str(path), **fields)).parts
    return part


def labels_of(path: Path, *cells: str) -> NDArray[Any]:
    return read(path, "".join(f"0,{cell}\n" for cell in cells), header=False).labels.values


@pytest.mark.parametrize("label", ["species", 2, -1])
def test_the_label_is_one_column_and_the_features_are_the_others(path: Path, label: str | int) -> None:
    part = read(path, IRIS, label=label)
    np.testing.assert_array_equal(part.features.values, [[5.1, 3.5], [7, 3.2], [6.3, 3.3]])
    assert part.labels.values.tolist() == ["setosa", "versicolor", "virginica"]
    assert part.labels.name == f"{path}: species"


@pytest.mark.parametrize("label", ["width", 1, -2])
def test_the_label_may_lie_between_the_features(path: Path, label: str | int) -> None:
    part = read(path, "length,width,depth\n1,2,3\n4,5,6\n", label=label)
    np.testing.assert_array_equal(part.features.values, [[1, 3], [4, 6]])
    np.testing.assert_array_equal(part.labels.values, [2, 5])


@given(st.lists(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=4, max_size=4), min_size=1))
def test_numbers_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[float]]
) -> None:
    text = "".join(",".join(map(repr, row)) + "\n" for row in rows)
    part = read(tmp_path_factory.getbasetemp() / "written.csv", text, header=False)
    np.testing.assert_array_equal(part.features.values, np.array(rows)[:, :3], strict=True)
    np.testing.assert_array_equal(part.labels.values, np.array(rows)[:, 3], strict=True)


@pytest.mark.parametrize(
    "content",
    [
        IRIS.replace("\n", "\r\n"),
        "\ufeff" + IRIS,
        IRIS.replace("\n", "\n\n"),
        IRIS.replace(",", ", ").replace("\n", " \n"),
        IRIS.replace("setosa", '"setosa"').rstrip("\n"),
    ],
    ids=["windows", "byte-order mark", "blank lines", "spaces", "quotes"],
)
def test_habits_of_other_programs_change_nothing(path: Path, content: str) -> None:
    part = read(path, content, label="species")
    np.testing.assert_array_equal(part.features.values, [[5.1, 3.5], [7, 3.2], [6.3, 3.3]])
    assert part.labels.values.tolist() == ["setosa", "versicolor", "virginica"]


def test_another_delimiter_is_told(path: Path) -> None:
    part = read(path, IRIS.replace(",", "\t"), delimiter="\t")
    assert part.features.values.shape == (3, 2)


def test_labels_written_as_integers_are_integers(path: Path) -> None:
    labels = labels_of(path, "3", "+0", "-7")
    np.testing.assert_array_equal(labels, np.array([3, 0, -7], np.int64), strict=True)


@pytest.mark.parametrize("odd", ["3.0", "1e2", "12345678901234567890"])
def test_labels_written_as_other_numbers_are_floats(path: Path, odd: str) -> None:
    np.testing.assert_array_equal(labels_of(path, "3", odd), np.array([3, float(odd)]), strict=True)


def test_other_labels_are_text(path: Path) -> None:
    assert labels_of(path, "3", "yes", "4.5").tolist() == ["3", "yes", "4.5"]


@pytest.mark.parametrize("cell", ["tall", "", "?", "nan", "-inf", "1;2"])
def test_a_cell_that_is_no_finite_number_is_named(path: Path, cell: str) -> None:
    message = f"table.csv, line 3, column 'width': {cell!r} is not a finite number"
    with pytest.raises(DataError, match=re.escape(message)):
        read(path, IRIS.replace("3.2", cell))


def test_columns_without_a_header_are_named_by_number(path: Path) -> None:
    with pytest.raises(DataError, match=re.escape("line 1, column '2': 'x' is not a finite number")):
        read(path, "1,2,x\n", header=False, label=1)


def test_lines_are_counted_as_an_editor_does(path: Path) -> None:
    with pytest.raises(DataError, match="line 5, column 'width'"):
        read(path, '"the\nlength",width,species\n\n1,2,a\n3,x,b\n')


def test_an_empty_label_is_refused(path: Path) -> None:
    with pytest.raises(DataError, match="line 4, column 'species': the label is empty"):
        read(path, IRIS.replace("virginica", " "))


@pytest.mark.parametrize(("row", "cells"), [("1,2", 2), ("1,2,a,", 4)])
def test_a_ragged_row_is_refused(path: Path, row: str, cells: int) -> None:
    with pytest.raises(DataError, match=f"line 5: {cells} cells, expected 3"):
        read(path, f"{IRIS}{row}\n")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_refused(path: Path, content: str) -> None:
    with pytest.raises(DataError, match=r"table\.csv is empty"):
        read(path, content)


def test_a_header_alone_is_refused(path: Path) -> None:
    with pytest.raises(DataError, match="a header but no rows"):
        read(path, "length,species\n")


def test_a_single_column_hints_at_the_delimiter(path: Path) -> None:
    with pytest.raises(DataError, match=r"one column, 'length;width'; .* set `delimiter`"):
        read(path, "length;width\n1;2\n")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("specie", "no column 'specie'; did you mean 'species'?"),
        ("price", "no column 'price'; its columns are length, width, species"),
        (3, "no column 3; it has 3 columns, numbered from 0"),
        (-4, "no column -4; it has 3 columns, numbered from 0"),
    ],
)
def test_a_label_column_that_is_not_there_is_refused(path: Path, label: str | int, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        read(path, IRIS, label=label)


def test_a_label_name_that_two_columns_bear_is_refused(path: Path) -> None:
    with pytest.raises(DataError, match="several columns named 'y'"):
        read(path, "y,x,y\n1,2,3\n", label="y")


@pytest.mark.parametrize("content", [b"x,y\n1,caf\xe9\n", b"\x89PNG\r\n\x1a\n\xff", b'x,y\n1,"open\n'])
def test_what_is_not_csv_in_utf_8_is_refused(path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"table\.csv is not a CSV file in UTF-8"):
        read(path, content)


# Header


@pytest.mark.parametrize(
    ("content", "label"),
    [
        ("5.1,3.5,setosa\n7,3.2,versicolor\n", -1),  # an example, which would be lost as a header
        ("1,0.5,2\n0,0.7,3\n", 0),
        ("0,1,2\n5.1,3.5,0\n", -1),  # pandas numbers columns without names like this
        ("label,0,1\n1,5.1,3.5\n", 0),
        ("5.1,,setosa\n7,3.2,versicolor\n", -1),  # an example with a missing number
        ("?,NA,nan,1\n7,3.2,1,0\n", -1),
    ],
)
def test_a_first_row_that_may_be_an_example_is_not_lost_and_not_guessed(path: Path, content: str, label: int) -> None:
    row = content.partition("\n")[0]
    message = f"table.csv: the first row ({row}) may be an example or may name the columns"
    with pytest.raises(DataError, match=re.escape(message) + ".*`header: false`.*`header: true`"):
        read(path, content, label=label)


def test_such_a_row_is_what_the_job_says(path: Path) -> None:
    content = "0,1,2\n5.1,3.5,0\n"
    assert read(path, content, header=True).features.values.tolist() == [[5.1, 3.5]]
    assert read(path, content, header=False).features.values.tolist() == [[0, 1], [5.1, 3.5]]


@pytest.mark.parametrize(("header", "label"), [("a,2020,y", -1), ("1,2,y", "y"), (",a,y", -1), ("a,b,1", -1)])
def test_a_row_with_a_name_is_a_header(path: Path, header: str, label: str | int) -> None:
    assert read(path, f"{header}\n5.1,3.5,0\n", label=label).features.values.tolist() == [[5.1, 3.5]]


def test_a_long_row_is_shown_shortened(path: Path) -> None:
    with pytest.raises(DataError, match=r"the first row \(0,1,2,3,4,...,783\) may be"):
        read(path, ",".join(map(str, range(784))) + "\n")


def test_names_in_a_file_that_is_said_to_have_none_are_recognised(path: Path) -> None:
    with pytest.raises(
        DataError, match=r"the first row \(length,width,species\) .* seems to name the columns: write `header: true`"
    ):
        read(path, IRIS, header=False)


# Hostile tables


@pytest.mark.parametrize(
    "cell",
    ["1_0", "infinity", "-Infinity", "NaN", "１", "٣", "0x1p3", "0x10", "1e", ".", "1e400", "+-1", "1 0", "1\u00b2"],
)
def test_a_number_is_written_with_plain_digits(path: Path, cell: str) -> None:
    with pytest.raises(DataError, match=f"line 2, column '0': {re.escape(repr(cell))} is not a finite number"):
        read(path, f"0,0\n{cell},1\n", header=False)


@pytest.mark.parametrize(
    "cell", ["1", "+1", "-1.5", "1.", ".5", "1e5", "1E-5", " 2", "2\t", "\u00a03", "1e-400", "9" * 300]
)
def test_common_ways_to_write_a_number_are_read(path: Path, cell: str) -> None:
    assert read(path, f"0,0\n{cell},1\n", header=False).features.values.tolist() == [[0], [float(cell)]]


@pytest.mark.parametrize(
    ("cells", "kind"), [(["1_0", "2"], "T"), (["１", "2"], "T"), (["1e5", "2"], "f"), (["1", "2"], "i")]
)
def test_a_label_is_a_number_if_it_is_written_with_plain_digits(path: Path, cells: list[str], kind: str) -> None:
    labels = labels_of(path, *cells)
    assert labels.dtype.kind == kind
    assert kind != "T" or labels.tolist() == cells


@pytest.mark.parametrize("cell", ["nan", "NaN", "-inf", "Infinity"])
def test_a_label_that_is_not_finite_is_no_class_beside_numbers(path: Path, cell: str) -> None:
    with pytest.raises(DataError, match=f"column '1': the label of row 1 .* is '{cell}', which is not a finite number"):
        labels_of(path, "3", cell, "4.5")
    assert labels_of(path, "yes", cell).tolist() == ["yes", cell]


def test_a_nul_is_refused_so_that_no_two_classes_become_one(path: Path) -> None:
    for content in ("1,q\n2,q\0\n", "1,q\n\0002,q\n", "x,y\n1,q\n".encode("utf-16-le")):
        with pytest.raises(DataError, match=r"table\.csv, line \d: the line has a NUL character"):
            read(path, content, header=False)


@pytest.mark.parametrize("end", ["", " ", "\0", "\x01", "é"])
def test_texts_of_any_end_stay_different(end: str) -> None:
    texts: Any = np.dtypes.StringDType()
    (codes,), classes = encode_labels([RawArray("y", np.array(["q", f"q{end}", "p"], texts))], "cross_entropy")
    assert classes == tuple(sorted({"q", f"q{end}", "p"}))
    assert [classes[code] for code in codes] == ["q", f"q{end}", "p"]


def test_one_long_label_does_not_make_every_label_long(path: Path) -> None:
    rows = 20_000
    path.write_text(f"0,{'x' * 131_000}\n" + "1,y\n" * (rows - 1))  # 9.8 GiB as an array of texts of one length
    tracemalloc.start()
    dataset = open_dataset(CsvData(format="csv", path=str(path), header=False), 0, "cross_entropy")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert dataset.classes == ("x" * 131_000, "y")
    assert dataset.train.labels.tolist() == [0] + [1] * (rows - 1)
    assert peak < 50e6


@pytest.mark.parametrize(
    ("start", "piece", "message"),
    [
        ("1,2\n", "3" * 1000, "the row has more than 4,194,304 characters"),
        ("1,2\n", "3,", "the row has more than 4,194,304 characters"),
        ("", "3,", "the row has more than 4,194,304 characters"),
        ('1,2\n3,"', "4" * 1000, "the row has more than 4,194,304 characters"),
        ('1,2\n3,"', "4\n", "field larger than field limit"),
        ("1,2\n", '"4\n",', "the row has more than 4,194,304 characters"),
        ("1,2\n", '"",', "the row has more than 4,194,304 characters"),
    ],
    ids=[
        *("a long cell", "a long row", "a long first row", "an open quote", "an open quote over many lines"),
        *("quotes over many lines", "empty cells"),
    ],
)
def test_a_row_without_end_is_refused_in_little_memory(path: Path, start: str, piece: str, message: str) -> None:
    with path.open("w") as file:
        file.write(start)
        for _ in range(64):
            file.write(piece * (2**20 // len(piece)))
    tracemalloc.start()
    with pytest.raises(DataError, match=message):
        read_csv(CsvData(format="csv", path=str(path), header=False))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200e6


@pytest.mark.parametrize("cell", ["1" * 100_000 + "x", "1." * 50_000, "1e" * 50_000, "." * 100_000, "1_" * 50_000])
def test_a_long_cell_takes_linear_time_and_is_shown_shortened(path: Path, cell: str) -> None:
    with pytest.raises(DataError, match="is not a finite number") as refused:
        read(path, f"1,2\n{cell},3\n", header=False)
    assert len(str(refused.value)) < 1_000


@pytest.mark.parametrize("ends", ["\n", "\r", "\r\n"])
def test_line_ends_may_be_mixed(path: Path, ends: str) -> None:
    part = read(path, f"x,y\r\n1,2{ends}3,4\n5,6\r\n7,8")
    assert part.features.values.tolist() == [[1], [3], [5], [7]]
    assert part.labels.values.tolist() == [2, 4, 6, 8]


@pytest.mark.parametrize("delimiter", ['"', "\n", "\r", " ", "\0", "e", "1", "é", "\U0001f600"])
def test_any_delimiter_reads_the_table_or_is_refused(path: Path, delimiter: str) -> None:
    path.write_text('1,2\n3,4\n"5",6\n')
    with pytest.raises(DataError):
        read_csv(CsvData(format="csv", path=str(path), header=False, delimiter=delimiter))


def test_names_of_columns_are_shown_in_one_short_line(path: Path) -> None:
    wide = ",".join(["a\x1b[31m", '"b\nc"', "d" * 100_000, *(f"c{i}" for i in range(5_000))])
    for content, fields in ((f"{wide}\n", {"label": "z" * 100_000}), (f"{wide}\n", {"header": False})):
        with pytest.raises(DataError) as refused:
            read(path, content, **fields)
        assert str(refused.value).isprintable()
        assert len(str(refused.value)) < 3_000


def test_more_texts_than_classes_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "MAX_CLASSES", 3)
    path.write_text("".join(f"0,name{i}\n" for i in range(4)))
    with pytest.raises(DataError, match="has 4 different texts; at most 3 classes are expected"):
        open_dataset(CsvData(format="csv", path=str(path), header=False), 0)


def test_a_table_is_read_while_memory_is_free(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text("1,2,3,4,y\n" * 10_000)
    spec = CsvData(format="csv", path=str(path), header=False)
    monkeypatch.setattr(memory, "free_memory", lambda: 2**20)
    with pytest.raises(
        DataError, match=r"the next part of .*table\.csv needs \d+ MiB of memory, but 1 MiB are free here"
    ):
        read_csv(spec)
    asked: list[int] = []
    monkeypatch.setattr(csv, "check_memory", lambda _, needed: asked.append(needed))
    monkeypatch.setattr(csv, "LONGEST_ROW", 1_000)
    read_csv(spec)
    assert sum(asked) >= 10_000 * (4 * 8 + 64)  # the whole table was asked for, in growing pieces
    assert len(asked) < 50
