"""An export touches its own folder only."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from burnish.config.schema import Config
from burnish.engine.base import Engine
from burnish.errors import ConfigError, MachineError, Problem
from burnish.export import exporter as exporter_module
from burnish.export.exporter import Exporter
from burnish.records import TrainState
from burnish.runtime import Ranks


def state(best_eval_step: int | None) -> TrainState:
    best_loss = None if best_eval_step is None else 1.5
    return TrainState(4, 0, 8, 64, 32, best_loss, best_eval_step, 0, {}, {}, {}, 1)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Exports a run's `final/` beside a `best/`; what a file of weights holds is not the point."""
    (tmp_path / "best").mkdir()

    def export_final(*arguments: Any, pissa_start: Any) -> None:
        if arguments[4] == "no disk":
            raise MachineError(Problem("final", "cannot be written"))
        if arguments[4] == "no base":
            raise ConfigError(Problem("model.path", "there is no folder m"))
        arguments[5].mkdir(exist_ok=True)

    monkeypatch.setattr(exporter_module, "export_final", export_final)
    config = Config.model_validate({"model": {"path": "m"}, "data": {"train": "d"}, "output_dir": "o"})
    engine, model, tokenizer = Mock(Engine), Mock(PreTrainedModel), Mock(PreTrainedTokenizerBase)
    engine.export_state.return_value = {}

    def run(best_eval_step: int | None, template: str | None = None) -> None:
        exporter = Exporter(config, engine, model, tokenizer, template, Ranks(0, 0, 1))
        exporter.export(tmp_path / "final", state(best_eval_step))

    return run


def test_a_failure_changes_nothing_and_a_result_nothing_beside_it(tmp_path: Path, write: Any) -> None:
    for template in ("no disk", "no base"):  # a checkpoint is saved for either
        with pytest.raises(MachineError):
            write(None, template=template)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    for best_eval_step in (None, 2):
        write(best_eval_step)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "final"]
