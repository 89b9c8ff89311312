"""A row as it was read, and what every reader of files needs: bytes, text, places."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.data.problems import RowProblem, shorten
from burnish.errors import DataError, Problem

# What the decompressors raise when a file is damaged or cut off. OSError covers zstd and gzip.
BROKEN = (EOFError, OSError, lzma.LZMAError, zlib.error)

COPY_AGAIN = "Copy or download it again, or write it anew."
"""What to do about a file that is not what its name says."""


@dataclass(frozen=True)
class Row:
    """One row as it was read.

    With a `value` and a `problem` the row was read by mending it: whether that is welcome is the
    rule's policy. Without a value there is nothing to mend.
    """

    source: str
    place: str
    """`file:line`, or `file#index` (from 0) where a file has no lines."""
    value: Mapping[str, Any] | None
    problem: RowProblem | None = None


def open_bytes(path: Path) -> io.BufferedIOBase:
    """Open a file for reading, decompressing as its ending says.

    Raises:
        DataError: The file cannot be opened.
    """
    try:
        return _open_bytes(path)
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> DataError:
    """The error that the system does not let a file be read."""
    cure = "Give files that you may read, or change their permissions."
    return DataError(Problem(str(path), f"cannot be read: {error.strerror or error}", cure))


def _open_bytes(path: Path) -> io.BufferedIOBase:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")
    if suffix == ".bz2":
        return bz2.open(path, "rb")
    if suffix == ".xz":
        return lzma.open(path, "rb")
    if suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
    return path.open("rb")


def object_row(value: Any, source: str, place: str, problem: RowProblem | None = None) -> Row:
    """A row from any JSON value: anything but an object is a problem."""
    if isinstance(value, dict):
        return Row(source, place, value, problem)
    return Row(source, place, None, RowProblem("null_row", f"not an object but {shorten(value)}"))


def decode_utf8(raw: bytes) -> tuple[str, RowProblem | None]:
    """Text of the bytes; what is no UTF-8 becomes U+FFFD, with the problem that says where."""
    try:
        return raw.decode("utf-8"), None
    except UnicodeDecodeError as error:
        around = raw[max(0, error.start - 10) : error.start + 10]
        found = f"byte {error.start} is not UTF-8, near {shorten(around)}"
        return raw.decode("utf-8", errors="replace"), RowProblem("invalid_utf8", found)


def lenient_text(stream: io.BufferedIOBase) -> io.TextIOWrapper:
    """The stream as text; bytes that are no UTF-8 come out as lone surrogates, to be found later."""
    raw: Any = stream  # typeshed asks for a name, which only error messages use
    return io.TextIOWrapper(raw, encoding="utf-8", errors="surrogateescape", newline="")
