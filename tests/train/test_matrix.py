"""Every engine, full and LoRA, on one process and on two, in fp32 and in bf16: one run, 20 steps.

The windows are made to be awkward: 27 examples of 2 to 40 tokens in windows of 13, so that each third
window is a single example and one of two ranks has an empty share; 1 to 5 micro-batches a step.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rig.spawn import run_cases

pytestmark = pytest.mark.slow

NUM_STEPS = 20
SETTINGS: dict[str, Any] = {
    "batch.global_examples": 13,
    "batch.micro_tokens": 72,
    "train.max_steps": NUM_STEPS,
    "train.epochs": 99,
    "optim.lr": 1e-3,
}
ENGINES: dict[str, dict[str, Any]] = {
    "local": {"engine.kind": "local"},
    **{f"zero{stage}": {"engine.kind": "deepspeed", "engine.zero_stage": stage} for stage in range(4)},
}
TRAINED: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"adapter": {"kind": "lora", "rank": 4, "alpha": 8}},
}
DTYPES = ("fp32", "bf16")
TOLERANCES = {"fp32": 5e-5, "bf16": 2e-2}
"""Relative, of every step's loss and gradient norm."""
WEIGHT_BOUNDS = {"fp32": 1e-4, "bf16": 0.2}
"""How far final weights may be from the reference's, as a share of how far training moved those. What
ZeRO hands out in bf16 is rounded to 8 bits, and 20 small steps do not move weights much further."""
MATRIX = [(e, t, d) for e in ENGINES for t in TRAINED for d in DTYPES]


def _cases() -> dict[str, Any]:
    return {
        f"{engine}-{trained}-{dtype}": {
            "kind": "measured",
            "settings": {**SETTINGS, **ENGINES[engine], **TRAINED[trained], "model.dtype": dtype},
        }
        for engine, trained, dtype in MATRIX
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, dict[str, Any]]:
    """Results by number of processes and case."""
    return {num: run_cases(_cases(), folder / str(num), num) for num in (1, 2)}


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize(("engine", "trained", "dtype"), MATRIX)
def test_same_run(
    engine: str,
    trained: str,
    dtype: str,
    num_processes: int,
    found: dict[int, dict[str, Any]],
    folder: Path,
) -> None:
    case, reference = f"{engine}-{trained}-{dtype}", f"local-{trained}-{dtype}"
    ours, expected = found[num_processes][case], found[1][reference]
    assert len(ours["losses"]) == NUM_STEPS and all(ours["applied"])
    assert ours["example_ids"] == expected["example_ids"]
    assert ours["losses"] == pytest.approx(expected["losses"], rel=TOLERANCES[dtype])
    assert ours["norms"] == pytest.approx(expected["norms"], rel=TOLERANCES[dtype])
    paths = [folder / str(num) / name for num, name in ((num_processes, case), (1, reference))]
    apart, moved = _distances(*(load_file(path / "weights.safetensors") for path in paths), paths[1])
    assert moved > 0
    assert apart / moved < WEIGHT_BOUNDS[dtype]


def test_windows_are_as_awkward_as_they_should_be(found: dict[int, dict[str, Any]]) -> None:
    alone, two = found[1]["local-full-fp32"], found[2]["zero3-full-fp32"]
    assert {min(alone["micro_batches"]), max(alone["micro_batches"])} == {1, 5}
    assert len(set(two["micro_batches"])) > 1
    # One example and two ranks: one of them has nothing. Also a window smaller than the others.
    assert {len(ids) for ids in two["example_ids"]} == {13, 1}


def _distances(
    ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], folder: Path
) -> tuple[float, float]:
    start = load_file(folder / "start.safetensors")
    assert ours.keys() == expected.keys() == start.keys()

    def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
        return math.sqrt(sum((one[n].double() - other[n].double()).square().sum().item() for n in one))

    return distance(ours, expected), distance(expected, start)
