"""From a micro-batch to its loss: the one module that engines wrap.

A `MicroBatch` becomes tensors (`to_device`), those become hidden states, and only the supervised ones
reach the head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import nn
from torch.nn import functional

from burnish.model.anatomy import Head, body_of, causal_model, head_of
from burnish.model.attention import Capability
from burnish.model.document_attention import document_mask
from burnish.model.head import supervised_loss, token_nll
from burnish.records import NO_TARGET, MicroBatch


@dataclass(frozen=True)
class DeviceBatch:
    """A `MicroBatch` on the device. Everything whose size depends on data was counted on the host,
    so that the forward never waits for the device."""

    token_ids: Int64[torch.Tensor, "rows columns"]
    position_ids: Int64[torch.Tensor, "rows columns"]
    attention_mask: torch.Tensor
    """Packed: the boundaries (`document_mask`). Padded: 1 for tokens, 0 for padding, per row."""
    supervised: Int64[torch.Tensor, " targets"]
    """Where there is a target: numbers into the rows laid end to end."""
    targets: Int64[torch.Tensor, " targets"]
    weights: Float32[torch.Tensor, " targets"]
    documents: Int64[torch.Tensor, " targets"]
    """To which document each target belongs."""
    num_documents: int
    packed: bool


def to_device(micro_batch: MicroBatch, device: torch.device) -> DeviceBatch:
    """Move a micro-batch to the device, its supervised positions gathered."""
    lengths = micro_batch.document_lengths
    rows, columns = micro_batch.token_ids.shape
    targets = micro_batch.targets.reshape(-1)
    # A target of weight 0 adds nothing: it is not computed.
    supervised = np.flatnonzero((targets != NO_TARGET) & (micro_batch.weights.reshape(-1) != 0))
    if micro_batch.packed:
        document_of = np.repeat(np.arange(len(lengths)), lengths)
        bounds = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        mask = document_mask(bounds.to(device, non_blocking=True), int(lengths.max(initial=1)))
    else:
        document_of = np.repeat(np.arange(rows), columns)
        tokens = np.arange(columns)[None, :] < lengths[:, None]
        mask = _move(tokens.astype(np.int64), device)
    return DeviceBatch(
        token_ids=_move(micro_batch.token_ids, device),
        position_ids=_move(micro_batch.position_ids, device),
        attention_mask=mask,
        supervised=_move(supervised.astype(np.int64), device),
        targets=_move(targets[supervised], device),
        weights=_move(micro_batch.weights.reshape(-1)[supervised], device),
        documents=_move(document_of[supervised].astype(np.int64), device),
        num_documents=len(lengths),
        packed=micro_batch.packed,
    )


def _move(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # so that the copy does not stop the host
    return tensor.to(device, non_blocking=True)


@final
class SupervisedModel(nn.Module):
    """A model whose forward is its loss on a micro-batch.

    Args:
        model: A causal language model, with an adapter or without.
        capability: What `can_isolate` found for it.
    """

    def __init__(self, model: nn.Module, capability: Capability) -> None:
        super().__init__()
        self.model = model
        self.capability = capability

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SupervisedModel:
        """Moves buffers, but keeps their dtype.

        An engine that turns its module into bf16 (`module.bfloat16()`, as DeepSpeed does) would round
        the frequencies of rotary embeddings too, and with them every far position.
        """
        before = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        super()._apply(fn, recurse)
        for module, name, buffer in before:
            after = module._buffers[name]
            if after is not None and after.dtype != buffer.dtype:
                module._buffers[name] = buffer.to(after.device)
        return self

    def external_parameters(self) -> list[nn.Parameter]:
        """Parameters that this module's forward uses although a child owns them: ZeRO-3 has to be
        told, so that it gathers them once per micro-batch."""
        head = self._fused_head()
        candidates = [] if head is None else [head.weight, head.bias]
        return [p for p in candidates if isinstance(p, nn.Parameter)]

    def forward(
        self, batch: DeviceBatch, per_document: bool = False
    ) -> Float32[torch.Tensor, ""] | Float32[torch.Tensor, " documents"]:
        """`sum(weight * nll)` of the micro-batch, or of each document.

        Args:
            batch: The micro-batch.
            per_document: One sum per document, without gradients: for evaluation.

        Raises:
            ValueError: The micro-batch is packed and the model must not be given packed ones.
        """
        if batch.packed and not self.capability.packed:
            raise ValueError(f"this model needs padded micro-batches: {self.capability.reason}")
        if per_document:
            with torch.no_grad():
                nll = self._token_nll(batch) * batch.weights
            sums = torch.zeros(batch.num_documents, dtype=torch.float64, device=nll.device)
            return sums.index_add_(0, batch.documents, nll.double()).float()
        head = self._fused_head()
        if head is None:
            return self._plain_loss(batch)
        hidden = self._supervised_hidden(batch)
        return supervised_loss(hidden, head.weight, head.bias, batch.targets, batch.weights, head.shape)

    def _fused_head(self) -> Head | None:
        return head_of(causal_model(self.model)) if self.capability.fused_head else None

    def _supervised_hidden(self, batch: DeviceBatch) -> torch.Tensor:
        """Hidden states at the supervised positions, `[targets, width]`."""
        body = body_of(causal_model(self.model))
        assert body is not None  # the capability says that there is one
        hidden = body(
            input_ids=batch.token_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
        )[0]
        return hidden.flatten(0, 1).index_select(0, batch.supervised)

    def _token_nll(self, batch: DeviceBatch) -> Float32[torch.Tensor, " targets"]:
        head = self._fused_head()
        if head is None:
            return functional.cross_entropy(self._plain_logits(batch), batch.targets, reduction="none")
        hidden = self._supervised_hidden(batch)
        return token_nll(hidden, head.weight, head.bias, batch.targets, head.shape)

    def _plain_loss(self, batch: DeviceBatch) -> Float32[torch.Tensor, ""]:
        nll = functional.cross_entropy(self._plain_logits(batch), batch.targets, reduction="none")
        return (nll * batch.weights).sum()

    def _plain_logits(self, batch: DeviceBatch) -> Float32[torch.Tensor, "targets vocabulary"]:
        """Logits at the supervised positions by the model's own head, for heads that are not one
        matrix. Where the model takes `logits_to_keep`, only columns with a target are computed."""
        causal = causal_model(self.model)
        arguments: dict[str, Any] = {}
        where = batch.supervised
        columns = batch.token_ids.shape[1]
        keeps = "logits_to_keep" in inspect.signature(causal.forward).parameters
        if keeps and batch.token_ids.shape[0] == 1 and len(where) > 0:
            arguments["logits_to_keep"] = where
            where = torch.arange(len(where), device=where.device)
            columns = len(where)
        logits = causal(
            input_ids=batch.token_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
            **arguments,
        ).logits
        # A few old models ignore logits_to_keep's tensor form.
        assert logits.shape[1] == columns
        return logits.flatten(0, 1).index_select(0, where).float()
