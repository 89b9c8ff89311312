"""Going on: find the newest whole checkpoint, refuse another run's, restore everything."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Collection, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import get_args

from burnish.checkpoint.manifest import (
    ENGINE_FOLDER,
    FOLDER,
    committed_paths,
    read_state,
    step_of,
    verify,
)
from burnish.checkpoint.retention import remove_leftovers
from burnish.config.check import contradictions
from burnish.config.schema import Config, ResumableChange
from burnish.engine.base import Engine
from burnish.engine.build import engine_of
from burnish.errors import CheckpointError, Problem, counted, writing
from burnish.records import TrainState
from burnish.runtime import Ranks, barrier, gather_objects, log, restore_random_state, seed_everything

SET_ASIDE = "set-aside"

_RECORDED_PACKAGES = ("burnish", "torch", "transformers", "deepspeed", "peft", "numpy")


def find_checkpoint(run_dir: Path, resume: str, ranks: Ranks) -> Path | None:
    """The checkpoint to go on from, verified byte by byte, the same on every rank.

    Candidates are tried from the newest on; each rejected one gets one line saying why. Nothing is
    moved: see `clear_the_way`.

    Args:
        run_dir: The run's folder.
        resume: `auto`, `never`, `must`, or a checkpoint's folder.
        ranks: This process among the others; they share the reading and decide together.

    Returns:
        The folder, or None to start at step 0 (`never`, or `auto` with no checkpoint at all).

    Raises:
        CheckpointError: `must` or a path finds no whole checkpoint; or `auto` finds checkpoints
            and none of them is whole: a silent restart from zero would hide the loss.
    """
    candidates = gather_objects(_candidates(run_dir, resume), ranks)[0]
    chosen: Path | None = None
    for path in candidates:
        problems = _verify_together(path, ranks)
        if not problems:
            chosen = path
            break
        log.warning("Rejected checkpoint %s: %s", path, "; ".join(problems[:3]))
    if chosen is None and (candidates or resume not in ("auto", "never")):
        raise _nothing_whole(run_dir, resume, len(candidates))
    return chosen


def with_its_engine(config: Config) -> Config:
    """The config with the engine of the checkpoint that the run goes on from, where `engine.kind` is auto:
    no engine reads another's, and auto would be another for one process than for several.

    As it is where settings do not go with that engine: loading then says so. A checkpoint whose weights are
    lost does not tell; an older one, which the run then goes on from, does.
    """
    candidates = _candidates(Path(config.output_dir), config.checkpoint.resume)
    told = ((engine_of(path / ENGINE_FOLDER), path) for path in candidates)
    kind, newest = next(((kind, path) for kind, path in told if kind is not None), (None, None))
    if kind is None or config.engine.kind != "auto":
        return config
    kept = config.model_copy(update={"engine": config.engine.model_copy(update={"kind": kind})})
    if any(contradictions(kept)):
        return config
    log.info("engine.kind: auto is %s, as in %s.", kind, newest)
    return kept


def _candidates(run_dir: Path, resume: str) -> list[Path]:
    if resume == "never":
        return []
    if resume in ("auto", "must"):
        return committed_paths(run_dir)
    named = Path(resume)
    # What lies around a checkpoint is found from its own place, not from that of a link to it.
    return [named if step_of(named) is not None else named.resolve()]


def _verify_together(path: Path, ranks: Ranks) -> list[str]:
    """`manifest.verify` with the files dealt out among the ranks; every rank gets all problems."""
    gathered = gather_objects(verify(path, slice(ranks.rank, None, ranks.world_size)), ranks)
    return list(dict.fromkeys(problem for one_rank in gathered for problem in one_rank))


def _nothing_whole(run_dir: Path, resume: str, num_candidates: int) -> CheckpointError:
    where = run_dir / FOLDER if resume in ("auto", "must") else resume
    found = {0: "there is no checkpoint", 1: "the only checkpoint is not whole"}
    what = found.get(num_candidates, f"none of {num_candidates} checkpoints is whole")
    cure = "The lines above say why each was rejected. " if num_candidates else ""
    return CheckpointError(
        Problem(
            "checkpoint.resume",
            f"{what} in {where}",
            cure + "checkpoint.resume: never starts again from step 0.",
        ),
        everywhere=True,
    )


def clear_the_way(run_dir: Path, chosen: Path | None, ranks: Ranks) -> None:
    """Move aside what is not of the course that is taken now; every rank calls this, once it is certain.

    Checkpoints newer than the chosen one (damaged, or of a course that is given up) go to
    `checkpoints/set-aside/`, so that no later resume mistakes them for this run's newest. A run that does
    not go on from this folder's checkpoints is another run: the `best/` it finds becomes `best-1/` (or the
    next free number), as its own first best would take that place, however bad it is. What a save that died
    left is removed: it may be what fills the disk.

    Args:
        run_dir: The run's folder.
        chosen: The checkpoint that the run goes on from; None from step 0.
        ranks: This process among the others; rank 0 moves, the others wait.

    Raises:
        MachineError: Something cannot be moved.
    """
    if ranks.is_main:
        own = None if chosen is None else _as_own(run_dir, chosen)
        # Resumed from elsewhere, what lies here is another course too.
        _set_aside_newer(run_dir, None if own is None else step_of(own))
        if own is None:
            _set_best_aside(run_dir)
        remove_leftovers(run_dir)
    barrier(ranks)


def is_own(run_dir: Path, chosen: Path) -> bool:
    """Whether a checkpoint is one of this folder's, by whatever path it was named."""
    return _as_own(run_dir, chosen) is not None


