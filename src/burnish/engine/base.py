"""What the training loop needs of an engine. The loop knows this and nothing below it.

An engine owns the wrapped model, its optimizer and its gradients. It is told what a step is: the
loop hands it the micro-batches of a window one by one and then says `step`. Every rank makes the
same calls in the same order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float

from burnish.records import MicroBatch


@dataclass(frozen=True)
class StepResult:
    """What applying a step did.

    `grad_norm` is the global L2 norm before clipping, or None where the engine cannot tell.
    `applied` is False when a gradient was not finite on any rank: then no rank applied the step
    and no weight or optimizer state changed. `may_repeat` says that it may have been fp16's range that
    was too small: the loss scale has been lowered, and the same micro-batches may give finite gradients
    now. `forward_seconds` and `backward_seconds` are those of all micro-batches since the last step on
    this rank, None where they were not measured.
    """

    grad_norm: float | None
    applied: bool
    may_repeat: bool = False
    forward_seconds: float | None = None
    backward_seconds: float | None = None


class Scorer(ABC):
    """What evaluation needs: a model that scores micro-batches. No optimizer."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where this rank computes."""

    @abstractmethod
    def evaluate(self, micro_batch: MicroBatch) -> Float[torch.Tensor, " documents"]:
        """`sum(weight * nll)` of each document, in evaluation mode, without gradients."""


class Engine(Scorer):
    """One rank's hold on the training of one model."""

    @abstractmethod
    def forward_backward(self, micro_batch: MicroBatch, total_weight: float) -> Float[torch.Tensor, ""]:
        """Add the gradient of `sum(weight * nll) / total_weight` of this micro-batch.

        Args:
            micro_batch: This rank's next share of the window.
            total_weight: The whole window's sum of weights, over all ranks.

        Returns:
            `sum(weight * nll)` of this micro-batch on this rank, detached, fp32, on the device
            (not read back: no host sync).
        """

    @abstractmethod
    def rehearse(self, micro_batch: MicroBatch) -> None:
        """Forward and backward of a micro-batch of which nothing is kept: for who compiles what it sees."""

    @abstractmethod
    def step(self, lr: float) -> StepResult:
        """Clip and apply the gradients added since the last step, on all ranks or on none."""

    @abstractmethod
    def save_state(self, folder: Path) -> Sequence[Path]:
        """Write weights (trainable ones for an adapter) and optimizer state under `folder`.

        Every rank calls this; each writes its own files, none writes another's.

        Returns:
            The files that this rank wrote; who commits the checkpoint fsyncs and hashes them.
        """

    @abstractmethod
    def load_state(self, folder: Path) -> None:
        """Restore what `save_state` wrote, bit for bit. Every rank calls this.

        Raises:
            CheckpointError: The state belongs to another model, or to a world size that this
                engine cannot take it from.
        """

    @abstractmethod
    def export_state(self) -> dict[str, torch.Tensor] | None:
        """The whole model's weights on the CPU, under the Hugging Face model's names: all of
        them, or an adapter's, its frozen ones too. On rank 0; None on the others.
        """
