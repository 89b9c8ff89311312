"""Rows that layers are compiled on: of the config's sizes, and leaving nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch

from burnish.engine.base import Engine
from burnish.records import NO_TARGET, MicroBatch
from burnish.runtime import Ranks
from burnish.train.loop import TrainJob
from burnish.train.rehearsal import rehearse
from rig.runs import make_job
from rig.toy import toy_config

ALONE = Ranks(0, 0, 1)
LORA = {"adapter": {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.2}}


def job_of(folder: Path, settings: dict[str, Any]) -> TrainJob:
    return make_job(toy_config(folder, {"engine.kind": "local", **settings}), ALONE)


def met(folder: Path, settings: dict[str, Any], evaluates: bool = True) -> list[tuple[str, MicroBatch]]:
    """Calls of an engine, and what it was given."""
    job, engine = job_of(folder, {}), create_autospec(Engine, instance=True)
    config = toy_config(folder, {"model.compile": True, **settings})
    rehearse(engine, config, job.feed, evaluates, ALONE)
    return [(call[0], call.args[0]) for call in engine.method_calls]


def test_both_kinds_of_last_layers_in_training_and_in_evaluation(tmp_path: Path) -> None:
    calls = met(tmp_path, {"data.max_tokens": 4096, "batch.micro_tokens": 4096})
    assert [name for name, _ in calls] == ["rehearse", "evaluate"] * 2
    assert [name for name, _ in met(tmp_path, {}, evaluates=False)] == ["rehearse"] * 2
    shares = [float((row.targets != NO_TARGET).mean()) for _, row in calls]
    assert shares[0] < 0.2 and shares[2] == 1.0
    assert [row.token_ids.size for _, row in calls] == [1024, 1024, 128, 128]


@pytest.mark.parametrize("max_tokens", [3, 40, 700, 5000])
@pytest.mark.parametrize("micro_tokens", [48, 1000, 8192])
def test_rows_within_the_budget_and_the_longest_document(
    tmp_path: Path, max_tokens: int, micro_tokens: int
) -> None:
    settings = {"data.max_tokens": max_tokens, "batch.micro_tokens": micro_tokens}
    for _, row in met(tmp_path, settings):
        lengths = row.document_lengths
        assert row.token_ids.size == lengths.sum() <= min(micro_tokens, 1024)
        assert lengths.max() <= max_tokens and lengths.min() >= 1
        assert len(lengths) > 1, "a document as long as its row is a special case to a compiler"
        assert (row.position_ids == 0).sum() == len(lengths)


def test_none_without_compiled_layers(tmp_path: Path) -> None:
    assert met(tmp_path, {"model.compile": False}) == met(tmp_path, {"model.compile": "auto"}) == []


@pytest.mark.parametrize("settings", [{}, LORA, {"model.dtype": "bf16"}], ids=["fp32", "dropout", "bf16"])
def test_nothing_is_left_behind(tmp_path: Path, settings: dict[str, Any]) -> None:
    job = job_of(tmp_path, settings)
    model: torch.nn.Module = job.engine._model  # pyright: ignore[reportAttributeAccessIssue]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    seen = []
    hook = model.register_forward_hook(lambda *_: seen.append(model.training))
    wanted = job.config.model.model_copy(update={"compile": True})
    rehearse(job.engine, job.config.model_copy(update={"model": wanted}), job.feed, True, ALONE)
    hook.remove()
    assert seen == [True, False, True, False] and model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
