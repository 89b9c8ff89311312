"""DeepSpeed's checkpoint files: which rank wrote them, who may load them, another number of ranks.
Imports no deepspeed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from burnish.engine.ds_workarounds import convert_to_universal
from burnish.errors import CheckpointError, Problem
from burnish.runtime import Ranks, barrier, gather_objects

TAG = "deepspeed"
"""The sub-folder in which DeepSpeed puts a checkpoint's files."""


def written_by(ranks: Ranks, path: Path) -> bool:
    """Whether this rank wrote a file: shards carry their rank in the name, what carries none is rank 0's."""
    if "_pp_rank_" not in path.name:
        return ranks.is_main
    return f"_pp_rank_{ranks.rank}_" in path.name


def refuse_other_stage(folder: Path, stage: int, num_shards: int) -> None:
    """Refuse a checkpoint of a ZeRO stage that this one cannot take over from (1 and 2 can from each other).

    DeepSpeed's own refusals are assertions deep inside; this says it before it begins.

    Args:
        folder: The checkpoint's, as given to DeepSpeed.
        stage: Of this run.
        num_shards: Ranks that wrote optimizer state; 0 at stage 0.

    Raises:
        CheckpointError: The stages do not go together.
    """
    has_zero3_shards = any((folder / TAG).glob("zero_pp_rank_*_model_states.pt"))
    saved = "0" if num_shards == 0 else "3" if has_zero3_shards else "1 or 2"
    fits = {0: num_shards == 0, 3: has_zero3_shards}.get(stage, num_shards > 0 and not has_zero3_shards)
    if not (folder / TAG).is_dir():
        what = "the checkpoint was saved by the local engine, this run has DeepSpeed"
        raise CheckpointError(
            Problem("engine.kind", what, "Set engine.kind: local; it takes any number of processes.")
        )
    if not fits:
        raise CheckpointError(
            Problem(
                "engine.zero_stage",
                f"the checkpoint was saved under stage {saved}, this run has stage {stage}",
                "Resume with the engine settings that it was saved with.",
            )
        )


def nothing_found(folder: Path) -> CheckpointError:
    """The error that DeepSpeed knows nothing of the folder's files."""
    cure = "Go on from an older checkpoint, or with the engine.kind and offload settings that saved this one."
    return CheckpointError(Problem(str(folder), "DeepSpeed found no checkpoint in it", cure))


@contextlib.contextmanager
def as_universal(engine: Any, folder: Path, run_dir: Path, ranks: Ranks) -> Iterator[Path]:
    """While entered: a checkpoint's shards as a universal one, and an engine that loads one.

    Args:
        engine: DeepSpeed's.
        folder: The checkpoint's; only read, for it may be another run's, and others may go on from it too.
        run_dir: This run's folder. What is converted lies among its checkpoints until the end.
        ranks: This process among the others.

    Raises:
        CheckpointError: The conversion failed.
    """
    converted = run_dir / "checkpoints" / f".staging-universal-{folder.parent.name}"
    failure = convert_to_universal(folder / TAG, converted / TAG) if ranks.is_main else None
    failure = gather_objects(failure, ranks)[0]
    if failure is not None:
        if ranks.is_main:
            shutil.rmtree(converted, ignore_errors=True)  # a full disk is to have its room back
        cure = "Resume on as many ranks as saved it, or with more free disk space."
        raise CheckpointError(Problem(str(folder), f"could not be converted: {failure}", cure))
    engine._config.load_universal_checkpoint = True
    try:
        yield converted
    finally:
        engine._config.load_universal_checkpoint = False
        barrier(ranks)
        if ranks.is_main:
            shutil.rmtree(converted)
