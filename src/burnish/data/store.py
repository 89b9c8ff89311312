"""Prepared examples on disk: memory-mapped Arrow, one folder per source, read by every rank.

A folder ("part") holds `tokens.arrow` (what a step needs of an example) and `index.arrow` (one
record batch of numbers per example, which planning reads whole):

    tokens.arrow   token_ids list<int32> | weights list<float32> | row text
    index.arrow    length | supervised | weight | tokens_cut | supervised_cut | hash_low | hash_high | piece
                   | prefix

A store is a choice of examples out of some parts: the training set and the evaluation set may share
the same files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import pyarrow as pa
import xxhash
from jaxtyping import Float64, Int32, Int64, UInt64

from burnish.data.prefix_tree import MIN_PREFIX_TOKENS
from burnish.records import Example

TOKENS_FILE = "tokens.arrow"
INDEX_FILE = "index.arrow"
WRITE_EXAMPLES = 4096
"""Examples per record batch on disk: few enough to build in memory, enough to find them fast."""

TOKENS_SCHEMA = pa.schema(
    [
        pa.field("token_ids", pa.list_(pa.int32())),
        pa.field("weights", pa.list_(pa.float32())),
        pa.field("row", pa.string()),
    ]
)
INDEX_SCHEMA = pa.schema(
    [
        pa.field("length", pa.int64()),
        pa.field("supervised", pa.int64()),
        pa.field("weight", pa.float64()),
        pa.field("tokens_cut", pa.int64()),
        pa.field("supervised_cut", pa.int64()),
        pa.field("hash_low", pa.uint64()),
        pa.field("hash_high", pa.uint64()),
        pa.field("piece", pa.int64()),
        pa.field("prefix", pa.uint64()),
    ]
)


def tokens_batch(examples: Sequence[Example]) -> pa.RecordBatch:
    """Examples as a record batch of `TOKENS_SCHEMA`."""
    lengths = np.array([0, *(len(e.token_ids) for e in examples)], np.int32)
    offsets = pa.array(np.cumsum(lengths, dtype=np.int32))
    ids = np.concatenate([np.empty(0, np.int32), *(e.token_ids for e in examples)])
    weights = np.concatenate([np.empty(0, np.float32), *(e.weights for e in examples)])
    columns = [
        pa.ListArray.from_arrays(offsets, pa.array(ids, pa.int32())),
        pa.ListArray.from_arrays(offsets, pa.array(weights, pa.float32())),
        pa.array([e.row for e in examples], pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=TOKENS_SCHEMA)


def index_batch(
    examples: Sequence[Example],
    cuts: Sequence[tuple[int, int]],
    row_hashes: Sequence[int],
    pieces: Sequence[int],
) -> pa.RecordBatch:
    """What planning needs of these examples, as a record batch of `INDEX_SCHEMA`.

    Args:
        examples: Any number of them.
        cuts: Of each example, how many tokens and supervised tokens were cut off.
        row_hashes: Of each example, a 128-bit hash of the row it came from.
        pieces: Of each example, which piece of its row it is, from 0.
    """
    mask = (1 << 64) - 1
    lengths = np.array([len(e.token_ids) for e in examples], np.int64)
    # Of the targets alone: nothing has to produce an example's first token.
    targets = np.concatenate([np.empty(0, np.float32), *(e.weights[1:] for e in examples)])
    owners = np.repeat(np.arange(len(lengths)), np.maximum(lengths - 1, 0))
    columns = [
        pa.array(lengths, pa.int64()),
        pa.array(np.bincount(owners[targets > 0], minlength=len(lengths)), pa.int64()),
        pa.array(np.bincount(owners, targets, minlength=len(lengths)), pa.float64()),
        pa.array([cut[0] for cut in cuts], pa.int64()),
        pa.array([cut[1] for cut in cuts], pa.int64()),
        pa.array([value & mask for value in row_hashes], pa.uint64()),
        pa.array([value >> 64 for value in row_hashes], pa.uint64()),
        pa.array(pieces, pa.int64()),
        pa.array([_prefix_hash(e.token_ids) for e in examples], pa.uint64()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=INDEX_SCHEMA)


def _prefix_hash(token_ids: Int32[np.ndarray, " tokens"]) -> int:
    """Equal for examples that begin with the same tokens, as many as are worth sharing; 0 for fewer."""
    if len(token_ids) < MIN_PREFIX_TOKENS:
        return 0
    return xxhash.xxh3_64_intdigest(token_ids[:MIN_PREFIX_TOKENS].tobytes())


@final
class PartWriter:
    """Writes the examples of one source into a folder, batch by batch.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sink = pa.OSFile(str(folder / TOKENS_FILE), "wb")
        self._writer = pa.ipc.new_file(self._sink, TOKENS_SCHEMA)
        self._waiting: list[pa.RecordBatch] = []
        self._index: list[pa.RecordBatch] = []
        self._digest = xxhash.xxh3_128()

    def add(self, tokens: pa.RecordBatch, index: pa.RecordBatch) -> None:
        """Append examples: a batch of each schema, of the same length."""
        if not tokens.num_rows:
            return
        for name in ("token_ids", "weights"):
            self._digest.update(_flat(tokens.column(name)).tobytes())
        self._digest.update(index.column("length").to_numpy().tobytes())
        self._waiting.append(tokens)
        self._index.append(index)
        if sum(batch.num_rows for batch in self._waiting) >= WRITE_EXAMPLES:
            self._flush()

    def close(self) -> str:
        """Write what is left; returns the xxh3-128 of all tokens and weights, in hex."""
        self._flush()
        self._writer.close()
        self._sink.close()
        table = pa.Table.from_batches(self._index, INDEX_SCHEMA).combine_chunks()
        with (
            pa.OSFile(str(self._folder / INDEX_FILE), "wb") as sink,
            pa.ipc.new_file(sink, INDEX_SCHEMA) as writer,
        ):
            writer.write_table(table)
        return self._digest.hexdigest()

    def _flush(self) -> None:
        if self._waiting:
            table = pa.Table.from_batches(self._waiting, TOKENS_SCHEMA).combine_chunks()
            self._writer.write_table(table)
            self._waiting = []


