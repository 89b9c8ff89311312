"""What the backward computes again changes nothing under ZeRO 3, with tiles and adapters, on two ranks."""

from __future__ import annotations

from typing import Any

import pytest

from burnish.runtime import Ranks
from rig.runs import run_case
from rig.spawn import run_cases

ALONE = Ranks(0, 0, 1)
ZERO3 = {"engine.zero_stage": 3}
LORA = {"adapter": {"kind": "lora", "rank": 4, "alpha": 8}}
LIGHT = {"model.activation_checkpointing": "light"}
# So small that ranks differ in their number of tiles, and some micro-batches have none.
TILES = {"model.mlp_tile_tokens": 16}
CASES: dict[str, dict[str, Any]] = {
    "light": LIGHT,
    "light-lora": {**LIGHT, **LORA},
    "tiles": TILES,
    "tiles-light-lora": {**TILES, **LIGHT, **LORA},
    "tiles-offload": {**TILES, "model.activation_checkpointing": "offload"},
    "tiles-shared": {**TILES, **LIGHT, "engine.sequence_parallel": 2},
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("alone")
    return {
        name: run_case({"engine.kind": "local", **settings}, ALONE, folder / name)
        for name, settings in {"full": {}, "lora": LORA}.items()
    }


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cases = {name: {"kind": "plain", "settings": {**ZERO3, **settings}} for name, settings in CASES.items()}
    return run_cases(cases, tmp_path_factory.mktemp("on_two"), 2)


@pytest.mark.parametrize("name", CASES)
def test_same_run(name: str, on_two: dict[str, Any], alone: dict[str, Any]) -> None:
    expected = alone["lora" if "lora" in name else "full"]
    assert on_two[name]["losses"] == pytest.approx(expected["losses"], rel=2e-5)
    assert on_two[name]["norms"] == pytest.approx(expected["norms"], rel=2e-5)
