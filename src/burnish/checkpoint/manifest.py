"""Where checkpoints lie, what is in one, and whether it is whole. Reads only; no torch.

```
checkpoints/
  step-00000100/
    engine/…          what the engine wrote (weights, optimizer state)
    state.json        the TrainState: position, random state of every rank, fingerprints, versions
    MANIFEST.json     name, bytes and xxh3-128 of every other file; written last
  .staging-…          a save in hand, or what is left of one that died; never read
```
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from burnish.errors import CheckpointError, Problem
from burnish.records import TrainState

FOLDER = "checkpoints"
MANIFEST_FILE = "MANIFEST.json"
STATE_FILE = "state.json"
ENGINE_FOLDER = "engine"
MANIFEST_VERSION = 1

_NAME = re.compile(r"step-(\d{8,})")
_READ_BYTES = 8 * 2**20

_AN_OLDER_ONE = "Go on from an older checkpoint: `burnish ckpt verify RUN` says which are whole."


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: its name from the checkpoint's folder on, size and hash."""

    name: str
    num_bytes: int
    xxh3_128: str


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` optimizer steps."""
    return run_dir / FOLDER / f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step in a checkpoint folder's name; None if it is not named like one."""
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else None


def committed_paths(run_dir: Path) -> list[Path]:
    """Folders named like checkpoints, newest step first. Whether they are whole is not looked at."""
    folder = run_dir / FOLDER
    if not folder.is_dir():
        return []
    found = [(step_of(p), p) for p in folder.iterdir() if p.is_dir()]
    return [p for _, p in sorted(((s, p) for s, p in found if s is not None), reverse=True)]


def hash_file(path: Path) -> FileEntry:
    """Size and hash of a file's content; the entry's name is the file's own."""
    digest = xxhash.xxh3_128()
    num_bytes = 0
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
    return FileEntry(path.name, num_bytes, digest.hexdigest())


def write_manifest(folder: Path, entries: Iterable[FileEntry]) -> Path:
    """Write MANIFEST.json; the caller makes it durable."""
    path = folder / MANIFEST_FILE
    files = [asdict(entry) for entry in sorted(entries, key=lambda e: e.name)]
    path.write_text(json.dumps({"version": MANIFEST_VERSION, "files": files}, indent=1) + "\n")
    return path


def read_manifest(folder: Path) -> list[FileEntry]:
    """The files that the checkpoint must have.

    Raises:
        CheckpointError: There is no manifest (the save did not finish), or it cannot be read.
    """
    path = folder / MANIFEST_FILE
    try:
        content = json.loads(path.read_text())
        if content["version"] != MANIFEST_VERSION:
            raise CheckpointError(
                Problem(str(path), f"version {content['version']} is not known", "Use a newer Burnish.")
            )
        return [FileEntry(f["name"], f["num_bytes"], f["xxh3_128"]) for f in content["files"]]
    except FileNotFoundError as error:
        raise CheckpointError(
            Problem(str(folder), "has no MANIFEST.json: the save never finished", _AN_OLDER_ONE)
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(Problem(str(path), f"cannot be read: {error}", _AN_OLDER_ONE)) from error


def _file_problem(folder: Path, entry: FileEntry) -> str | None:
    """What is wrong with one file of a checkpoint; None if it is as the manifest says."""
    path = folder / entry.name
    try:
        size = path.stat().st_size
        if size != entry.num_bytes:
            return f"{entry.name} has {size} bytes instead of {entry.num_bytes}"
        if hash_file(path).xxh3_128 != entry.xxh3_128:
            return f"{entry.name} is damaged: its hash differs from the manifest's"
    except OSError as error:
        return f"{entry.name} cannot be read: {error.strerror}"
    return None


def verify(folder: Path, share: slice = slice(None)) -> list[str]:
    """Everything that is wrong with a checkpoint; an empty list means it is whole.

    Every byte is read. Files that the manifest does not name are ignored.

    Args:
        folder: The checkpoint's.
        share: Which of the manifest's files to read; others read the rest.
    """
    try:
        entries = read_manifest(folder)
    except CheckpointError as error:
        return [problem.what for problem in error.problems]
    problems = [problem for entry in entries[share] if (problem := _file_problem(folder, entry)) is not None]
    if not any(entry.name == STATE_FILE for entry in entries):
        problems.append(f"{MANIFEST_FILE} does not name {STATE_FILE}")
    return problems


def write_state(folder: Path, state: TrainState) -> Path:
    """Write state.json; the caller makes it durable."""
    path = folder / STATE_FILE
    path.write_text(json.dumps(asdict(state), indent=1) + "\n")
    return path


def read_state(folder: Path) -> TrainState:
    """The TrainState of a checkpoint.

    Raises:
        CheckpointError: It cannot be read, or was written by another version of this record.
    """
    path = folder / STATE_FILE
    try:
        content: Mapping[str, object] = json.loads(path.read_text())
        return TrainState(**content)  # pyright: ignore[reportArgumentType] - checked by who wrote it
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(Problem(str(path), f"cannot be read: {error}", _AN_OLDER_ONE)) from error
