"""An engine whose calls are watched: by the watchdog, and for the memory that they leave."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float

from burnish.engine.base import Engine, StepResult
from burnish.host_memory import FreedMemory
from burnish.records import MicroBatch
from burnish.watchdog import Watchdog


@final
class WatchedEngine(Engine):
    """Hands every call on to `engine`, with a beat before it and one after the long ones.

    Micro-batches are what all ranks do in step, in training and in evaluation, so a beat for each
    tells a slow step from one that hangs. After each, `freed` may return memory: activations are gone then.
    """

    def __init__(self, engine: Engine, watchdog: Watchdog, freed: FreedMemory | None = None) -> None:
        self._engine = engine
        self._beat = watchdog.beat
        self._freed = freed
        self._num_steps = 0

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self._engine.device

    def forward_backward(self, micro_batch: MicroBatch, total_weight: float) -> Float[torch.Tensor, ""]:
        """See `Engine.forward_backward`."""
        self._beat(f"a micro-batch, {self._num_steps} steps after the start")
        nll_sum = self._engine.forward_backward(micro_batch, total_weight)
        self._give_back()
        return nll_sum

    def rehearse(self, micro_batch: MicroBatch) -> None:
        """See `Engine.rehearse`."""
        self._beat("a micro-batch of a rehearsal")
        self._engine.rehearse(micro_batch)

    def step(self, lr: float) -> StepResult:
        """See `Engine.step`."""
        self._beat(f"the update, {self._num_steps} steps after the start")
        result = self._engine.step(lr)
        self._num_steps += 1
        self._beat(f"after the update, {self._num_steps} steps after the start")
        return result

    def evaluate(self, micro_batch: MicroBatch) -> Float[torch.Tensor, " documents"]:
        """See `Engine.evaluate`."""
        self._beat(f"evaluation, {self._num_steps} steps after the start")
        losses = self._engine.evaluate(micro_batch)
        self._give_back()
        return losses

    def save_state(self, folder: Path) -> Sequence[Path]:
        """See `Engine.save_state`."""
        self._beat(f"saving to {folder}")
        files = self._engine.save_state(folder)
        self._beat(f"committing {folder}")
        return files

    def load_state(self, folder: Path) -> None:
        """See `Engine.load_state`."""
        self._beat(f"loading {folder}")
        self._engine.load_state(folder)
        self._beat(f"after loading {folder}")

    def export_state(self) -> dict[str, torch.Tensor] | None:
        """See `Engine.export_state`."""
        self._beat("gathering weights for export")
        weights = self._engine.export_state()
        self._beat("after gathering weights for export")
        return weights

    def _give_back(self) -> None:
        if self._freed is not None:
            self._freed.give_back()
