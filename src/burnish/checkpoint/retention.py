"""Which checkpoints stay. Called after a commit, never before."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from burnish.checkpoint.commit import REPLACED_PREFIX, STAGING_PREFIX
from burnish.checkpoint.lock import locked
from burnish.checkpoint.manifest import (
    FOLDER,
    committed_paths,
    read_manifest,
    read_state,
    step_of,
    verify,
)
from burnish.errors import CheckpointError, ConfigError, Problem
from burnish.runtime import log

REMOVED_PREFIX = ".removed-"

_RUN_LEAVES = (FOLDER, "config.yaml", "plan.json", "metrics.jsonl")
"""Each of them says that a folder is a run's: the first checkpoint comes late."""


@dataclass(frozen=True)
class CheckpointInfo:
    """One line of `burnish ckpt ls`."""

    path: Path
    step: int
    num_bytes: int
    world_size: int | None
    best_eval_step: int | None
    problems: tuple[str, ...]
    """What is wrong with it; with `verified` False only what shows without reading every byte."""
    verified: bool


def list_checkpoints(run_dir: Path, verify_bytes: bool = False) -> list[CheckpointInfo]:
    """Every checkpoint of a run, newest first.

    Args:
        run_dir: The run's folder.
        verify_bytes: Also read and hash every file (`burnish ckpt verify`).
    """
    return [_describe(path, verify_bytes) for path in committed_paths(run_dir)]


def _describe(path: Path, verify_bytes: bool) -> CheckpointInfo:
    problems = list(verify(path)) if verify_bytes else []
    num_bytes, world_size, best_eval_step = 0, None, None
    try:
        num_bytes = sum(entry.num_bytes for entry in read_manifest(path))
        state = read_state(path)
        world_size, best_eval_step = state.world_size, state.best_eval_step
    except CheckpointError as error:
        problems = problems or [problem.what for problem in error.problems]
    return CheckpointInfo(
        path, step_of(path) or 0, num_bytes, world_size, best_eval_step, tuple(problems), verify_bytes
    )


def prune(run_dir: Path, keep: int, protected: Collection[Path] = ()) -> list[Path]:
    """Remove all but the `keep` newest checkpoints; never the best one or a protected one.

    By one process only. Folders without a manifest do not count among the `keep`: a damaged newer
    one must not push out the last that can be resumed from. What saves that died left is removed.

    Args:
        run_dir: The run's folder.
        keep: How many to keep, at least 1.
        protected: What stays besides, as the one resumed from.

    Returns:
        What was removed.
    """
    candidates = committed_paths(run_dir)
    finished = [path for path in candidates if _has_manifest(path)]
    staying = {p.resolve() for p in [*finished[: max(keep, 1)], *protected]}
    staying |= {p.resolve() for p in _best_of(finished)}
    removed = [path for path in candidates if path.resolve() not in staying]
    for path in removed:
        _remove(path)
    remove_leftovers(run_dir)
    return removed


def prune_verified(run_dir: Path, keep: int) -> list[Path]:
    """`prune` for a user at rest (`burnish ckpt prune`): the newest one that verifies stays too.

    Raises:
        ConfigError: There is no such folder, it is no run's, or nothing would be kept.
        BusyError: A run is at work there.
    """
    require_run(run_dir)
    if keep < 1:
        raise ConfigError(Problem("--keep", f"is {keep}", "Keep at least 1: a run goes on from the newest."))
    with locked(run_dir):  # what a run is saving looks like what is left of a save that died
        whole = next((path for path in committed_paths(run_dir) if not verify(path)), None)
        return prune(run_dir, keep, [] if whole is None else [whole])


def require_run(run_dir: Path) -> None:
    """Nothing, if the folder is a run's; another one must not look like a run without checkpoints.

    Raises:
        ConfigError: There is no such folder, or it holds nothing that a run leaves.
    """
    cure = "Give a run's output_dir: the folder that holds checkpoints/."
    if not run_dir.is_dir():
        raise ConfigError(Problem(str(run_dir), "there is no such folder", cure))
    if not any((run_dir / name).exists() for name in _RUN_LEAVES):
        raise ConfigError(Problem(str(run_dir), f"is not a run (no {FOLDER}, no {_RUN_LEAVES[-1]})", cure))


def _best_of(finished: list[Path]) -> list[Path]:
    """The checkpoint of the best evaluation, by the newest readable state."""
    for path in finished:
        try:
            best = read_state(path).best_eval_step
        except CheckpointError:
            continue
        return [p for p in finished if step_of(p) == best]
    return []


def _has_manifest(path: Path) -> bool:
    try:
        read_manifest(path)
    except CheckpointError:
        return False
    return True


def _remove(path: Path) -> None:
    """Out of sight first, so that a removal that dies half way leaves no half checkpoint."""
    hidden = path.with_name(f"{REMOVED_PREFIX}{path.name}")
    try:
        path.rename(hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        log.warning("Could not remove the old checkpoint %s: %s", path, error)


def remove_leftovers(run_dir: Path) -> None:
    """Remove what saves and removals that died left, as big as a checkpoint. By who has the run's lock."""
    folder = run_dir / FOLDER
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith((STAGING_PREFIX, REPLACED_PREFIX, REMOVED_PREFIX)):
            shutil.rmtree(path, ignore_errors=True)
