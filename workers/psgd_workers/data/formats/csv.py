"""Reads CSV files (RFC 4180) with one example per row: numbers as features, and a label."""

from __future__ import annotations

import csv
import math
import re
from array import array
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psgd_workers.counting import counted
from psgd_workers.data.file import open_file
from psgd_workers.data.raw import RawArray, RawData, RawPart
from psgd_workers.errors import DataError
from psgd_workers.spec import CsvData

__all__ = ["read_csv"]

INTEGER = re.compile(r"[+-]?[0-9]{1,18}")  # numbers of up to 18 digits always fit into int64
SIGNS_OF_MISSING = {"", "?", "-", "na", "n/a", "none", "null"}

Rows = Iterable[tuple[int, list[str]]]  # (number of the row's last line in the file, from 1; cells)


def read_csv(spec: CsvData) -> RawData:
    """Read a table as one training part.

    Labels are int64 if all of them are whole numbers, else float64 if all are numbers, else text.

    Raises:
        DataError: the file cannot be read, is not a CSV file, or has a feature that is not a finite number. The message
            names the line and the column.
    """
    with open_file(spec.path, encoding="utf-8-sig", newline="") as file:
        try:
            return _parse_table(_rows(file, spec.delimiter), spec)
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{spec.path} is not a CSV file in UTF-8: {error}; export it again as CSV") from error


def _rows(file: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    return ((reader.line_num, row) for row in reader if row)  # a blank line is an empty row


def _parse_table(rows: Iterator[tuple[int, list[str]]], spec: CsvData) -> RawData:
    first = next(rows, None)
    if first is None:
        raise DataError(f"{spec.path} is empty; expected one example per row")
    has_header = _is_header(first[1], spec)
    columns = [name.strip() for name in first[1]] if has_header else [str(i) for i in range(len(first[1]))]
    if len(columns) < 2:
        raise DataError(
            f"{spec.path} has one column, {columns[0]!r}; expected features and a label separated by "
            f"{spec.delimiter!r}: set `delimiter` to the character that separates the columns"
        )
    label = _label_column(spec, columns)
    features, labels = _parse_columns(spec.path, columns, label, rows if has_header else chain([first], rows))
    return RawData(
        (RawPart(RawArray(f"{spec.path}: features", features), RawArray(f"{spec.path}: {columns[label]}", labels)),)
    )


def _is_header(cells: list[str], spec: CsvData) -> bool:
    """Return True if the first row names the columns. Refuse to guess if it may be an example as well."""
    if isinstance(spec.label, str) or spec.header or len(cells) < 2:
        return spec.header is not False
    features = [cell for index, cell in enumerate(cells) if index != spec.label % len(cells)]
    if spec.header is False and all(map(_is_name, features)):
        raise DataError(
            f"{spec.path}: the first row ({_preview(cells)}) has text for every feature, so it seems to name the "
            "columns: write `header: true`, or leave `header` out"
        )
    if spec.header is None and not any(map(_is_name, features)):
        raise DataError(
            f"{spec.path}: the first row ({_preview(cells)}) may be an example or may name the columns, because its "
            "features are numbers: write `header: false` if it is an example, `header: true` if it names the columns"
        )
    return spec.header is None


def _is_name(cell: str) -> bool:
    """Return True for text that is neither a number nor a common sign for a missing number."""
    try:
        float(cell)
    except ValueError:
        return cell.strip().lower() not in SIGNS_OF_MISSING
    return False


def _preview(cells: list[str]) -> str:
    return ",".join(cells) if len(cells) <= 6 else f"{','.join(cells[:5])},...,{cells[-1]}"


def _label_column(spec: CsvData, columns: list[str]) -> int:
    if isinstance(spec.label, int):
        if not -len(columns) <= spec.label < len(columns):
            raise DataError(
                f"{spec.path} has no column {spec.label}; it has {counted(len(columns), 'column')}, numbered from 0"
            )
        return spec.label % len(columns)
    if columns.count(spec.label) > 1:
        raise DataError(
            f"{spec.path} has several columns named {spec.label!r}; set `label` to the number of the column, from 0"
        )
    if spec.label not in columns:
        close = get_close_matches(spec.label, columns, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"its columns are {', '.join(columns)}"
        raise DataError(f"{spec.path} has no column {spec.label!r}; {hint}")
    return columns.index(spec.label)


def _parse_columns(path: str, columns: list[str], label: int, rows: Rows) -> tuple[NDArray[np.float64], NDArray[Any]]:
    names = columns[:label] + columns[label + 1 :]
    features = array("d")
    labels = []
    for line, cells in rows:
        if len(cells) != len(columns):
            raise DataError(f"{path}, line {line}: {len(cells)} cells, expected {len(columns)}; complete the row")
        labels.append(cells.pop(label).strip())
        if not labels[-1]:
            raise DataError(
                f"{path}, line {line}, column {columns[label]!r}: the label is empty; fill it in or drop the row"
            )
        features.extend(_parse_numbers(f"{path}, line {line}", names, cells))
    if not labels:
        raise DataError(f"{path} has a header but no rows; expected one example per row")
    return np.frombuffer(features, np.float64).reshape(len(labels), -1), _label_array(labels)


def _parse_numbers(where: str, names: list[str], cells: list[str]) -> list[float]:
    numbers = [_parse_number(cell) for cell in cells]
    if not all(map(math.isfinite, numbers)):
        name, cell = next((n, c) for n, c in zip(names, cells, strict=True) if not math.isfinite(_parse_number(c)))
        raise DataError(
            f"{where}, column {name!r}: {cell!r} is not a finite number; encode it as a number, fill it in, or drop "
            "the row"
        )
    return numbers


def _parse_number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _label_array(labels: list[str]) -> NDArray[Any]:
    if all(map(INTEGER.fullmatch, labels)):
        return np.array([int(label) for label in labels], np.int64)
    try:
        return np.array([float(label) for label in labels], np.float64)
    except ValueError:
        return np.array(labels, np.str_)
