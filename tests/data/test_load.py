"""Every kind of file gives the same rows, each with its place; streams; and says what is broken."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from burnish.config.check import DATA_SUFFIXES
from burnish.config.schema import SourceConfig
from burnish.data import json_files
from burnish.data.load import (
    COMPRESSIONS,
    ROW_KINDS,
    expand_source,
    file_facts,
    read_rows,
    source_names,
)
from burnish.errors import DataError

ROWS = [{"prompt": f'Say {i}, "twice"\nplease', "completion": "né 你好 " * i} for i in range(1, 8)]


def read(path: Path | str, **keys) -> list:
    return list(read_rows(SourceConfig(path=str(path), **keys)))


def values(path: Path | str, **keys) -> list:
    rows = read(path, **keys)
    assert [row.problem for row in rows] == [None] * len(rows)
    return [row.value for row in rows]


def test_a_file_name_that_is_not_utf8_is_told(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).write_text('{"prompt": "a", "completion": "b"}')
    for path in (tmp_path, tmp_path / os.fsdecode(b"caf\xe9.jsonl")):
        with pytest.raises(DataError, match=r"caf\\udce9\.jsonl'?: the file's name is not UTF-8"):
            expand_source(SourceConfig(path=str(path)))


def lines() -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def write_csv(path: Path, delimiter: str) -> None:
    import csv

    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["prompt", "completion"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write(folder: Path, name: str) -> Path:
    path = folder / name
    text = lines()
    writers = {
        "a.jsonl": lambda: path.write_text(text, "utf-8"),
        "a.ndjson": lambda: path.write_text(text, "utf-8"),
        "a.jsonl.gz": lambda: path.write_bytes(gzip.compress(text.encode())),
        "a.jsonl.bz2": lambda: path.write_bytes(bz2.compress(text.encode())),
        "a.jsonl.xz": lambda: path.write_bytes(lzma.compress(text.encode())),
        "a.jsonl.zst": lambda: path.write_bytes(pa.compress(text.encode(), "zstd", asbytes=True)),
        "a.json": lambda: path.write_text(json.dumps(ROWS), "utf-8"),
        "pretty.json": lambda: path.write_text(json.dumps(ROWS, indent=2, ensure_ascii=False), "utf-8"),
        "lines.json": lambda: path.write_text(text, "utf-8"),
        "wrapped.json": lambda: path.write_text(json.dumps({"version": 1, "data": ROWS}), "utf-8"),
        "pretty_wrapped.json": lambda: path.write_text(json.dumps({"train": ROWS}, indent=1), "utf-8"),
        "a.json.gz": lambda: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
        "a.csv": lambda: write_csv(path, ","),
        "semicolon.csv": lambda: write_csv(path, ";"),
        "a.tsv": lambda: write_csv(path, "\t"),
        "a.parquet": lambda: pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=3),
        "a.feather": lambda: pyarrow.feather.write_feather(pa.Table.from_pylist(ROWS), path),
        "a.arrow": lambda: write_stream(path),
    }
    writers[name]()
    return path


def write_stream(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


NAMES = [
    *("a.jsonl", "a.ndjson", "a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst"),
    *("a.json", "pretty.json", "lines.json", "wrapped.json", "pretty_wrapped.json", "a.json.gz"),
    *("a.csv", "semicolon.csv", "a.tsv", "a.parquet", "a.feather", "a.arrow"),
]


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    path = write(tmp_path, name)
    assert values(path) == ROWS
    assert values(path, max_examples=2) == ROWS[:2]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_json_arrays_are_read_in_pieces(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_files, "CHUNK_CHARACTERS", chunk)
    path = write(tmp_path, "pretty.json")
    assert values(path) == ROWS
    numbers = tmp_path / "numbers.json"
    numbers.write_text('[ {"text": "a", "n": [1234567, 1e5]} , {"text": "\\u00e9"}\n]')
    assert values(numbers) == [{"text": "a", "n": [1234567, 1e5]}, {"text": "é"}]


def test_the_rows_of_another_split_are_no_stand_in(tmp_path):
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"train": ROWS, "val": ROWS[:1]}, indent=1))
    assert values(path) == ROWS
    assert values(path, split="val") == ROWS[:1]
    assert values(path, split="validation") == [{"train": ROWS, "val": ROWS[:1]}]


def test_places_are_lines_where_there_are_lines(tmp_path):
    assert [r.place for r in read(write(tmp_path, "a.jsonl"))][-1] == f"{tmp_path}/a.jsonl:7"
    assert [r.place for r in read(write(tmp_path, "pretty.json"))][:2] == [
        f"{tmp_path}/pretty.json:2",
        f"{tmp_path}/pretty.json:6",
    ]
    # All on one line: a line number would name every row at once.
    assert [r.place for r in read(write(tmp_path, "a.json"))][:2] == [
        f"{tmp_path}/a.json#0",
        f"{tmp_path}/a.json#1",
    ]
    # A quoted cell spans two lines, so rows stand on every other line under the header.
    assert [r.place for r in read(write(tmp_path, "a.csv"))][:2] == [
        f"{tmp_path}/a.csv:2",
        f"{tmp_path}/a.csv:4",
    ]
    assert read(write(tmp_path, "a.parquet"))[4].place == f"{tmp_path}/a.parquet#4"


def test_struct_fields_that_arrow_made_up_are_absent(tmp_path):
    calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": [None, 2]}}]
    rows = [{"messages": [{"role": "assistant", "tool_calls": [call]}], "x": None} for call in calls]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [v["messages"][0]["tool_calls"][0] for v in values(tmp_path / "a.parquet")] == calls


def test_folders_globs_and_splits(tmp_path):
    for name in ("b.jsonl", "a.jsonl", ".hidden.jsonl", "notes.md"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    assert [v["text"] for v in values(tmp_path)] == ["a.jsonl", "b.jsonl"]
    assert [v["text"] for v in values(f"{tmp_path}/*.jsonl")] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(DataError, match="no files of split 'test'; none is named after a split"):
        values(tmp_path, split="test")
    (tmp_path / "train-00001.jsonl").write_text('{"text": "train"}')
    (tmp_path / "my_test.jsonl").write_text('{"text": "test"}')
    assert [v["text"] for v in values(tmp_path)] == ["train"]
    assert [v["text"] for v in values(tmp_path, split="test")] == ["test"]
    with pytest.raises(DataError, match="other splits: test, train"):
        expand_source(SourceConfig(path=str(tmp_path), split="validation"))


def test_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one", num_shards=2)
    assert values(tmp_path / "one") == ROWS
    both = datasets.DatasetDict({"train": saved, "test": saved.select([3, 1])})
    both.save_to_disk(tmp_path / "two")
    assert values(tmp_path / "two") == ROWS
    assert values(tmp_path / "two", split="test") == [ROWS[3], ROWS[1]]
    with pytest.raises(DataError, match="no split 'dev'"):
        expand_source(SourceConfig(path=str(tmp_path / "two"), split="dev"))


def test_hub_names_go_through_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "train.jsonl").write_text(lines(), "utf-8")
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        file = str(tmp_path / name / "train.jsonl")
        return real("json", data_files=file, split=split, cache_dir=tmp_path / "c")

    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load)
    source = SourceConfig(path="owner/name:main")
    assert [row.value for row in read_rows(source)] == ROWS
    assert asked == [("owner/name", "main", "train")]
    with pytest.raises(DataError, match="slice"):
        expand_source(SourceConfig(path="owner/name", split="train[:10%]"))


def test_what_is_read_is_what_the_config_is_checked_by() -> None:
    assert set(DATA_SUFFIXES) == {*ROW_KINDS, *COMPRESSIONS}


def test_a_hub_name_that_cannot_be_loaded_is_a_data_error(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'no/such' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match="no/such: cannot be loaded from the hub"):
        expand_source(SourceConfig(path="no/such"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("trian.jsonl", "Did you mean .*train.jsonl"),
        ("nothing/*.jsonl", "no file matches"),
        ("words.txt", "ending is not one"),
        ("a.parquet.gz", "ending is not one"),
        ("empty_folder", "no file in this folder holds rows"),
    ],
)
def test_missing_files_are_named(tmp_path, path, message):
    (tmp_path / "train.jsonl").write_text("{}")
    (tmp_path / "words.txt").write_text("hello")
    (tmp_path / "a.parquet.gz").write_text("hello")
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(DataError, match=message):
        expand_source(SourceConfig(path=str(tmp_path / path)))


@pytest.mark.parametrize("name", ["bad.parquet", "bad.arrow"])
def test_files_that_are_not_what_they_say(tmp_path, name):
    (tmp_path / name).write_bytes(b"no such thing")
    with pytest.raises(DataError, match="not a readable"):
        read(tmp_path / name)


def test_the_hash_is_of_the_contents(tmp_path):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.write_text(lines(), "utf-8")
    b.write_text(lines(), "utf-8")
    assert file_facts(a) == file_facts(b)
    before, stat = file_facts(a).digest, a.stat()
    a.write_text(lines().replace("Say 3", "Say 4"), "utf-8")
    import os

    os.utime(a, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time, other content
    assert file_facts(a).digest != before
    assert file_facts(a).num_rows == len(ROWS)


def test_sources_have_names_of_their_own():
    paths = ["x/train.jsonl.gz", "y/train.json", "owner/name", "z/*.csv"]
    sources = [SourceConfig(path=path) for path in paths] + [SourceConfig(path="x", name="mine")]
    assert source_names(sources) == ("train", "train-2", "name", "z/*.csv", "mine")


def test_a_large_file_is_not_held_in_memory(tmp_path):
    import tracemalloc

    row = {"text": "x" * 10_000}
    (tmp_path / "a.jsonl").write_text((json.dumps(row) + "\n") * 1000)
    (tmp_path / "a.json").write_text(json.dumps([row] * 1000))
    pq.write_table(pa.Table.from_pylist([row] * 1000), tmp_path / "a.parquet", row_group_size=50)
    for name in ("a.jsonl", "a.json", "a.parquet"):
        tracemalloc.start()
        assert sum(1 for _ in read_rows(SourceConfig(path=str(tmp_path / name)))) == 1000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 7e6, f"{name}: {peak:,} bytes"  # the rows are 10 MB
