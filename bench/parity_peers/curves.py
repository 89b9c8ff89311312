"""How far two runs are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parity_peers.job import Job, Setting


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Over all steps; what is no number is as far off as can be.

    Raises:
        ValueError: One has more steps than the other.
    """
    gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    return max(gap if math.isfinite(gap) else math.inf for gap in gaps)


def weights_apart(job: Job, setting: Setting, ours: Path, theirs: Path) -> float:
    """|ours - theirs| / |ours - start|, over all trained weights.

    Args:
        job: Has the weights at the start.
        setting: Whether these are adapters.
        ours, theirs: Folders as they were exported.

    Raises:
        RuntimeError: They hold other tensors.
    """
    from safetensors.torch import load_file

    file, start = (
        ("adapter_model.safetensors", job.adapter) if setting.lora else ("model.safetensors", job.model)
    )
    before, one, other = (load_file(folder / file) for folder in (start, ours, theirs))
    if not before.keys() == one.keys() == other.keys():
        strange = sorted((one.keys() ^ other.keys()) | (one.keys() ^ before.keys()))
        raise RuntimeError(f"not in all results: {strange}")
    apart = sum(float((one[n].double() - other[n].double()).square().sum()) for n in one)
    gone = sum(float((one[n].double() - before[n].double()).square().sum()) for n in one)
    return (apart / gone) ** 0.5
