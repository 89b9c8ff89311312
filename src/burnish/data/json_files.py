"""JSON lines, JSON arrays, and JSON objects around rows: to rows, streaming.

No file is held in memory, save one kind: an object around the rows (`{"data": [...]}`) over several
lines is loaded whole, and refused above `MAX_WRAPPED_JSON_BYTES`.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from burnish.data.problems import RowProblem, shorten
from burnish.data.rows import BROKEN, Row, decode_utf8, lenient_text, object_row, open_bytes
from burnish.errors import DataError, Problem

MAX_WRAPPED_JSON_BYTES = 1 << 30
"""Largest JSON file whose rows are wrapped in an object: it has to be loaded whole."""
CHUNK_CHARACTERS = 1 << 20
"""How much of a JSON array is decoded at a time."""


def read_jsonl(path: Path, source: str) -> Iterator[Row]:
    """One JSON object a line. Empty lines are skipped, and count as lines."""
    with open_bytes(path) as stream:
        number = 0
        while True:
            place = f"{path}:{number + 1}"
            try:
                line = stream.readline()
            except BROKEN as error:
                yield Row(source, place, None, RowProblem("unreadable_rest", str(error)))
                return
            if not line:
                return
            number += 1
            if line.strip():
                yield _json_row(line, source, place, first=number == 1)


def _json_row(line: bytes, source: str, place: str, first: bool) -> Row:
    text, problem = decode_utf8(line)
    if first and text.startswith("\ufeff"):
        text, problem = text[1:], problem or RowProblem("byte_order_mark")
    try:
        value = json.loads(text)
    except ValueError as error:
        where = getattr(error, "pos", 0)
        found = f"{getattr(error, 'msg', error)} at {shorten(text[max(0, where - 20) : where + 20])}"
        return Row(source, place, None, RowProblem("invalid_json", found))
    except RecursionError:
        return Row(source, place, None, RowProblem("invalid_json", "nested too deeply"))
    return object_row(value, source, place, problem)


def read_json(path: Path, source: str, split: str) -> Iterator[Row]:
    """A JSON array of objects, an object around one, or JSON lines under the wrong name."""
    with open_bytes(path) as stream:
        try:
            head = stream.read(1 << 16)
        except BROKEN as error:
            yield Row(source, f"{path}:1", None, RowProblem("unreadable_rest", str(error)))
            return
    opening = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if opening == b"[":
        yield from JsonArray(path, source).rows()
    elif opening == b"{" and not _is_json_lines(head):
        yield from _read_wrapped(path, source, split)
    else:
        for row in read_jsonl(path, source):
            inner = _wrapped_rows(row.value, split) if row.value is not None else None
            if inner is None:
                yield row
            else:
                yield from _indexed(inner, path, source, row.problem)


def _is_json_lines(head: bytes) -> bool:
    """Whether the first line is a whole JSON value (or longer than the head: then it is one)."""
    line, newline, _ = head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    if not newline:
        return True
    try:
        json.loads(line.decode("utf-8", errors="replace"))
    except ValueError:
        return False
    except RecursionError:
        return True  # `read_jsonl` says which line it is
    return True


WRAPPERS = ("data", "rows", "examples", "instances")
"""Keys under which a JSON object holds its rows, besides the split's name. No split is among them: rows to
train on are no stand-in for a validation split of another spelling."""


def _wrapped_rows(value: Mapping[str, Any], split: str) -> list[Any] | None:
    for key in (split, *WRAPPERS):
        rows = value.get(key)
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            return rows
    return None


def _indexed(values: Sequence[Any], path: Path, source: str, problem: RowProblem | None) -> Iterator[Row]:
    """Rows out of an object around them. Bytes of it that are no UTF-8 are a problem of the rows that hold
    what became of them."""
    is_mended = problem is not None and problem.rule == "invalid_utf8"
    for index, value in enumerate(values):
        own = problem if is_mended and "\ufffd" in repr(value) else None
        yield object_row(value, source, f"{path}#{index}", own)


def _read_wrapped(path: Path, source: str, split: str) -> Iterator[Row]:
    """An object over several lines: the one row there is, or rows under a key."""
    if path.stat().st_size > MAX_WRAPPED_JSON_BYTES:
        raise DataError(
            Problem(str(path), "a JSON object of over 1 GiB has to be loaded whole", "Write it as JSONL.")
        )
    with open_bytes(path) as stream:
        try:
            text, problem = decode_utf8(stream.read())
            value = json.loads(text.removeprefix("\ufeff"))
        except (*BROKEN, ValueError, RecursionError) as error:
            yield Row(source, f"{path}:1", None, RowProblem("unreadable_rest", f"not JSON: {error}"))
            return
    rows = _wrapped_rows(value, split)
    if rows is None:
        yield object_row(value, source, f"{path}:1", problem)
    else:
        yield from _indexed(rows, path, source, problem)


class JsonArray:
    """The items of one JSON array, decoded one by one from a growing piece of the file.

    An item that cannot be decoded may be cut off by the end of the piece, so the piece grows until
    the decoder's complaint no longer stands at its end. After a syntax error nothing that follows
    can be trusted, so the rest of the file is one problem.
    """

    def __init__(self, path: Path, source: str) -> None:
        self._path = path
        self._source = source
        self._decoder = json.JSONDecoder()
        self._buffer = ""
        self._position = 0
        self._line = 1
        self._at_end = False
        self._flaw: RowProblem | None = None

    def rows(self) -> Iterator[Row]:
        """Every item, with the line on which it starts, or its index where that is no line of its own."""
        with open_bytes(self._path) as stream:
            text = lenient_text(stream)
            try:
                yield from self._items(text)
            except (*BROKEN, ValueError, RecursionError) as error:
                place = f"{self._path}:{self._line}"
                message = f"{getattr(error, 'msg', error)}"
                yield Row(self._source, place, None, RowProblem("unreadable_rest", message))

    def _items(self, text: io.TextIOBase) -> Iterator[Row]:
        self._skip(text, "\ufeff")
        if self._peek(text) != "[":
            raise ValueError("no array here")
        self._advance(1)
        if self._peek(text) == "]":
            self._finish(text)
            return
        line_before = 1
        for index in itertools.count():
            self._peek(text)
            where = f":{self._line}" if self._line > line_before else f"#{index}"
            line_before = self._line
            place = f"{self._path}{where}"
            value, problem = self._decode(text)
            yield object_row(value, self._source, place, problem)
            mark = self._peek(text)
            if mark == "]":
                self._finish(text)
                return
            if mark != ",":
                raise ValueError(f"a comma or ] is missing before {shorten(mark)}" if mark else "cut off")
            self._advance(1)

    def _finish(self, text: io.TextIOBase) -> None:
        """Nothing may follow the array: files put end to end would lose all rows but the first one's."""
        self._advance(1)
        if rest := self._peek(text):
            raise ValueError(f"the array ends, but {shorten(rest)} follows; two files put end to end?")

    def _decode(self, text: io.TextIOBase) -> tuple[Any, RowProblem | None]:
        grow = CHUNK_CHARACTERS
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                # 16 characters: longer than any literal or escape that an end can cut in half.
                hopeless = error.pos < len(self._buffer) - 16 and not error.msg.startswith("Unterminated")
                if self._at_end or hopeless:
                    raise
            else:
                if end < len(self._buffer) or self._at_end:  # a number at the end may go on
                    return self._taken(value, end)
            self._read(text, grow)
            grow *= 2

    def _taken(self, value: Any, end: int) -> tuple[Any, RowProblem | None]:
        piece = self._buffer[self._position : end]
        self._advance(end - self._position)
        if piece.isascii():
            return value, None
        raw = piece.encode("utf-8", errors="surrogateescape")
        clean, problem = decode_utf8(raw)
        return (json.loads(clean), problem) if problem else (value, None)

    def _peek(self, text: io.TextIOBase) -> str:
        """The next character that is not white space, or nothing at the end."""
        self._skip(text, " \t\r\n")
        return self._buffer[self._position : self._position + 1]

    def _skip(self, text: io.TextIOBase, characters: str) -> None:
        while True:
            start = self._position
            while start < len(self._buffer) and self._buffer[start] in characters:
                start += 1
            self._advance(start - self._position)
            if self._position < len(self._buffer) or self._at_end:
                return
            self._read(text, CHUNK_CHARACTERS)

    def _advance(self, count: int) -> None:
        self._line += self._buffer.count("\n", self._position, self._position + count)
        self._position += count

    def _read(self, text: io.TextIOBase, size: int) -> None:
        more = text.read(size)
        self._at_end = not more
        self._buffer = self._buffer[self._position :] + more
        self._position = 0
