"""Run cases in several processes and read back what they found."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from burnish.launch import launch

TESTS = Path(__file__).resolve().parent.parent


def run_cases(cases: Mapping[str, Mapping[str, Any]], out_dir: Path, num_processes: int) -> dict[str, Any]:
    """All cases, one after the other, in one group of processes; rank 0's results by case name."""
    code, results = try_cases(cases, out_dir, num_processes)
    assert code == 0, f"workers ended with exit code {code}"
    return results


def try_cases(
    cases: Mapping[str, Mapping[str, Any]], out_dir: Path, num_processes: int
) -> tuple[int, dict[str, Any]]:
    """As `run_cases`, with the exit code instead of an assertion, and what there is of results."""
    out_dir.mkdir(parents=True, exist_ok=True)
    listing = out_dir / "cases.json"
    listing.write_text(json.dumps(cases))
    source = str(TESTS.parent / "src")
    path = os.pathsep.join([source, str(TESTS), os.environ.get("PYTHONPATH", "")])
    with mock.patch.dict(os.environ, {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}):
        code = launch(num_processes, [sys.executable, "-m", "rig.worker", str(listing), str(out_dir)], 20.0)
    results = {
        name: json.loads(file.read_text()) for name in cases if (file := out_dir / f"{name}.0.json").exists()
    }
    return code, results
