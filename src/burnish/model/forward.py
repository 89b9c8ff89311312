"""From a micro-batch to its loss: the one module that engines wrap.

A `DeviceBatch` becomes hidden states, and only the supervised ones reach the head.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from jaxtyping import Float32
from torch import nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from burnish.errors import ConfigError, Problem
from burnish.model.anatomy import Head, body_of, causal_model, head_layer, head_of
from burnish.model.attention import Capability
from burnish.model.device_batch import DeviceBatch
from burnish.model.extras import Balance, balancing_loss, noisy_embeddings
from burnish.model.head import supervised_loss, token_nll
from burnish.model.last_layer import MOST_SUPERVISED, last_layer, supervised_rows
from burnish.model.objective import PLAIN, Objective
from burnish.model.prefix_attention import is_prefix_mask


@final
class SupervisedModel(nn.Module):
    """A model whose forward is its loss on a micro-batch.

    Args:
        model: A causal language model, with an adapter or without.
        capability: What `can_isolate` found for it.
        objective: What the gradient is of, besides the plain loss.

    Raises:
        ConfigError: The objective balances experts and the model has none.
    """

    def __init__(self, model: nn.Module, capability: Capability, objective: Objective = PLAIN) -> None:
        super().__init__()
        self.model = model
        self.capability = capability
        self.objective = objective
        self._balance = Balance.of(causal_model(model), objective.router_aux_loss)

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
        layer = head_layer(causal_model(self.model)) if self.capability.fused_head else None
        return [] if layer is None else list(layer.parameters())

    def forward(
        self, batch: DeviceBatch, per_document: bool = False
    ) -> Float32[torch.Tensor, ""] | Float32[torch.Tensor, " documents"]:
        """`sum(weight * nll)` of the micro-batch, or of each document.

        The value is the plain loss whatever the objective; the gradient is the objective's.

        Args:
            batch: The micro-batch.
            per_document: One sum per document, without gradients and noise: for evaluation.

        Raises:
            ValueError: The micro-batch is packed and the model must not be given packed ones; or its
                documents share their beginnings, and something is wanted of each of them.
            ConfigError: Experts are to be balanced, and the model's layers have none.
        """
        if batch.packed and not self.capability.packed:
            raise ValueError(f"this model needs padded micro-batches: {self.capability.reason}")
        if is_prefix_mask(batch.attention_mask) and (
            per_document or self.objective.neftune_alpha or self._balance is not None
        ):
            raise ValueError("documents that share tokens cannot be told apart")
        if per_document:
            with torch.no_grad():
                nll = self._token_nll(batch) * batch.weights
            sums = torch.zeros(batch.num_documents, dtype=torch.float64, device=nll.device)
            return sums.index_add_(0, batch.documents, nll.double()).float()
        with self._noise(batch):
            hidden_or_logits, router_logits = self._run(batch)
        head = self._fused_head()
        if head is None:
            loss = self._plain_loss(hidden_or_logits, batch)
        else:
            weights = batch.targets, batch.weights
            loss = supervised_loss(
                hidden_or_logits, head.weight, head.bias, *weights, head.shape, self.objective
            )
        if self._balance is None or not self.training:
            return loss
        return loss + _gradient_only(self._balancing_loss(self._balance, router_logits, batch))

    def _fused_head(self) -> Head | None:
        return head_of(causal_model(self.model)) if self.capability.fused_head else None

    def _noise(self, batch: DeviceBatch) -> contextlib.AbstractContextManager[None]:
        alpha = self.objective.neftune_alpha
        if alpha is None or not self.training:
            return contextlib.nullcontext()
        lengths = batch.lengths.float()[batch.document_of_tokens()]
        return noisy_embeddings(causal_model(self.model), alpha, lengths)

    def _run(self, batch: DeviceBatch) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Hidden states at the supervised positions (`[targets, width]`), or logits where the head is not
        fused, and the router's logits of every layer where they are needed."""
        arguments: dict[str, Any] = {
            "input_ids": batch.token_ids,
            "attention_mask": batch.attention_mask,
            "use_cache": False,
        }
        if batch.packed:  # a padded row is numbered by the model itself, in its own way (RoBERTa: from 2)
            arguments["position_ids"] = batch.position_ids
        if self._balance is not None and self.training:
            arguments["output_router_logits"] = True
        if not self.capability.fused_head or head_layer(causal_model(self.model)) is None:
            return self._plain_logits(batch, arguments)
        body = body_of(causal_model(self.model))
        assert body is not None  # the capability says that there is one
        wants_routers = "output_router_logits" in arguments  # of every token
        layer = None if wants_routers else self._trimmed_layer(body, batch)
        with contextlib.nullcontext() if layer is None else supervised_rows(layer, batch.supervised):
            outputs = body(**arguments)
        hidden = outputs[0].flatten(0, 1)
        if layer is None:
            hidden = hidden.index_select(0, batch.supervised)
        return hidden, _routers(outputs) if wants_routers else ()

    def _trimmed_layer(self, body: nn.Module, batch: DeviceBatch) -> GradientCheckpointingLayer | None:
        """The last layer, if it is to be computed at supervised rows only. Not where there are none: every
        module is given rows."""
        share = len(batch.supervised) / batch.token_ids.numel()
        pays = 0 < share < MOST_SUPERVISED
        return last_layer(body) if pays and self.capability.whole_last_layer is None else None

    def _token_nll(self, batch: DeviceBatch) -> Float32[torch.Tensor, " targets"]:
        head = self._fused_head()
        hidden_or_logits, _ = self._run(batch)
        if head is None:
            return functional.cross_entropy(hidden_or_logits, batch.targets, reduction="none")
        return token_nll(hidden_or_logits, head.weight, head.bias, batch.targets, head.shape)

    def _plain_loss(self, logits: torch.Tensor, batch: DeviceBatch) -> Float32[torch.Tensor, ""]:
        terms = self.objective
        nll = functional.cross_entropy(logits, batch.targets, reduction="none")
        loss = (nll * batch.weights).sum()
        if terms.label_smoothing:
            even = -functional.log_softmax(logits, dim=-1).mean(-1)
            loss = loss + _gradient_only((terms.label_smoothing * (even - nll) * batch.weights).sum())
        if terms.z_loss:
            square = torch.logsumexp(logits, dim=-1).square()
            loss = loss + _gradient_only((terms.z_loss * square * batch.weights).sum())
        return loss

    def _balancing_loss(
        self, balance: Balance, router_logits: Sequence[torch.Tensor], batch: DeviceBatch
    ) -> Float32[torch.Tensor, ""]:
        if not router_logits:  # a config may name the loss's factor for layers that it makes without experts
            what = f"is set, but {type(causal_model(self.model)).__name__} gave no router's logits"
            raise ConfigError(Problem("train.router_aux_loss", what, "Leave it out."))
        weights = batch.weights.new_zeros(batch.num_documents).index_add(0, batch.documents, batch.weights)
        if batch.packed:
            counted = torch.ones_like(batch.token_ids, dtype=torch.float32)
            counted[:, batch.token_ids.shape[1] - batch.num_filled :] = 0
        else:
            counted = batch.attention_mask.float()
        documents = batch.document_of_tokens().reshape(-1)
        loss = balancing_loss(
            router_logits, documents, counted.reshape(-1), weights, balance.experts_per_token
        )
        return balance.factor * loss

    def _plain_logits(
        self, batch: DeviceBatch, arguments: dict[str, Any]
    ) -> tuple[Float32[torch.Tensor, "targets vocabulary"], Sequence[torch.Tensor]]:
        """Logits at the supervised positions by the model's own head, for heads that are not one
        matrix. Where the model takes `logits_to_keep`, only columns with a target are computed."""
        causal = causal_model(self.model)
        where = batch.supervised
        columns = batch.token_ids.shape[1]
        keeps = "logits_to_keep" in inspect.signature(causal.forward).parameters
        if keeps and batch.token_ids.shape[0] == 1 and len(where) > 0:
            arguments["logits_to_keep"] = where
            where = torch.arange(len(where), device=where.device)
            columns = len(where)
        outputs = causal(**arguments)
        logits = outputs.logits
        # A few old models ignore logits_to_keep's tensor form.
        assert logits.shape[1] == columns
        kept = logits.flatten(0, 1).index_select(0, where).float()
        return kept, _routers(outputs) if "output_router_logits" in arguments else ()


def _routers(outputs: Any) -> Sequence[torch.Tensor]:
    """Every layer's router logits; none from models that say None although they were asked."""
    return outputs.router_logits or ()


def _gradient_only(term: torch.Tensor) -> torch.Tensor:
    """0, with the gradient of `term`: the loss that is logged stays comparable with evaluation's."""
    return term - term.detach()