def _as_own(run_dir: Path, chosen: Path) -> Path | None:
    return next((path for path in committed_paths(run_dir) if path.samefile(chosen)), None)


def _set_aside_newer(run_dir: Path, chosen_step: int | None) -> None:
    for path in committed_paths(run_dir):
        if chosen_step is not None and (step_of(path) or 0) <= chosen_step:
            continue
        target = _free_name(run_dir / FOLDER / SET_ASIDE / path.name)
        with writing(target):
            target.parent.mkdir(exist_ok=True)
            shutil.move(path, target)
        log.warning("Moved %s to %s: this run goes on without it.", path, target)


def _set_best_aside(run_dir: Path) -> None:
    best = run_dir / "best"
    if not best.is_dir():
        return
    number = 1
    while (free := run_dir / f"best-{number}").exists():
        number += 1
    with writing(free):
        best.rename(free)
    log.warning("Moved %s to %s: an earlier run left it.", best, free)


def _free_name(path: Path) -> Path:
    number = 1
    free = path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def load_checkpoint(
    path: Path,
    engine: Engine,
    ranks: Ranks,
    fingerprints: Mapping[str, str],
    allowed_changes: Collection[str] = (),
    num_steps: int | None = None,
) -> TrainState:
    """Restore engine and random state from a checkpoint that `find_checkpoint` verified.

    Args:
        path: The checkpoint's folder.
        engine: Freshly built from the same config.
        ranks: This process among the others.
        fingerprints: What the run is made from now, by name.
        allowed_changes: Names that may differ all the same.
        num_steps: Of the run asked for now; None where it has no end.

    Returns:
        Where the run stood, with the fingerprints of now.

    Raises:
        CheckpointError: A fingerprint differs, the run asked for ends before the checkpoint's step, or
            the engine cannot take the state.
    """
    state = read_state(path)
    check_fingerprints(path, state.fingerprints, fingerprints, allowed_changes)
    _check_length(path, state.step, num_steps)
    engine.load_state(path / ENGINE_FOLDER)
    _restore_random_state(state, ranks)
    return replace(state, fingerprints=dict(fingerprints), versions=package_versions())


def check_fingerprints(
    path: Path, saved: Mapping[str, str], now: Mapping[str, str], allowed_changes: Collection[str] = ()
) -> None:
    """Refuse to go on when the run would not be the same run.

    Raises:
        CheckpointError: With one problem per name that differs: what was, and what is now.
    """
    changes = [
        Problem(name, f"was {saved.get(name, 'absent')}, is {now.get(name, 'absent')}")
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]
    problems = [change for change in changes if change.where not in allowed_changes]
    if not problems:
        for change in changes:
            log.warning("Going on with a change that checkpoint.allow_changes allows: %s", change)
        return
    allowable = [p.where for p in problems if p.where in get_args(ResumableChange)]
    allow = ""
    if len(allowable) == len(problems):
        allow = f" To go on all the same: checkpoint.allow_changes: [{', '.join(allowable)}]."
    head = Problem(
        str(path),
        "belongs to a run that was made from something else; what changed:",
        "Undo the change, choose another output_dir, or start over with checkpoint.resume: never." + allow,
    )
    raise CheckpointError(head, *problems, heading="", everywhere=True)


def _check_length(path: Path, step: int, num_steps: int | None) -> None:
    """Refuse a run that is over before it goes on: its result would be an older model than the run has."""
    if num_steps is None or step <= num_steps:
        return
    what = f"stands at step {step}, but the run asked for (train.epochs, train.max_steps) ends at {num_steps}"
    cure = (
        "Ask for a run at least as long, choose another output_dir, name an older checkpoint "
        "(checkpoint.resume: FOLDER), or start over with checkpoint.resume: never."
    )
    raise CheckpointError(Problem(str(path), what, cure), everywhere=True)


def _restore_random_state(state: TrainState, ranks: Ranks) -> None:
    if state.world_size == ranks.world_size:
        restore_random_state(state.rng[str(ranks.rank)])
        return
    # Another number of ranks has no saved random state per rank: draw a new one that depends on
    # the step, so that dropout does not repeat. The order of the examples does not depend on it.
    seed_everything(state.step * 1_000_003 + ranks.rank)
    saved = counted(state.world_size, "rank")
    log.info("Saved by %s, resumed by %d: dropout is seeded anew.", saved, ranks.world_size)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers, for the record."""
    versions = {"python": platform.python_version()}
    for name in _RECORDED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
