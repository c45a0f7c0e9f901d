"""Reads CSV files (RFC 4180) with one example per row: numbers as features, and a label."""

from __future__ import annotations

import csv
import math
import re
from array import array
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from itertools import chain
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from psgd_workers.counting import counted
from psgd_workers.data.file import open_file
from psgd_workers.data.memory import check_memory
from psgd_workers.data.raw import RawArray, RawData, RawPart
from psgd_workers.errors import DataError
from psgd_workers.quoting import quoted, shown
from psgd_workers.spec import CsvData

__all__ = ["read_csv"]

LONGEST_ROW = 4 << 20  # characters of a row: about a million cells
LABEL_SIZE = 64  # bytes of a short label while the file is read
LONGEST_NAME = 60  # characters of a column's name in a message
MAX_COMPARED = 1_000  # columns that are compared with a wrong name
MAX_LISTED = 20  # columns that a message lists
INTEGER = re.compile(r"[+-]?[0-9]{1,18}")  # numbers of up to 18 digits always fit into int64
# `float` also takes underscores (1_0), digits of other scripts, and words such as infinity.
NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
NUMBER_CHARACTERS = "0123456789+-.eE \t"  # from text of these characters, `float` takes nothing but NUMBER and spaces
NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
SIGNS_OF_MISSING = {"", "?", "-", "na", "n/a", "none", "null"}

Rows = Iterable[tuple[int, list[str]]]  # (number of the row's last line in the file, from 1; cells)


def read_csv(spec: CsvData) -> RawData:
    """Read a table as one training part.

    Labels are int64 if all of them are whole numbers, else float64 if all are numbers, else text. A number is written
    with ASCII digits, a point and an exponent.

    Raises:
        DataError: the file cannot be read, is not a CSV file, or has a feature that is not a finite number. The message
            names the line and the column.
    """
    path = shown(spec.path)
    with open_file(spec.path, encoding="utf-8-sig", newline="") as file:
        lines = _Lines(file, path)
        try:
            return _parse_table(lines.rows(spec.delimiter), spec, path)
        except DataError:
            raise
        except (ValueError, TypeError, csv.Error) as error:  # csv raises TypeError and ValueError for some delimiters
            raise DataError(
                f"{path} is not a CSV file in UTF-8: {shown(str(error))}, near line {lines.number}; export it again as "
                "CSV"
            ) from error


