"""Optional packages are missed at once and all together, before data is prepared."""

from __future__ import annotations

import importlib.util

import pytest

from burnish.config.packages import require_packages
from burnish.config.schema import Config
from burnish.errors import EXIT_ENVIRONMENT, MachineError

ASKS = {
    "model": {"path": "some/model"},
    "data": {"train": "rows.jsonl"},
    "output_dir": "run",
    "adapter": {"quantize": "nf4"},
    "optim": {"name": "adamw_8bit"},
    "log": {"trackers": ["tensorboard", "wandb", "mlflow"]},
}


def test_all_that_is_missing_is_told_at_once_with_the_key_and_a_cure(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = Config.model_validate(ASKS)
    with pytest.raises(MachineError) as caught:
        require_packages(config, num_ranks=2)
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    told = [(problem.where, problem.cure) for problem in caught.value.problems]
    install = "Install it with pip install 'burnish[{}]', or {}."
    assert told == [
        ("engine.kind", install.format("deepspeed", "use engine.kind: local")),
        ("adapter.quantize", install.format("bitsandbytes", "leave adapter.quantize out")),
        ("optim.name", install.format("bitsandbytes", "use optim.name: adamw")),
        ("log.trackers", install.format("wandb", "leave it out of log.trackers")),
        ("log.trackers", install.format("mlflow", "leave it out of log.trackers")),
    ]


def test_what_is_not_asked_for_is_not_missed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    asks = {key: value for key, value in ASKS.items() if key in ("model", "data", "output_dir")}
    require_packages(Config.model_validate(asks), num_ranks=1)
    local = Config.model_validate({**asks, "engine": {"kind": "local"}})
    require_packages(local, num_ranks=2)
