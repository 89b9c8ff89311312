"""Optimizers and loss terms under every engine on two processes: as on one process with the local engine.

One group of two processes runs everything that trains, a second one what is resumed.
"""

from __future__ import annotations

import importlib.util
import signal
from pathlib import Path
from typing import Any

import pytest

from burnish.runtime import Ranks
from rig.runs import run_case
from rig.spawn import run_cases

pytestmark = pytest.mark.slow
ALONE = Ranks(0, 0, 1)
LORA = {"kind": "lora", "rank": 4, "alpha": 8}
ENGINES: dict[str, dict[str, Any]] = {
    "local": {"engine.kind": "local"},
    **{f"zero{stage}": {"engine.kind": "deepspeed", "engine.zero_stage": stage} for stage in range(4)},
}
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
MUON = {"optim.name": "muon", "optim.max_grad_norm": 0.5}
TERMS = {"train.label_smoothing": 0.1, "train.z_loss": 1e-2, "schedule.name": "wsd"}
PARTS = {
    "model.freeze": ["embed_tokens", "layers.0.mlp"],
    "optim.group_lr": {"self_attn": 3.0, "lm_head": 0.2},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "muon": MUON,
    "muon-lora": {**MUON, "adapter": LORA},
    "muon-bf16": {**MUON, "model.dtype": "bf16"},
    "8bit": {"optim.name": "adamw_8bit"},
    "adafactor": {"optim.name": "adafactor", "optim.lr": 0.1},
    "terms": TERMS,
    "terms-lora": {**TERMS, "adapter": LORA, "optim.group_lr": {"lora_B": 16.0}},
    "terms-bf16": {**TERMS, "model.dtype": "bf16"},
    "experts": {"train.router_aux_loss": 0.5},
    "noise": {"train.neftune_alpha": 5.0},
    "parts": PARTS,
    "muon-parts": {**MUON, **PARTS},
}
TOLERANCES = {
    "muon-bf16": 2e-2,
    "terms-bf16": 2e-2,
    "8bit": 2e-2,
    "muon": 2e-3,
    "muon-lora": 2e-3,
    "muon-parts": 2e-3,
}
"""Muon orthogonalises in bf16, and 8-bit state is rounded in blocks that follow the shards: small
differences in gradients become larger ones in updates."""
CASES = [
    (engine, variant)
    for engine in ENGINES
    for variant in VARIANTS
    if (variant != "adafactor" or engine in ("local", "zero0"))
    and (variant != "8bit" or HAS_BITSANDBYTES)
    and variant != "noise"  # drawn by each rank for itself
]
RESUMED = [
    (engine, variant)
    for engine in ("zero0", "zero1", "zero2", "zero3")
    for variant in ("muon", "8bit", "noise")
    if variant != "8bit" or HAS_BITSANDBYTES
]


def _stopped(engine: str, variant: str) -> dict[str, Any]:
    return {**ENGINES[engine], **VARIANTS[variant], "checkpoint.resume": "auto"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("optimizers")


@pytest.fixture(scope="module")
def on_two(folder: Path) -> dict[str, Any]:
    cases: dict[str, Any] = {
        f"{engine}-{variant}": {"kind": "plain", "settings": {**ENGINES[engine], **VARIANTS[variant]}}
        for engine, variant in dict.fromkeys(CASES + RESUMED)
    }
    for engine, variant in RESUMED:
        cases[f"{engine}-{variant}-stopped"] = {
            "kind": "signalled",
            "settings": _stopped(engine, variant),
            "at_step": 3,
            "signal": int(signal.SIGTERM),
        }
    return run_cases(cases, folder, 2)


@pytest.fixture(scope="module")
def went_on(folder: Path, on_two: dict[str, Any]) -> dict[str, Any]:
    cases = {
        f"{engine}-{variant}-went-on": {
            "kind": "plain",
            "folder": f"{engine}-{variant}-stopped",
            "settings": _stopped(engine, variant),
        }
        for engine, variant in RESUMED
    }
    return run_cases(cases, folder, 2)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("alone")
    return {
        name: run_case({**ENGINES["local"], **settings}, ALONE, folder / name)
        for name, settings in VARIANTS.items()
        if name != "noise" and (name != "8bit" or HAS_BITSANDBYTES)
    }


@pytest.mark.parametrize(("engine", "variant"), CASES)
def test_two_processes_are_one(
    engine: str, variant: str, on_two: dict[str, Any], alone: dict[str, Any]
) -> None:
    ours, expected = on_two[f"{engine}-{variant}"], alone[variant]
    tolerance = TOLERANCES.get(variant, 5e-5)
    assert ours["losses"] == pytest.approx(expected["losses"], rel=tolerance)
    assert ours["norms"] == pytest.approx(expected["norms"], rel=max(tolerance, 1e-4) * 4)
    assert len(set(ours["losses"])) > 3 and all(ours["applied"])


@pytest.mark.parametrize(("engine", "variant"), RESUMED)
def test_resumed_to_the_bit(
    engine: str, variant: str, on_two: dict[str, Any], went_on: dict[str, Any]
) -> None:
    whole, rest = on_two[f"{engine}-{variant}"], went_on[f"{engine}-{variant}-went-on"]
    assert on_two[f"{engine}-{variant}-stopped"]["error"] == "InterruptedRunError"
    assert rest["losses"] == whole["losses"][-len(rest["losses"]) :] and len(rest["losses"]) < 6
    assert rest["hash"] == whole["hash"]


def test_only_adams_state_can_be_laid_out_for_another_number_of_ranks(
    folder: Path, on_two: dict[str, Any]
) -> None:
    case = {
        "kind": "signalled",
        "folder": "zero2-muon-stopped",
        "settings": {**_stopped("zero2", "muon"), "checkpoint.resume": "must"},
        "at_step": 99,
        "signal": 0,
    }
    found = run_cases({"muon-alone": case}, folder, 1)["muon-alone"]
    assert found["error"] == "CheckpointError" and "saved by 2 ranks" in found["message"]


def test_terms_change_the_gradient_and_not_what_is_logged(alone: dict[str, Any]) -> None:
    plain = alone["parts"]
    assert plain["norms"][0] != alone["terms"]["norms"][0]
    assert plain["losses"][0] == pytest.approx(alone["terms"]["losses"][0], rel=1e-6)
