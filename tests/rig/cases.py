"""What a worker can be asked to do, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from burnish.runtime import Ranks
from rig.runs import run_case


def plain(case: Mapping[str, Any], ranks: Ranks, output_dir: Path) -> dict[str, Any]:
    """Train as the settings say."""
    return run_case(
        case["settings"],
        ranks,
        output_dir,
        evaluate=case.get("evaluate", False),
        tied=case.get("tied", False),
    )


CASES: dict[str, Callable[[Mapping[str, Any], Ranks, Path], dict[str, Any]]] = {"plain": plain}
