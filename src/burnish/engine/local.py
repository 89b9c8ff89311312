"""Plain PyTorch on one process or several: what is trained is one model, whatever the ranks.

Weights and optimizer state are fp32 and the forward runs under autocast. Every rank holds a whole
copy; its gradients are those of its own micro-batches, and one bucketed all-reduce at the step
sums them. There is no wrapper around the model and no hook in the backward, so the number of
micro-batches and the order of parameters cannot matter.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float

from burnish.config.schema import OptimConfig
from burnish.engine.base import Engine, Scorer, StepResult
from burnish.engine.gradients import (
    clip_gradients,
    drop_gradients,
    finite_on_all_ranks,
    global_grad_norm,
    sum_gradients,
)
from burnish.engine.optimizer import build_optimizer, set_learning_rate
from burnish.engine.phases import PhaseClock
from burnish.engine.precision import LossScale, autocast, compiles_products
from burnish.engine.state_files import (
    copy_exactly,
    exported_weights,
    optimizer_state,
    read_tensors,
    restore_optimizer_state,
    trained_state,
    write_tensors,
)
from burnish.errors import CheckpointError, Problem
from burnish.model.device_batch import to_device
from burnish.model.forward import SupervisedModel
from burnish.records import MicroBatch
from burnish.runtime import Ranks

WEIGHTS_FILE = "weights.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
SCALER_FILE = "scaler.json"


@final
class LocalScorer(Scorer):
    """Evaluation in one process, with nothing to train.

    Args:
        model: Model and loss; moved to `device`.
        device: Where to compute.
        compute_dtype: What the forward runs in (fp32 means no autocast).
    """

    def __init__(self, model: SupervisedModel, *, device: torch.device, compute_dtype: torch.dtype) -> None:
        self._model = model.to(device)
        self._device = device
        self._compute_dtype = compute_dtype
        self._fill_up = compiles_products(device, compute_dtype)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._device

    @torch.no_grad()
    def evaluate(self, micro_batch: MicroBatch) -> Float[torch.Tensor, " documents"]:
        """See `Scorer.evaluate`."""
        was_training = self._model.training
        self._model.eval()
        try:
            with autocast(self._device, self._compute_dtype):
                batch = to_device(micro_batch, self._device, self._fill_up)
                return self._model(batch, per_document=True).float()
        finally:
            self._model.train(was_training)


@final
class LocalEngine(Engine):
    """One process, or data parallel over several, in plain PyTorch.

    Args:
        model: Model and loss; moved to `device`. Its trainable weights should be fp32.
        optim: The optimizer and the clipping.
        ranks: This process among the others.
        device: Where to compute.
        compute_dtype: What the forward runs in (fp32 means no autocast).
        adapter_only: Export an adapter's weights only.
    """

    def __init__(
        self,
        model: SupervisedModel,
        optim: OptimConfig,
        *,
        ranks: Ranks,
        device: torch.device,
        compute_dtype: torch.dtype,
        adapter_only: bool,
    ) -> None:
        self._model = model.to(device)
        self._ranks = ranks
        self._device = device
        self._compute_dtype = compute_dtype
        self._fill_up = compiles_products(device, compute_dtype)
        self._adapter_only = adapter_only
        self._max_grad_norm = optim.max_grad_norm
        self._scorer = LocalScorer(self._model, device=device, compute_dtype=compute_dtype)
        self._clock = PhaseClock(device)
        self._optimizer = build_optimizer(self._model, optim)
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._scale = LossScale(compute_dtype == torch.float16)
        self._model.train()
        self._share_weights()

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self._device

    def forward_backward(self, micro_batch: MicroBatch, total_weight: float) -> Float[torch.Tensor, ""]:
        """See `Engine.forward_backward`."""
        with self._clock.phase("forward"), autocast(self._device, self._compute_dtype):
            nll_sum = self._model(to_device(micro_batch, self._device, self._fill_up))
        with self._clock.phase("backward"):
            (nll_sum / total_weight * self._scale.value).backward()
        return nll_sum.detach()

    def rehearse(self, micro_batch: MicroBatch) -> None:
        """See `Engine.rehearse`."""
        with autocast(self._device, self._compute_dtype):
            nll_sum = self._model(to_device(micro_batch, self._device, self._fill_up))
        drop_gradients(nll_sum, self._model)

    def step(self, lr: float) -> StepResult:
        """See `Engine.step`."""
        sum_gradients(self._parameters, self._ranks)
        self._scale.unscale(self._parameters)
        norm = global_grad_norm(self._parameters)
        applied = finite_on_all_ranks(norm, self._ranks)
        if applied:
            clip_gradients(self._parameters, norm, self._max_grad_norm)
            set_learning_rate(self._optimizer, lr)
            self._optimizer.step()
        may_repeat = self._scale.update(applied)
        self._optimizer.zero_grad(set_to_none=True)
        seconds = self._clock.take()
        return StepResult(norm.item(), applied, may_repeat, seconds.get("forward"), seconds.get("backward"))

    def evaluate(self, micro_batch: MicroBatch) -> Float[torch.Tensor, " documents"]:
        """See `Scorer.evaluate`."""
        return self._scorer.evaluate(micro_batch)

    def save_state(self, folder: Path) -> Sequence[Path]:
        """Write safetensors from rank 0: every rank holds the same state."""
        if not self._ranks.is_main:
            return []
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS_FILE, trained_state(self._model))
        write_tensors(folder / OPTIMIZER_FILE, optimizer_state(self._model, self._optimizer))
        (folder / SCALER_FILE).write_text(json.dumps(self._scale.state_dict()))
        return [folder / name for name in (WEIGHTS_FILE, OPTIMIZER_FILE, SCALER_FILE)]

    def load_state(self, folder: Path) -> None:
        """Read the same files on every rank; the world size may be another.

        Raises:
            CheckpointError: They were written by another engine.
        """
        if not (folder / WEIGHTS_FILE).is_file():
            what = "the checkpoint was saved by DeepSpeed, this run has the local engine"
            cure = "Set engine.kind: deepspeed; it takes one process too."
            raise CheckpointError(Problem("engine.kind", what, cure))
        copy_exactly(trained_state(self._model), read_tensors(folder / WEIGHTS_FILE), "weights")
        restore_optimizer_state(self._model, self._optimizer, read_tensors(folder / OPTIMIZER_FILE))
        self._scale.load_state_dict(json.loads((folder / SCALER_FILE).read_text()))

    def export_state(self) -> dict[str, torch.Tensor] | None:
        """See `Engine.export_state`. Tied weights stay one tensor under two names."""
        if not self._ranks.is_main:
            return None
        return exported_weights(self._model.model, self._adapter_only)

    @torch.no_grad()
    def _share_weights(self) -> None:
        """Give every rank rank 0's trained weights: fresh ones come from each rank's own seed."""
        if self._ranks.world_size > 1:
            for tensor in trained_state(self._model).values():
                torch.distributed.broadcast(tensor, src=0)
