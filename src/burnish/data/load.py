"""From a source in the config to its files, their content hash, and a stream of rows."""

from __future__ import annotations

import difflib
import glob
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from burnish.config.check import may_be_hub_data
from burnish.config.schema import SourceConfig
from burnish.data.arrow_files import count_rows, read_arrow, read_parquet
from burnish.data.csv_files import read_csv
from burnish.data.json_files import read_json, read_jsonl
from burnish.data.rows import COPY_AGAIN, Row, unreadable
from burnish.errors import DataError, Problem

__all__ = ["Row", "expand_source", "file_facts", "read_rows", "source_names"]

ROW_KINDS: Mapping[str, str] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
"""File endings that hold rows."""
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
UNCOMPRESSED_ONLY = ("parquet", "arrow")
"""Kinds that are read at random places, and compress by themselves."""
HASH_CHUNK_BYTES = 4 << 20

SPLIT_WORDS: Mapping[str, str] = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
}
"""Words in file names that say which split a file belongs to."""


@dataclass(frozen=True)
class FileFacts:
    """What one pass over a file's bytes tells."""

    digest: str
    """xxh3-128 of the contents, in hex."""
    num_bytes: int
    num_rows: int | None
    """About how many rows there are; None where only reading would tell."""


def source_names(sources: Sequence[SourceConfig]) -> tuple[str, ...]:
    """A name for each source: its own, or its file's; a second one of a name gets `-2`."""
    names: list[str] = []
    for source in sources:
        name = source.name or _short_name(source.path)
        count = 2
        unique = name
        while unique in names:
            unique = f"{name}-{count}"
            count += 1
        names.append(unique)
    return tuple(names)


def _short_name(path: str) -> str:
    if any(character in path for character in "*?["):
        return path
    name = Path(path).name
    for suffix in (*COMPRESSIONS, *ROW_KINDS):
        name = name.removesuffix(suffix)
    return name or path


def row_kind(path: Path) -> str | None:
    """What kind of rows the file's name promises, looking through one compression ending."""
    suffix = path.suffix.lower()
    if suffix not in COMPRESSIONS:
        return ROW_KINDS.get(suffix)
    inner = ROW_KINDS.get(Path(path.stem).suffix.lower())
    return None if inner in UNCOMPRESSED_ONLY else inner


def expand_source(source: SourceConfig) -> list[Path]:
    """The files of a source, in the order in which they are read (by name, but for datasets).

    A path that exists is a file, a folder that `datasets` saved, or a folder of files (whose names
    may say the split). Else it is a glob, or a name on the hub, `owner/name` or `owner/name:config`.

    Raises:
        DataError: There is no such thing, or nothing in it that holds rows.
    """
    path = Path(source.path).expanduser()
    if path.is_dir():
        files = _folder_files(path, source.split)
    elif path.exists():
        files = [path]
    elif any(character in source.path for character in "*?["):
        # Path.glob refuses absolute patterns.
        found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207
        files = [file for file in map(Path, found) if file.is_file()]
        if not files:
            raise DataError(Problem(source.path, "no file matches", "Look at the folder and the pattern."))
    elif may_be_hub_data(source.path):
        files = _hub_files(source)
    else:
        raise DataError(_missing(path))
    for file in files:
        if not _is_utf8(file):
            cure = "Rename it: places in it are named in UTF-8, in the prepared data and in reports."
            raise DataError(Problem(ascii(str(file)), "the file's name is not UTF-8", cure))
        if row_kind(file) is None:
            known = " ".join(ROW_KINDS)
            cure = f"Known are {known}, and with {' '.join(COMPRESSIONS)} behind them those that are text."
            raise DataError(Problem(str(file), "the file's ending is not one that holds rows", cure))
    return files


def _is_utf8(file: Path) -> bool:
    try:
        str(file).encode()
    except UnicodeEncodeError:
        return False
    return True


def _missing(path: Path) -> Problem:
    siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    if near:
        return Problem(str(path), "no such file", f"Did you mean {path.parent / near[0]}?")
    return Problem(str(path), "no such file or folder", "Relative paths start where the command is called.")


