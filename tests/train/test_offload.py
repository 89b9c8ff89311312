"""Where state and weights lie under ZeRO changes nothing: offloaded to the CPU, gathered within a host."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from burnish.runtime import Ranks
from rig.runs import run_case
from rig.spawn import run_cases

ALONE = Ranks(0, 0, 1)
LORA = {"adapter": {"kind": "lora", "rank": 4, "alpha": 8}}
TO_CPU = {"engine.zero_stage": 3, "engine.offload_optimizer": "cpu", "engine.offload_params": "cpu"}
SMALL = {"engine.deepspeed": {"zero_optimization": {"sub_group_size": 1000, "reduce_bucket_size": 500}}}
"""Raw settings that cut the toy's state into many pieces, as a large model's is."""
HPZ = {"engine.zero_stage": 3, "engine.hpz_size": 2}
GOES_ON = {**TO_CPU, **SMALL, "checkpoint.resume": "auto"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("offload")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    variants = {"full": {}, "lora": LORA, "bf16": {"model.dtype": "bf16"}}
    return {
        name: run_case({"engine.kind": "local", **settings}, ALONE, folder / name)
        for name, settings in variants.items()
    }


@pytest.fixture(scope="module")
def on_two(folder: Path) -> dict[str, Any]:
    stopped = {"at_step": 3, "signal": int(signal.SIGTERM)}
    cases = {
        "pieces": {"kind": "plain", "settings": {**TO_CPU, **SMALL}},
        "pieces-bf16": {"kind": "plain", "settings": {**TO_CPU, **SMALL, "model.dtype": "bf16"}},
        "loaded-lora": {"kind": "loaded", "settings": {**TO_CPU, **LORA}},
        "stopped": {"kind": "signalled", "settings": GOES_ON, **stopped},
    }
    return run_cases(cases, folder, 2)


@pytest.mark.slow
def test_offloaded_in_pieces(on_two: dict[str, Any], alone: dict[str, Any]) -> None:
    _same(on_two["pieces"], alone["full"], 2e-5)
    _same(on_two["loaded-lora"], alone["lora"], 2e-5)
    assert on_two["loaded-lora"]["partitioned"]
    # Norms of so small a model move by a few percent in bf16.
    assert on_two["pieces-bf16"]["losses"] == pytest.approx(alone["bf16"]["losses"], rel=1e-2)


@pytest.mark.slow
def test_offloaded_state_is_saved_and_taken_back(on_two: dict[str, Any], folder: Path) -> None:
    case = {"kind": "plain", "folder": "stopped", "settings": GOES_ON}
    rest = run_cases({"went-on": case}, folder, 2)["went-on"]
    whole = on_two["pieces"]
    assert on_two["stopped"]["error"] == "InterruptedRunError"
    assert on_two["stopped"]["losses"] + rest["losses"] == whole["losses"]
    assert rest["hash"] == whole["hash"]


@pytest.mark.slow
def test_weights_gathered_within_a_host(alone: dict[str, Any], tmp_path: Path) -> None:
    """hpZ with two "hosts" of two ranks, loaded partitioned as a real run does and built whole."""
    cases = {
        # First: DeepSpeed makes its groups for loading, and takes those that are there afterwards.
        "loaded-lora": {"kind": "loaded", "settings": {**HPZ, **LORA}},
        "full": {"kind": "plain", "settings": HPZ},
    }
    found = run_cases(cases, tmp_path, 4)
    _same(found["full"], alone["full"], 2e-5)
    _same(found["loaded-lora"], alone["lora"], 2e-5)


def _same(ours: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert ours["losses"] == pytest.approx(expected["losses"], rel=tolerance)
    assert ours["norms"] == pytest.approx(expected["norms"], rel=tolerance)
