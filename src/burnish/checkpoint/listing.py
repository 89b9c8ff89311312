"""What `burnish ckpt` prints."""

from __future__ import annotations

from pathlib import Path

from burnish.checkpoint.retention import list_checkpoints, require_run
from burnish.errors import counted


def checkpoint_table(run: Path, verify: bool) -> tuple[list[str], bool]:
    """A line per checkpoint, newest first.

    Args:
        run: A run's folder.
        verify: Read every byte.

    Returns:
        The lines, and whether any checkpoint is damaged.

    Raises:
        ConfigError: There is no such folder, or it is no run's.
    """
    require_run(run)
    found = list_checkpoints(run, verify)
    best_step = next((info.best_eval_step for info in found if not info.problems), None)
    lines = []
    for info in found:
        state = "; ".join(info.problems) or ("whole" if info.verified else "not read")
        best = "  best" if info.step == best_step else ""
        ranks = "? ranks" if info.world_size is None else counted(info.world_size, "rank")
        lines.append(f"step {info.step:>8}  {info.num_bytes / 2**20:>10.1f} MiB  {ranks}  {state}{best}")
    return lines or [f"There are no checkpoints in {run}."], any(info.problems for info in found)