def _folder_files(folder: Path, split: str) -> list[Path]:
    if (folder / "dataset_dict.json").exists():
        return _saved_files(folder / split, f"{folder} has no split {split!r}")
    if (folder / "state.json").exists():
        return _saved_files(folder, "")
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and row_kind(file) and not _is_hidden(file.relative_to(folder))
    )
    if not files:
        raise DataError(Problem(str(folder), "no file in this folder holds rows", "Give a file or a glob."))
    splits = {file: _split_of(file.relative_to(folder)) for file in files}
    named = {name for name in splits.values() if name}
    wanted = SPLIT_WORDS.get(split, split)
    if not named:
        # A JSON file may hold its splits inside. Any other is all there is: no rows to call a test split.
        if wanted == "train" or any(row_kind(file) == "json" for file in files):
            return files
        cure = "Put the split into the files' names, or give the files of it as path and leave out split."
        raise DataError(
            Problem(str(folder), f"no files of split {split!r}; none is named after a split", cure)
        )
    if wanted not in named:
        found = f"its files are named after other splits: {', '.join(sorted(named))}"
        raise DataError(
            Problem(str(folder), f"no files of split {split!r}; {found}", "Set split of the source.")
        )
    return [file for file in files if splits[file] == wanted]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _split_of(path: Path) -> str | None:
    """The split that a file's name, or else one of its folders, says it belongs to."""
    for part in reversed(path.parts):
        for word in re.split(r"[^a-zA-Z]+", part.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return None


def _saved_files(folder: Path, missing: str) -> list[Path]:
    """Files of a dataset that `save_to_disk` wrote, in its own order."""
    try:
        state = json.loads((folder / "state.json").read_text("utf-8"))
        files = [folder / str(item["filename"]) for item in state["_data_files"]]
    except FileNotFoundError as error:
        raise DataError(
            Problem(str(folder), missing or "no state.json", "Set split of the source.")
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        what = f"not what save_to_disk writes: {error}"
        raise DataError(Problem(str(folder / "state.json"), what, COPY_AGAIN)) from error
    absent = [file for file in files if not file.exists()]
    if absent:
        raise DataError(Problem(str(absent[0]), "the saved dataset lacks this file", COPY_AGAIN))
    return files


def _hub_files(source: SourceConfig) -> list[Path]:
    """Download a hub dataset's split, and give the Arrow files that hold it."""
    if "[" in source.split:
        raise DataError(
            Problem(source.path, f"split {source.split!r} is a slice", "Name the split; use max_examples.")
        )
    import datasets
    from datasets.exceptions import DatasetsError

    name, _, config = source.path.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None, split=source.split)
    except (OSError, ValueError, DatasetsError) as error:
        cure = "If it is meant to be a file, there is none of this name. Else check name, split and network."
        raise DataError(Problem(source.path, f"cannot be loaded from the hub: {error}", cure)) from error
    return [Path(item["filename"]) for item in loaded.cache_files]  # type: ignore[union-attr]


def file_facts(path: Path) -> FileFacts:
    """Hash a file and count its rows, in one pass over its bytes.

    The contents are hashed every time (17 GiB/s a core): a size and a time of change do not prove
    that a file is the same, and a stale cache trains on the wrong data in silence.
    """
    import xxhash

    digest = xxhash.xxh3_128()
    kind = row_kind(path)
    by_lines = kind in ("jsonl", "csv", "tsv") and path.suffix.lower() not in COMPRESSIONS
    num_bytes = num_lines = 0
    try:
        with path.open("rb", buffering=0) as stream:
            while chunk := stream.read(HASH_CHUNK_BYTES):
                digest.update(chunk)
                num_bytes += len(chunk)
                num_lines += chunk.count(b"\n") if by_lines else 0
    except OSError as error:
        raise unreadable(path, error) from error
    num_rows = num_lines if by_lines else count_rows(path) if kind == "parquet" else None
    return FileFacts(digest.hexdigest(), num_bytes, num_rows)


def read_rows(
    source: SourceConfig, files: Sequence[Path] | None = None, name: str | None = None
) -> Iterator[Row]:
    """The rows of a source, streaming, at most `max_examples` of them.

    Args:
        source: Which files, and which rows of them.
        files: What `expand_source` gave, where the caller has it.
        name: How the rows call their source; None takes the source's own name.

    Raises:
        DataError: A file cannot be opened, or is not what its name says.
    """
    called = name or source_names([source])[0]
    rows = itertools.chain.from_iterable(
        read_file(file, called, source.split) for file in (files or expand_source(source))
    )
    return itertools.islice(rows, source.max_examples)


def read_file(path: Path, source: str, split: str) -> Iterator[Row]:
    """The rows of one file, by its ending; `split` is a key under which JSON may hold them."""
    kind = row_kind(path)
    readers: Mapping[str | None, Callable[[], Iterator[Row]]] = {
        "jsonl": lambda: read_jsonl(path, source),
        "json": lambda: read_json(path, source, split),
        "csv": lambda: read_csv(path, source, ","),
        "tsv": lambda: read_csv(path, source, "\t"),
        "parquet": lambda: read_parquet(path, source),
        "arrow": lambda: read_arrow(path, source),
    }
    return readers[kind]()
