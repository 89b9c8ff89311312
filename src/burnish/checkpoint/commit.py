"""Saving: staged out of sight, hashed, made durable, and renamed into place as one act.

A reader sees a checkpoint whole or not at all, whenever the machine dies:

1. a hidden sibling `.staging-step-…` takes the files;
2. every rank fsyncs and hashes the files that it wrote itself;
3. rank 0 gathers the hashes, writes `state.json`, and `MANIFEST.json` last, and fsyncs them;
4. it renames the folder to `step-…` and fsyncs the parent.

Only after that may older checkpoints be pruned (`retention.py`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from burnish.checkpoint.manifest import (
    ENGINE_FOLDER,
    FOLDER,
    FileEntry,
    checkpoint_path,
    hash_file,
    write_manifest,
    write_state,
)
from burnish.durable import fsync_folders, fsync_path
from burnish.engine.base import Engine
from burnish.errors import CheckpointError, Problem
from burnish.records import TrainState
from burnish.runtime import Ranks, barrier, gather_objects, random_state

STAGING_PREFIX = ".staging-"
REPLACED_PREFIX = ".replaced-"

T = TypeVar("T")


def save_checkpoint(engine: Engine, state: TrainState, run_dir: Path, ranks: Ranks) -> Path:
    """Commit a checkpoint of the engine and `state`; every rank calls this at a step's end.

    The random state of every rank and the world size are added to `state` here.

    Args:
        engine: Writes its own state.
        state: Where the run stands.
        run_dir: The run's folder, on a file system that all ranks share.
        ranks: This process among the others.

    Returns:
        The checkpoint's folder, in place and durable when this returns.

    Raises:
        CheckpointError: Some rank could not write (a full disk, for one). Nothing was changed.
    """
    final = checkpoint_path(run_dir, state.step)
    staging = final.parent / f"{STAGING_PREFIX}{final.name}"
    try:
        _agree(lambda: _prepare_staging(staging) if ranks.is_main else None, ranks)
        entries = _agree(lambda: _seal(_written(engine, staging / ENGINE_FOLDER, ranks), staging), ranks)
        random_states = gather_objects(random_state(), ranks)
        rng = {str(rank): value for rank, value in enumerate(random_states)}
        state = replace(state, rng=rng, world_size=ranks.world_size)
        sealed = [entry for rank_entries in entries for entry in rank_entries]
        _agree(lambda: _commit(staging, final, sealed, state) if ranks.is_main else None, ranks)
    except CheckpointError:
        if ranks.is_main:
            shutil.rmtree(staging, ignore_errors=True)  # a full disk is to have its room back
        raise
    barrier(ranks)
    return final


def _prepare_staging(staging: Path) -> None:
    if staging.exists():  # what is left of a save that died
        shutil.rmtree(staging)
    (staging / ENGINE_FOLDER).mkdir(parents=True)


def _written(engine: Engine, folder: Path, ranks: Ranks) -> Sequence[Path]:
    """This rank's files of the engine's state. Other ranks may wait inside the engine's own collectives, so
    a rank that fails ends at once instead of meeting them: its launcher then stops them.

    Raises:
        CheckpointError: They cannot be written; torch.save says that with a RuntimeError from its zip writer.
    """
    try:
        return engine.save_state(folder)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        what = f"could not be written: rank {ranks.rank}: {folder}: {error}"
        raise CheckpointError(Problem(FOLDER, what, "Check disk space and permissions.")) from error


def _seal(files: Sequence[Path], staging: Path) -> list[FileEntry]:
    """Make this rank's files durable and hash them. By the rank that wrote them: on a network file
    system only the writer's fsync covers what its host still holds back."""
    entries = []
    for path in files:
        fsync_path(path)
        entries.append(replace(hash_file(path), name=path.relative_to(staging).as_posix()))
    return entries


def _commit(staging: Path, final: Path, entries: list[FileEntry], state: TrainState) -> None:
    """Rank 0's part: state, manifest, rename."""
    expected = {entry.name for entry in entries}
    present = {p.relative_to(staging).as_posix() for p in staging.rglob("*") if p.is_file()}
    # A file that no rank claimed would not be covered by the manifest; better to find out here.
    if present != expected:
        raise OSError(f"files written and files claimed differ: {sorted(present ^ expected)[:3]}")
    entries = [*entries, *_seal([write_state(staging, state)], staging)]
    fsync_path(write_manifest(staging, entries))
    fsync_folders(staging)
    replaced = final.parent / f"{REPLACED_PREFIX}{final.name}"
    if final.exists():  # the same step from before a resume, or a folder that was found damaged
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    staging.rename(final)
    fsync_path(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _agree(work: Callable[[], T], ranks: Ranks) -> list[T]:
    """Do this rank's part; every rank gets all results, or every rank the same error.

    Raises:
        CheckpointError: The part failed on some rank.
    """
    result: T | None = None
    failure: str | None = None
    try:
        result = work()
    except OSError as error:
        failure = f"rank {ranks.rank}: {error}"
    outcomes = gather_objects((result, failure), ranks)
    failures = [f for _, f in outcomes if f is not None]
    if failures:
        raise CheckpointError(
            Problem(
                FOLDER, "could not be written: " + "; ".join(failures), "Check disk space and permissions."
            ),
            everywhere=True,
        )
    return [value for value, _ in outcomes]
