"""Optimizer state and weights on NVMe: the same run, and a checkpoint that is whole."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from rig.spawn import run_cases

pytestmark = pytest.mark.slow  # the first run compiles DeepSpeed's async_io, which takes minutes

ZERO3 = {"engine.zero_stage": 3, "engine.kind": "deepspeed"}
# Several pieces, as a large model has. Their first holds an embedding of 61 x 32, so that gradients
# behind it lie at odd places (see `keep_gradients_in_memory`).
PIECEWISE = {**ZERO3, "engine.deepspeed": {"zero_optimization": {"sub_group_size": 2_000_000}}}
STATE = {**PIECEWISE, "engine.offload_optimizer": "nvme"}
BF16 = {"model.dtype": "bf16"}
LORA = {**PIECEWISE, **BF16, "adapter": {"kind": "lora", "rank": 4, "alpha": 8}}
VARIANTS: dict[str, dict[str, Any]] = {
    "state": STATE,
    "state-weights-on-cpu": {**STATE, **BF16, "engine.offload_params": "cpu"},
    "both": {**STATE, **BF16, "engine.offload_params": "nvme"},
    "frozen-weights": {**LORA, "engine.offload_params": "nvme"},
}
IN_MEMORY: dict[str, dict[str, Any]] = {
    "state": ZERO3,
    # DeepSpeed's arithmetic with an offloaded optimizer is a little different, wherever that lies.
    "both": {**STATE, **BF16},
    "frozen-weights": LORA,
}
GOES_ON = {"checkpoint.resume": "auto"}
STOPPED = {"at_step": 3, "signal": int(signal.SIGTERM)}


@pytest.fixture(scope="module", autouse=True)
def _async_io() -> None:
    builders = pytest.importorskip("deepspeed.ops.op_builder")
    if not builders.AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("needs a C++ compiler and libaio's headers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nvme")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    cases: dict[str, Any] = {
        f"{name}-in-memory": {"kind": "wide", "settings": settings} for name, settings in IN_MEMORY.items()
    }
    for name, settings in VARIANTS.items():
        stopped = {"kind": "wide", "settings": {**settings, **GOES_ON}}
        cases |= {
            name: {"kind": "wide", "settings": settings},
            f"{name}-stopped": {**stopped, **STOPPED},
            f"{name}-went-on": {**stopped, "folder": f"{name}-stopped"},
        }
    return run_cases(cases, folder, 2)


@pytest.mark.parametrize("name", IN_MEMORY)
def test_same_run(name: str, found: dict[str, Any]) -> None:
    expected = found[f"{name}-in-memory"]
    assert found[name]["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert found[name]["norms"] == pytest.approx(expected["norms"], rel=1e-5)


def test_it_was_on_the_disk(found: dict[str, Any]) -> None:
    """Otherwise the other tests are about nothing."""
    per_rank = 2 * 3 * 32 * 32_768 // 2  # numbers; another rank may have tidied up already
    for name, settings in VARIANTS.items():
        swapped = found[name]["swapped_bytes"]
        if settings.get("engine.offload_optimizer") == "nvme":
            assert swapped["optimizer"] > 3 * 4 * per_rank
        if settings.get("engine.offload_params") == "nvme":
            assert swapped["bfloat16params"] >= 2 * per_rank
            # Three matrices, 6 steps of several forwards and backwards: read again and again.
            assert found[name]["weights_read"] > 2 * 6 * 3


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_goes_on(name: str, found: dict[str, Any]) -> None:
    stopped, rest, expected = found[f"{name}-stopped"], found[f"{name}-went-on"], found[name]
    assert stopped["error"] == "InterruptedRunError"
    assert rest["error"] is None
    assert stopped["losses"] + rest["losses"] == expected["losses"]
    assert rest["hash"] == expected["hash"]


def test_state_moves_from_disk_to_memory_and_not_back(found: dict[str, Any], folder: Path) -> None:
    saved = {"checkpoint.resume": "must", "checkpoint.every_steps": 2}
    into_memory = {**PIECEWISE, **saved, "train.max_steps": 8}
    onto_disk = {**STATE, **saved, "train.max_steps": 9}
    moved = run_cases(
        {
            "moved": {"kind": "wide", "settings": into_memory, "folder": "state-stopped"},
            "refused": {"kind": "wide", "settings": onto_disk, "folder": "state-stopped"},
        },
        folder,
        2,
    )
    assert moved["moved"]["error"] is None
    assert len(moved["moved"]["losses"]) == 8 - len(found["state-stopped"]["losses"])
    assert moved["refused"]["error"] == "CheckpointError"
    assert "without offload to nvme" in moved["refused"]["message"]


def test_swap_files_are_gone_afterwards(found: dict[str, Any], folder: Path) -> None:
    assert found
    assert not list(folder.glob("*/.offload/zero_stage_3/*/rank*/*"))
