"""CSV and TSV to rows, streaming."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from burnish.data.problems import RowProblem, shorten
from burnish.data.rows import BROKEN, Row, decode_utf8, lenient_text, open_bytes
from burnish.errors import counted

MAX_CELL_BYTES = 1 << 30
"""Largest cell; Python's default of 128 KiB refuses long texts."""


def read_csv(path: Path, source: str, delimiter: str) -> Iterator[Row]:
    """Comma or tab separated cells under a header line; a quoted cell may span lines."""
    csv.field_size_limit(MAX_CELL_BYTES)  # the module has no setting per reader
    with open_bytes(path) as stream:
        text = lenient_text(stream)
        try:
            header_line = text.readline()
        except BROKEN as error:
            yield Row(source, f"{path}:1", None, RowProblem("unreadable_rest", str(error)))
            return
        problem = RowProblem("byte_order_mark") if header_line.startswith("\ufeff") else None
        header_line = header_line.removeprefix("\ufeff")
        delimiter = _pick_delimiter(header_line, delimiter)
        header = next(csv.reader([header_line], delimiter=delimiter), [])
        if not header:
            return
        yield from _csv_rows(
            csv.reader(text, delimiter=delimiter, strict=True), header, path, source, problem
        )


def _pick_delimiter(header: str, expected: str) -> str:
    """The expected delimiter, unless the header has only another one in it."""
    for candidate in (expected, "\t", ";"):
        if candidate in header:
            return candidate
    return expected


def _csv_rows(
    cells: Any, header: list[str], path: Path, source: str, problem: RowProblem | None
) -> Iterator[Row]:
    while True:
        place = f"{path}:{cells.line_num + 2}"  # the header's line was read before
        try:
            values = next(cells, None)
        except csv.Error as error:
            rule = "unreadable_rest" if "unexpected end" in str(error) else "invalid_csv"
            yield Row(source, place, None, RowProblem(rule, str(error)))
            continue
        except BROKEN as error:
            yield Row(source, place, None, RowProblem("unreadable_rest", str(error)))
            return
        if values is None:
            return
        if values:
            yield _csv_row(values, header, source, place, problem)
            problem = None


def _csv_row(
    values: list[str], header: list[str], source: str, place: str, problem: RowProblem | None
) -> Row:
    if len(values) != len(header):
        found = f"{counted(len(values), 'cell')} under {len(header)} columns, {shorten(values[-1])} last"
        return Row(source, place, None, RowProblem("invalid_csv", found))
    row: dict[str, Any] = {}
    for name, cell in zip(header, values, strict=True):
        text = cell
        if not cell.isascii():
            text, flaw = decode_utf8(cell.encode("utf-8", errors="surrogateescape"))
            problem = flaw or problem
        # How pandas writes an empty cell with na_rep, or after astype(str): the same as a NaN.
        row[name] = float("nan") if text in ("nan", "NaN") else text
    return Row(source, place, row, problem)