@final
class Part:
    """The examples of one source, mapped from disk or held in memory.

    Args:
        tokens: Record batches of `TOKENS_SCHEMA`.
        index: Record batches of `INDEX_SCHEMA`, of as many rows in all.
    """

    def __init__(self, tokens: Sequence[pa.RecordBatch], index: Sequence[pa.RecordBatch]) -> None:
        self._tokens = tokens
        table = pa.Table.from_batches(list(index), INDEX_SCHEMA)
        self._columns = {name: table.column(name).to_numpy() for name in INDEX_SCHEMA.names}
        self._starts = np.cumsum([0, *(batch.num_rows for batch in tokens)], dtype=np.int64)
        self._views: dict[int, tuple[Any, Any, Any]] = {}
        if self._starts[-1] != table.num_rows:
            raise ValueError(f"{self._starts[-1]} examples, but an index of {table.num_rows}")

    @classmethod
    def open(cls, folder: Path) -> Part:
        """Map the part that a `PartWriter` left in this folder."""
        tokens = pa.ipc.open_file(pa.memory_map(str(folder / TOKENS_FILE)))
        index = pa.ipc.open_file(pa.memory_map(str(folder / INDEX_FILE)))
        return cls(
            [tokens.get_batch(i) for i in range(tokens.num_record_batches)],
            [index.get_batch(i) for i in range(index.num_record_batches)],
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def column(self, name: str) -> Any:
        """A column of the index, one number per example."""
        return self._columns[name]

    def arrays(self, number: int) -> tuple[Int32[np.ndarray, " tokens"], Any]:
        """Token ids and weights of one example, as read-only views of the mapped file."""
        which, row = self._locate(number)
        if which not in self._views:
            batch = self._tokens[which]
            ids, weights = batch.column("token_ids"), batch.column("weights")
            self._views[which] = (ids.offsets.to_numpy(), ids.values.to_numpy(), weights.values.to_numpy())
        offsets, ids, weights = self._views[which]
        return ids[offsets[row] : offsets[row + 1]], weights[offsets[row] : offsets[row + 1]]

    def row(self, number: int) -> str:
        """Where the example's row stands."""
        which, row = self._locate(number)
        return self._tokens[which].column("row")[row].as_py()

    def _locate(self, number: int) -> tuple[int, int]:
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        return which, number - int(self._starts[which])


@final
class ExampleStore:
    """Examples by number, and arrays of numbers about all of them.

    Args:
        parts: One per source.
        source_names: Of each part, the source's name.
        source_ids: Of each example, the number of its part; None: every example of every part.
        numbers: Of each example, its number within the part; given with `source_ids`.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        source_names: Sequence[str],
        source_ids: Int32[np.ndarray, " examples"] | None = None,
        numbers: Int64[np.ndarray, " examples"] | None = None,
    ) -> None:
        self._parts = tuple(parts)
        self.source_names = tuple(source_names)
        if source_ids is None or numbers is None:
            sizes = [len(part) for part in parts]
            source_ids = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
            numbers = np.concatenate([np.arange(size, dtype=np.int64) for size in sizes])
        self.source_ids: Int32[np.ndarray, " examples"] = source_ids
        self._numbers = numbers
        self.num_tokens: Int64[np.ndarray, " examples"] = self._column("length", np.int64)
        self.num_supervised: Int64[np.ndarray, " examples"] = self._column("supervised", np.int64)
        self.total_weight: Float64[np.ndarray, " examples"] = self._column("weight", np.float64)

    @classmethod
    def from_examples(cls, examples: Sequence[Example]) -> ExampleStore:
        """A store in memory: example i of it is `examples[i]`."""
        names = list(dict.fromkeys(example.source for example in examples))
        source_ids = np.array([names.index(example.source) for example in examples], np.int32)
        numbers = np.zeros(len(examples), np.int64)
        parts = []
        for which, name in enumerate(names):
            own = [example for example in examples if example.source == name]
            numbers[source_ids == which] = np.arange(len(own))
            hashes = [xxhash.xxh3_128_intdigest(e.token_ids.tobytes() + e.weights.tobytes()) for e in own]
            parts.append(
                Part([tokens_batch(own)], [index_batch(own, [(0, 0)] * len(own), hashes, [0] * len(own))])
            )
        return cls(parts, names, source_ids, numbers)

    @classmethod
    def joined(cls, stores: Sequence[ExampleStore]) -> ExampleStore | None:
        """All examples of the stores, one store after the other; None where there is no store.
        A second source of a name gets `-2`."""
        if not stores:
            return None
        parts: list[Part] = []
        names: list[str] = []
        ids: list[Any] = []
        for store in stores:
            ids.append(store.source_ids + np.int32(len(parts)))
            parts += store._parts
            names += store.source_names
        numbers = np.concatenate([store._numbers for store in stores])
        return cls(parts, _unique(names), np.concatenate(ids), numbers)

    def subset(self, numbers: Int64[np.ndarray, " chosen"], keep_empty: bool) -> ExampleStore:
        """A store of these examples, in this order.

        Args:
            numbers: Of examples of this store.
            keep_empty: Keep sources of which no example was chosen, and so every source's number.
        """
        ids = self.source_ids[numbers]
        if keep_empty:
            return ExampleStore(self._parts, self.source_names, ids, self._numbers[numbers])
        used, ids = np.unique(ids, return_inverse=True)
        parts = [self._parts[which] for which in used]
        names = [self.source_names[which] for which in used]
        return ExampleStore(parts, names, ids.astype(np.int32).reshape(-1), self._numbers[numbers])

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: int) -> Example:
        """Example `number`, from 0; its arrays are read-only views of the mapped file."""
        if not 0 <= number < len(self):
            raise IndexError(f"example {number} of {len(self)}")
        source = int(self.source_ids[number])
        part, local = self._parts[source], int(self._numbers[number])
        token_ids, weights = part.arrays(local)
        return Example(self.source_names[source], part.row(local), token_ids, weights)

    @property
    def row_hashes(self) -> UInt64[np.ndarray, " examples"]:
        """A hash of the row that each example came from; equal rows have equal ones."""
        return self._column("hash_low", np.uint64)

    @property
    def pieces(self) -> Int64[np.ndarray, " examples"]:
        """Which piece of its row each example is, from 0; above 0 only where rows were split."""
        return self._column("piece", np.int64)

    @property
    def prefix_hashes(self) -> UInt64[np.ndarray, " examples"]:
        """A hash of each example's first `MIN_PREFIX_TOKENS` tokens, 0 where it has fewer."""
        return self._column("prefix", np.uint64)

    def place(self, number: int) -> str:
        """`file:line` of the row that example `number` came from."""
        return self._parts[int(self.source_ids[number])].row(int(self._numbers[number]))

    def origin(self, number: int) -> dict[str, str]:
        """`source` and `row` of example `number`, as `burnish view --source --row` takes them."""
        return {"source": self.source_names[int(self.source_ids[number])], "row": self.place(number)}

    def _column(self, name: str, kind: type) -> Any:
        values = np.empty(len(self._numbers), kind)
        for which, part in enumerate(self._parts):
            own = self.source_ids == which
            values[own] = part.column(name)[self._numbers[own]]
        return values


def _unique(names: Sequence[str]) -> list[str]:
    unique: list[str] = []
    for name in names:
        candidate, count = name, 2
        while candidate in unique:
            candidate, count = f"{name}-{count}", count + 1
        unique.append(candidate)
    return unique


def _flat(column: Any) -> np.ndarray:
    """The numbers of a list column, one after the other."""
    return column.flatten().to_numpy()
