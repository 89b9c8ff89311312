"""Exporting from an engine: gather on all ranks, write on one, and let all know how it went."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import final

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from burnish.config.schema import Config
from burnish.engine.base import Engine
from burnish.errors import MachineError, ProblemsError
from burnish.export.card import ExportFacts
from burnish.export.final import export_final
from burnish.records import TrainState
from burnish.runtime import Ranks, gather_objects, log


@final
class Exporter:
    """Writes what an engine has trained, as it is at the moment.

    Args:
        config: The run.
        engine: Gathers the weights.
        model: The Hugging Face or peft model inside it.
        tokenizer: Saved beside the weights.
        template: The chat template that was trained with.
        ranks: This process among the others.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None,
        ranks: Ranks,
    ) -> None:
        self._config = config
        self._engine = engine
        self._model = model
        self._tokenizer = tokenizer
        self._template = template
        self._ranks = ranks
        # Before the first step and before a checkpoint is loaded: what PiSSA took out of the base.
        is_pissa = config.adapter is not None and config.adapter.kind == "pissa"
        initial = engine.export_state() if is_pissa else None
        self._initial = None if initial is None else {name: t.clone() for name, t in initial.items()}

    def export(self, out: Path, state: TrainState) -> None:
        """Write the folder. Every rank calls this; it fails on all of them or on none.

        Raises:
            MachineError: It cannot be written, or what was written is not what was trained.
        """
        failure: ProblemsError | None = None
        try:
            weights = self._engine.export_state()
            if weights is not None:
                self._write(weights, out, state)
        except ProblemsError as error:
            failure = error
        told = gather_objects(failure and failure.problems, self._ranks)
        problems = next((of_one_rank for of_one_rank in told if of_one_rank), None)
        if problems:  # whatever it was (the base may be gone by now), it was not the config that was wrong
            raise MachineError(*problems, everywhere=True) from failure

    def _write(self, weights: Mapping[str, torch.Tensor], out: Path, state: TrainState) -> None:
        results = {} if state.best_eval_loss is None else {"best evaluation loss": state.best_eval_loss}
        export_final(
            self._config,
            self._model,
            weights,
            self._tokenizer,
            self._template,
            out,
            ExportFacts(state.step, state.num_examples, state.num_supervised_tokens, results),
            pissa_start=self._initial,
        )
        log.info("Exported %s.", out)
