"""Sequences shared out among ranks: the same losses, gradients and weights as on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from burnish.data.collate import collate
from burnish.engine.build import build_engine
from burnish.engine.sequence import own_part
from burnish.errors import ConfigError
from burnish.records import NO_TARGET, MicroBatch
from burnish.runtime import Ranks
from rig.spawn import run_cases
from rig.toy import toy_config, toy_model, toy_store

LOCAL = {"engine.kind": "local"}
ZERO2 = {"engine.kind": "deepspeed", "engine.zero_stage": 2}
ZERO3 = {"engine.kind": "deepspeed", "engine.zero_stage": 3}
LORA = {"adapter": {"kind": "lora", "rank": 4, "alpha": 8}}
BF16 = {"model.dtype": "bf16", "optim.lr": 1e-3}
AWKWARD = {"batch.global_examples": 13}
"""The third window is a single example, and 27 - 26 = 1 leaves a data-parallel neighbour with nothing."""
BY_TWO = {"engine.sequence_parallel": 2}
ON_TWO: dict[str, dict[str, Any]] = {
    "local": {**LOCAL, **AWKWARD},
    "local-lora": {**LOCAL, **AWKWARD, **LORA},
    "local-recomputed": {**LOCAL, **AWKWARD, "model.activation_checkpointing": "full"},
    "local-bf16": {**LOCAL, **AWKWARD, **BF16},
    "zero2": {**ZERO2, **AWKWARD},
    "zero3": {**ZERO3, **AWKWARD},
    "zero3-lora": {**ZERO3, **AWKWARD, **LORA},
    "zero3-bf16": {**ZERO3, **AWKWARD, **BF16},
}
ON_FOUR: dict[str, dict[str, Any]] = {
    # 2 groups of 2 ranks; 4 ranks to a sequence, and the toy has 2 key heads: each is needed twice.
    "by-2": {**LOCAL, **AWKWARD, **BY_TWO},
    "by-4": {**LOCAL, **AWKWARD, "engine.sequence_parallel": 4},
    "by-4-zero3": {**ZERO3, **AWKWARD, "engine.sequence_parallel": 4},
}


def _reference(settings: dict[str, Any]) -> dict[str, Any]:
    without = {"engine.sequence_parallel", "engine.zero_stage", "model.activation_checkpointing"}
    return {**{k: v for k, v in settings.items() if k not in without}, **LOCAL}


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "measured", "settings": settings, "evaluate": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sequence")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    cases = {name: _plain(_reference(settings)) for name, settings in {**ON_TWO, **ON_FOUR}.items()}
    cases["gradients"] = {"kind": "gradients", "settings": {**LOCAL, **AWKWARD}}
    return run_cases(cases, folder / "1", 1)


@pytest.fixture(scope="module")
def on_two(folder: Path) -> dict[str, Any]:
    cases = {name: _plain({**settings, **BY_TWO}) for name, settings in ON_TWO.items()}
    cases["gradients"] = {"kind": "gradients", "settings": {**LOCAL, **AWKWARD, **BY_TWO}}
    return run_cases(cases, folder / "2", 2)


@pytest.mark.parametrize("name", ON_TWO)
def test_two_ranks_to_a_sequence(
    name: str, alone: dict[str, Any], on_two: dict[str, Any], folder: Path
) -> None:
    _same(on_two[name], alone[name], 2e-2 if "bf16" in name else 1e-5)
    if "bf16" not in name:
        _same_weights(folder / "2" / name, folder / "1" / name)


def test_gradients_of_every_weight(alone: dict[str, Any], on_two: dict[str, Any], folder: Path) -> None:
    ours, expected = (load_file(folder / n / "gradients" / "gradients.safetensors") for n in ("2", "1"))
    assert ours.keys() == expected.keys() and len(ours) > 10
    assert on_two["gradients"]["losses"] == pytest.approx(alone["gradients"]["losses"], rel=1e-5)
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert scale > 0
        assert (ours[name] - gradient).abs().max().item() <= 1e-5 * scale, name


@pytest.mark.slow
def test_four_ranks(alone: dict[str, Any], folder: Path) -> None:
    found = run_cases({name: _plain(settings) for name, settings in ON_FOUR.items()}, folder / "4", 4)
    for name in ON_FOUR:
        _same(found[name], alone[name], 1e-5)
        _same_weights(folder / "4" / name, folder / "1" / name)


def _same(ours: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert ours["example_ids"] == expected["example_ids"]
    assert ours["losses"] == pytest.approx(expected["losses"], rel=tolerance)
    assert ours["norms"] == pytest.approx(expected["norms"], rel=tolerance)
    assert len(ours["evals"]) == len(expected["evals"]) == 2
    for one, other in zip(ours["evals"], expected["evals"], strict=True):
        assert one[1] == pytest.approx(other[1], rel=tolerance)
        assert one[2] == pytest.approx(other[2], rel=tolerance)


def _same_weights(ours: Path, expected: Path) -> None:
    start, one, other = (
        load_file(path / f"{name}.safetensors")
        for path, name in ((expected, "start"), (ours, "weights"), (expected, "weights"))
    )
    apart = sum((one[n] - other[n]).double().square().sum().item() for n in other) ** 0.5
    moved = sum((other[n] - start[n]).double().square().sum().item() for n in other) ** 0.5
    assert moved > 0
    assert apart / moved < 1e-3


@pytest.mark.parametrize(
    ("size", "processes", "message"),
    [(3, 3, "4 attention heads"), (2, 3, "does not divide 3 ranks")],
)
def test_what_cannot_be_shared_out(
    size: int, processes: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("burnish.engine.build.sequence_group", lambda *_: None)
    config = toy_config("out", {**LOCAL, "engine.sequence_parallel": size})
    model = toy_model(config, torch.float32)
    with pytest.raises(ConfigError, match=message):
        build_engine(config, Ranks(0, 0, processes), torch.device("cpu"), model)


@pytest.mark.parametrize("num_examples", [0, 1, 3])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_parts_make_up_the_row(num_examples: int, size: int) -> None:
    store = toy_store()
    ids = np.arange(num_examples)
    whole = collate([store[int(i)] for i in ids], ids, packed=True, pad_token_id=0)
    parts = [own_part(whole, index, size) for index in range(size)]
    num = whole.token_ids.shape[1]
    for field in ("token_ids", "position_ids", "targets", "weights"):
        assert np.array_equal(_joined(parts, field)[:, :num], getattr(whole, field))
    joined = _joined(parts, "targets")
    assert (joined[:, num:] == NO_TARGET).all()
    assert len({part.token_ids.shape for part in parts}) == 1
    assert [part.first_column for part in parts] == [i * joined.shape[1] // size for i in range(size)]
    for part in parts:
        assert part.document_lengths.sum() == joined.shape[1] < num + size
        assert np.array_equal(part.example_ids, whole.example_ids)


def _joined(parts: list[MicroBatch], field: str) -> np.ndarray:
    return np.concatenate([getattr(part, field) for part in parts], axis=1)
