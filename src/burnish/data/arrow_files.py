"""Parquet and Arrow IPC to rows, by record batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from burnish.data.rows import COPY_AGAIN, Row
from burnish.errors import DataError, Problem

ARROW_BATCH_ROWS = 256
"""Rows taken from a Parquet file or record batch at a time."""


def read_parquet(path: Path, source: str) -> Iterator[Row]:
    """Rows by record batch."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        yield from _table_rows(file.iter_batches(batch_size=ARROW_BATCH_ROWS), path, source)
    except (pa.ArrowException, OSError) as error:
        raise DataError(Problem(str(path), f"not a readable Parquet file: {error}", COPY_AGAIN)) from error


def read_arrow(path: Path, source: str) -> Iterator[Row]:
    """Rows of an Arrow IPC file or stream, memory-mapped."""
    import pyarrow as pa

    try:
        yield from _table_rows(_arrow_batches(path), path, source)
    except (pa.ArrowException, OSError) as error:
        raise DataError(Problem(str(path), f"not a readable Arrow file: {error}", COPY_AGAIN)) from error


def _arrow_batches(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as mapped:
        if mapped.size() >= 6 and mapped.read(6) == b"ARROW1":  # the IPC file format's magic
            reader = pa.ipc.open_file(mapped)
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)
        else:
            mapped.seek(0)
            yield from pa.ipc.open_stream(mapped)


def _table_rows(batches: Iterator[Any], path: Path, source: str) -> Iterator[Row]:
    index = 0
    for batch in batches:
        for start in range(0, batch.num_rows, ARROW_BATCH_ROWS):
            for value in table_values(batch.slice(start, ARROW_BATCH_ROWS)):
                yield Row(source, f"{path}#{index}", value)
                index += 1


def table_values(batch: Any) -> Iterator[dict[str, Any]]:
    """Rows of a record batch. A struct's empty field counts as absent.

    Arrow gives every struct of a column the fields of all of them, so `{"a": 1}` and `{"b": 2}`
    come back as `{"a": 1, "b": None}`: a tool call would seem to pass arguments it never had.
    """
    names = batch.schema.names
    columns = [batch.column(index).to_pylist() for index in range(len(names))]
    for cells in zip(*columns, strict=True):
        yield {name: _without_nulls(cell) for name, cell in zip(names, cells, strict=True)}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        if value and not isinstance(value[0], (dict, list)) and not isinstance(value[-1], (dict, list)):
            return value  # numbers or texts: nothing to look into
        return [_without_nulls(item) for item in value]
    return value


def count_rows(path: Path) -> int | None:
    """Rows of a Parquet file, from its footer; None where it has none to be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowException, OSError):
        return None
