"""Long sequences shared out among ranks: who shares with whom, and an engine that sees its part only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float

from burnish.engine.base import Engine, StepResult
from burnish.records import NO_TARGET, MicroBatch
from burnish.runtime import Ranks, new_group


def sequence_group(ranks: Ranks, size: int, timeout_seconds: float | None) -> Any:
    """The process group of the `size` ranks that share this rank's sequences: consecutive ones, which
    are on one host wherever that is possible. Every rank calls this.
    """
    firsts = range(0, ranks.world_size, size)
    groups = [new_group(range(first, first + size), timeout_seconds) for first in firsts]
    return groups[ranks.rank // size]


def own_part(micro_batch: MicroBatch, index: int, size: int) -> MicroBatch:
    """This rank's columns of a packed micro-batch: part `index` of `size` equal ones.

    Where the tokens do not divide, the last document grows by tokens without a target; no other token
    sees them. `document_lengths` stay those of the whole row: attention sees all of it.
    """
    num_tokens = micro_batch.token_ids.shape[1]
    num_missing = -num_tokens % size
    width = (num_tokens + num_missing) // size
    first = index * width

    def cut(row: np.ndarray, fill: int) -> np.ndarray:
        return np.pad(row, ((0, 0), (0, num_missing)), constant_values=fill)[:, first : first + width]

    lengths = micro_batch.document_lengths.copy()
    lengths[-1] += num_missing
    return replace(
        micro_batch,
        token_ids=cut(micro_batch.token_ids, int(micro_batch.token_ids[0, -1])),
        # Its last position again: one more may be beyond what the model has positions for.
        position_ids=cut(micro_batch.position_ids, int(micro_batch.position_ids[0, -1])),
        targets=cut(micro_batch.targets, NO_TARGET),
        weights=cut(micro_batch.weights, 0),
        document_lengths=lengths,
        first_column=first,
    )


@final
class SequenceParallelEngine(Engine):
    """Hands `engine` this rank's part of every micro-batch, which it shares with `size - 1` others.

    Gradients of all ranks are summed, as always: each is that of the rank's own targets, and what the
    other ranks' tokens contribute to it travels back through attention.

    Args:
        engine: Over a model whose attention was given to `share_sequence`.
        ranks: This process among the others.
        size: Ranks that share a sequence.
    """

    def __init__(self, engine: Engine, ranks: Ranks, size: int) -> None:
        self._engine = engine
        self._index = ranks.rank % size
        self._size = size

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self._engine.device

    def forward_backward(self, micro_batch: MicroBatch, total_weight: float) -> Float[torch.Tensor, ""]:
        """See `Engine.forward_backward`; the sum is over this rank's part."""
        return self._engine.forward_backward(own_part(micro_batch, self._index, self._size), total_weight)

    def rehearse(self, micro_batch: MicroBatch) -> None:
        """See `Engine.rehearse`."""
        self._engine.rehearse(own_part(micro_batch, self._index, self._size))

    def step(self, lr: float) -> StepResult:
        """See `Engine.step`."""
        return self._engine.step(lr)

    def evaluate(self, micro_batch: MicroBatch) -> Float[torch.Tensor, " documents"]:
        """See `Engine.evaluate`; each document's sum is over this rank's part of it."""
        return self._engine.evaluate(own_part(micro_batch, self._index, self._size))

    def save_state(self, folder: Path) -> Sequence[Path]:
        """See `Engine.save_state`."""
        return self._engine.save_state(folder)

    def load_state(self, folder: Path) -> None:
        """See `Engine.load_state`."""
        self._engine.load_state(folder)

    def export_state(self) -> dict[str, torch.Tensor] | None:
        """See `Engine.export_state`."""
        return self._engine.export_state()
