"""Whole runs with compiled layers: the same losses on two ranks, and stopped and resumed to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from burnish.runtime import Ranks
from cluster.tiny_job import ENVIRONMENT, write_tiny_job
from rig.runs import run_case
from rig.spawn import run_cases

pytestmark = pytest.mark.slow

COMPILE = {"model.compile": True}
LORA = {"adapter": {"kind": "lora", "rank": 4, "alpha": 8}}
CASES: dict[str, dict[str, Any]] = {
    "local": {"engine.kind": "local"},
    "zero0": {"engine.zero_stage": 0},
    "zero1": {"engine.zero_stage": 1},
    "zero2": {"engine.zero_stage": 2},
    "zero2-lora": {"engine.zero_stage": 2, **LORA},
    "zero2-full": {"engine.zero_stage": 2, "model.activation_checkpointing": "full"},
}


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cases = {name: {"kind": "plain", "settings": {**COMPILE, **settings}} for name, settings in CASES.items()}
    return run_cases(cases, tmp_path_factory.mktemp("on_two"), 2)


@pytest.mark.parametrize("name", CASES)
def test_same_run(name: str, on_two: dict[str, Any], tmp_path: Any) -> None:
    settings = {"engine.kind": "local", **(LORA if "lora" in name else {})}
    expected = run_case(settings, Ranks(0, 0, 1), tmp_path)
    assert on_two[name]["losses"] == pytest.approx(expected["losses"], rel=2e-5)
    assert on_two[name]["norms"] == pytest.approx(expected["norms"], rel=2e-5)


def test_stopped_and_resumed_to_the_bit(tmp_path: Path) -> None:
    """The first micro-batch of a process is another one; what is compiled, each for itself, is not."""
    job = write_tiny_job(tmp_path / "job")
    whole = _train(job, tmp_path / "whole", "--checkpoint.every_steps", "1")
    for step in (1, 3):
        resumed = _train(job, tmp_path / f"from-{step}", "--checkpoint.resume", f"{whole}/step-{step:08}")
        assert _weights(resumed) == _weights(whole)


def _train(job: Path, out: Path, *flags: str) -> Path:
    """Folder of the run's checkpoints."""
    command = [sys.executable, "-m", "burnish", "train", str(job), "--output_dir", str(out)]
    command += ["--model.compile", "true", "--model.dtype", "bf16", "--checkpoint.keep", "9", *flags]
    env = {**os.environ, **ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR": str(out / "compiled")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / "checkpoints"


def _weights(checkpoints: Path) -> bytes:
    return (checkpoints.parent / "final" / "model.safetensors").read_bytes()