class _Lines:
    """The lines of a file, with limits: on the characters of one row, and on the characters that text may have."""

    def __init__(self, file: IO[str], path: str) -> None:
        self._file = file
        self._path = path
        self._left = LONGEST_ROW  # characters that the current row may still have
        self.number = 0  # of lines that were read

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline(self._left + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self._left -= len(line)
        if self._left < 0:
            raise DataError(
                f"{self._path}, line {self.number}: the row has more than {LONGEST_ROW:,} characters; check that "
                "the file is a table, and that each quote is closed"
            )
        if "\0" in line:
            raise DataError(
                f"{self._path}, line {self.number}: the line has a NUL character, which no text file has; export "
                "it again as CSV in UTF-8"
            )
        return line

    def rows(self, delimiter: str) -> Iterator[tuple[int, list[str]]]:
        """Yield the rows that are not blank, each with the number of its last line."""
        for row in csv.reader(self, delimiter=delimiter, strict=True):
            self._left = LONGEST_ROW
            if row:  # a blank line is an empty row
                yield self.number, row


def _parse_table(rows: Iterator[tuple[int, list[str]]], spec: CsvData, path: str) -> RawData:
    first = next(rows, None)
    if first is None:
        raise DataError(f"{path} is empty; expected one example per row")
    has_header = _is_header(first[1], spec, path)
    columns = [name.strip() for name in first[1]] if has_header else [str(i) for i in range(len(first[1]))]
    if len(columns) < 2:
        raise DataError(
            f"{path} has one column, {quoted(columns[0])}; expected features and a label separated by "
            f"{spec.delimiter!r}: set `delimiter` to the character that separates the columns"
        )
    label = _label_column(spec, columns, path)
    features, labels = _parse_columns(path, columns, label, rows if has_header else chain([first], rows))
    return RawData(
        (
            RawPart(
                RawArray(f"{path}: features", features),
                RawArray(f"{path}: {shown(columns[label][:LONGEST_NAME])}", labels),
            ),
        )
    )


def _is_header(cells: list[str], spec: CsvData, path: str) -> bool:
    """Return True if the first row names the columns. Refuse to guess if it may be an example as well."""
    if isinstance(spec.label, str) or spec.header or len(cells) < 2:
        return spec.header is not False
    features = [cell for index, cell in enumerate(cells) if index != spec.label % len(cells)]
    if spec.header is False and all(map(_is_name, features)):
        raise DataError(
            f"{path}: the first row ({_preview(cells)}) has text for every feature, so it seems to name the "
            "columns: write `header: true`, or leave `header` out"
        )
    if spec.header is None and not any(map(_is_name, features)):
        raise DataError(
            f"{path}: the first row ({_preview(cells)}) may be an example or may name the columns, because its "
            "features are numbers: write `header: false` if it is an example, `header: true` if it names the columns"
        )
    return spec.header is None


def _is_name(cell: str) -> bool:
    """Return True for text that is neither a number nor a common sign for a missing number."""
    text = cell.strip()
    return not (NUMBER.fullmatch(text) or NOT_FINITE.fullmatch(text) or text.lower() in SIGNS_OF_MISSING)


def _preview(cells: list[str]) -> str:
    some = [shown(cell[:LONGEST_NAME]) for cell in (cells if len(cells) <= 6 else [*cells[:5], cells[-1]])]
    return ",".join(some) if len(cells) <= 6 else f"{','.join(some[:-1])},...,{some[-1]}"


def _label_column(spec: CsvData, columns: list[str], path: str) -> int:
    if isinstance(spec.label, int):
        if not -len(columns) <= spec.label < len(columns):
            raise DataError(
                f"{path} has no column {spec.label}; it has {counted(len(columns), 'column')}, numbered from 0"
            )
        return spec.label % len(columns)
    if columns.count(spec.label) > 1:
        raise DataError(
            f"{path} has several columns named {quoted(spec.label)}; set `label` to the number of the column, from 0"
        )
    if spec.label not in columns:
        close = get_close_matches(spec.label[:LONGEST_NAME], columns[:MAX_COMPARED], n=1)
        hint = f"did you mean {quoted(close[0])}?" if close else f"its columns are {_listed(columns)}"
        raise DataError(f"{path} has no column {quoted(spec.label)}; {hint}")
    return columns.index(spec.label)


def _listed(columns: list[str]) -> str:
    names = ", ".join(shown(name[:LONGEST_NAME]) for name in columns[:MAX_LISTED])
    return f"{names}, and {len(columns) - MAX_LISTED:,} more" if len(columns) > MAX_LISTED else names


def _parse_columns(path: str, columns: list[str], label: int, rows: Rows) -> tuple[NDArray[np.float64], NDArray[Any]]:
    names = columns[:label] + columns[label + 1 :]
    features = array("d")
    labels: list[str] = []
    checked = 0  # bytes for which memory was found
    for line, cells in rows:
        if (size := 8 * len(features) + LABEL_SIZE * len(labels)) >= checked:
            checked = size + size // 8 + LABEL_SIZE * LONGEST_ROW // 4
            check_memory(f"the next part of {path}", checked - size)
        if len(cells) != len(columns):
            raise DataError(f"{path}, line {line}: {len(cells)} cells, expected {len(columns)}; complete the row")
        labels.append(cells.pop(label).strip())
        if not labels[-1]:
            raise DataError(
                f"{path}, line {line}, column {quoted(columns[label])}: the label is empty; fill it in or drop the row"
            )
        features.extend(_parse_numbers(f"{path}, line {line}", names, cells))
    if not labels:
        raise DataError(f"{path} has a header but no rows; expected one example per row")
    return np.frombuffer(features, np.float64).reshape(len(labels), -1), _label_array(path, columns[label], labels)


def _parse_numbers(where: str, names: list[str], cells: list[str]) -> list[float]:
    numbers = _plain_numbers(cells) or [_parse_number(cell) for cell in cells]
    if not all(map(math.isfinite, numbers)):
        name, cell = next((n, c) for n, c in zip(names, cells, strict=True) if not math.isfinite(_parse_number(c)))
        raise DataError(
            f"{where}, column {quoted(name)}: {quoted(cell)} is not a finite number; encode it as a number, fill it "
            "in, or drop the row"
        )
    return numbers


def _plain_numbers(cells: list[str]) -> list[float] | None:
    """Return the numbers in cells of numbers alone, five times as fast as by patterns; None for other cells."""
    if "".join(cells).strip(NUMBER_CHARACTERS):
        return None
    try:
        return list(map(float, cells))
    except ValueError:
        return None


def _parse_number(cell: str) -> float:
    text = cell.strip()
    return float(text) if NUMBER.fullmatch(text) else math.nan


def _label_array(path: str, column: str, labels: list[str]) -> NDArray[Any]:
    if all(map(INTEGER.fullmatch, labels)):
        return np.array([int(label) for label in labels], np.int64)
    if all(map(NUMBER.fullmatch, labels)):
        return np.array([float(label) for label in labels], np.float64)
    _check_not_numbers(path, column, labels)
    texts: Any = np.dtypes.StringDType()  # an array of U takes for each text as much memory as for the longest one
    return np.array(labels, texts)


def _check_not_numbers(path: str, column: str, labels: list[str]) -> None:
    """Refuse NaN and infinities among numbers: they are missing labels, no classes."""
    row = next((row for row, label in enumerate(labels) if NOT_FINITE.fullmatch(label)), None)
    if row is not None and all(NUMBER.fullmatch(label) or NOT_FINITE.fullmatch(label) for label in labels):
        raise DataError(
            f"{path}, column {quoted(column)}: the label of row {row} (from 0) is {quoted(labels[row])}, which is not "
            "a finite number; correct it or drop the row"
        )
