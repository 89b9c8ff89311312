"""What a model can be trusted with, decided by trying it and not by its name.

Two questions: may documents be packed into one row, and is the head a plain matrix. Both are answered
by comparing numbers on a few tokens, so a family that transformers adds tomorrow falls into the safe
path (padded rows, the model's own head) by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from burnish.model.anatomy import body_of, causal_model, head_of
from burnish.model.attention import (
    ATTENTION_NAME,
    UnsupportedAttentionError,
    document_mask,
    register_attention,
)

PROBE_LENGTHS = (7, 6)
"""Tokens of the two documents of a probe."""


@dataclass(frozen=True)
class Capability:
    """How a model is to be fed, and why."""

    packed: bool
    """Documents may lie end to end in one row."""
    attention: str
    """The attention implementation, as transformers calls it (`burnish` is ours)."""
    reason: str
    """Why it is not packed, or what was checked; for the plan and for people."""
    fused_head: bool = True
    """The head is one matrix, and `head_shape` says right what becomes of its output."""


def can_isolate(model: nn.Module, choice: str = "auto") -> Capability:
    """Find out how a model is to be fed, and set its attention accordingly.

    Args:
        model: A causal language model with its weights, with an adapter or without.
        choice: `model.attention` of the config.
    """
    causal = causal_model(model)
    fused = verify_head(causal)
    padded_attention = _padded_attention(causal, choice)
    if choice not in ("auto", "varlen"):
        causal.set_attn_implementation(padded_attention)
        return Capability(False, padded_attention, f"model.attention is {choice}", fused)
    register_attention()
    problem = verify_isolation(causal)
    if problem is None:
        causal.set_attn_implementation(ATTENTION_NAME)
        return Capability(True, ATTENTION_NAME, "packed documents equal documents alone", fused)
    causal.set_attn_implementation(padded_attention)
    return Capability(False, padded_attention, problem, fused)


def _padded_attention(model: PreTrainedModel, choice: str) -> str:
    """transformers' attention for padded rows: as asked for, else SDPA where it gives what the
    written-out attention gives (it ignores Gemma 2's soft-capping, for one)."""
    if choice not in ("auto", "varlen"):
        return {"flex": "flex_attention"}.get(choice, choice)
    body = body_of(model)
    if not model._supports_sdpa or body is None:
        return "eager"
    tokens = _probe_tokens(model)[0]
    with _quiet(model):
        model.set_attn_implementation("eager")
        eager = _alone(body, tokens)
        model.set_attn_implementation("sdpa")
        return "sdpa" if _close(eager, _alone(body, tokens), eager.dtype) else "eager"


def _probe_tokens(model: PreTrainedModel) -> list[torch.Tensor]:
    """Two different first documents of one length, and a second one."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    first, second = PROBE_LENGTHS
    return [torch.randint(vocabulary, (n,), generator=generator) for n in (first, first, second)]


def verify_isolation(model: PreTrainedModel) -> str | None:
    """Compare two packed documents with each alone.

    Args:
        model: The model; its attention implementation is changed.

    Returns:
        None if they are equal and the second does not see the first; otherwise what is wrong.
    """
    body = body_of(model)
    if body is None:
        return f"{type(model).__name__} has no body apart from its head"
    one, other, two = _probe_tokens(model)
    first = len(one)
    with _quiet(model):
        model.set_attn_implementation("eager")
        alone = torch.cat([_alone(body, one), _alone(body, two)])
        model.set_attn_implementation(ATTENTION_NAME)
        if model.config._attn_implementation != ATTENTION_NAME:
            return f"{type(model).__name__} does not take an attention function"
        try:
            packed = _packed(body, one, two)
            neighbour = _packed(body, other, two)
        except (UnsupportedAttentionError, TypeError, RuntimeError, ValueError, IndexError) as error:
            # Whatever a family does with a mask it does not understand: it is not for packing.
            return f"{type(model).__name__} cannot be given document boundaries: {error}"
    if not _close(packed[first:], neighbour[first:], packed.dtype):
        return "a document's hidden states change with its neighbour"
    if not _close(packed, alone, packed.dtype):
        return "packed documents give other hidden states than documents alone"
    return None


def verify_head(model: PreTrainedModel) -> bool:
    """Whether `head_of` gives the logits that the model gives."""
    body, head = body_of(model), head_of(model)
    if body is None or head is None:
        return False
    tokens = torch.arange(4, device=model.device)[None]
    with _quiet(model):
        own = model(input_ids=tokens, use_cache=False).logits.float()
        hidden = body(input_ids=tokens, use_cache=False)[0]
        logits = nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float()
        logits = logits * head.shape.scale
        if head.shape.softcap is not None:
            logits = head.shape.softcap * torch.tanh(logits / head.shape.softcap)
    return own.shape == logits.shape and _close(own, logits, head.weight.dtype)


def _alone(body: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    device = next(body.parameters()).device
    ids = tokens.to(device)[None]
    positions = torch.arange(len(tokens), device=device)[None]
    return body(input_ids=ids, position_ids=positions, use_cache=False)[0][0]


def _packed(body: nn.Module, *documents: torch.Tensor) -> torch.Tensor:
    device = next(body.parameters()).device
    lengths = [len(d) for d in documents]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return body(
        input_ids=torch.cat(documents).to(device)[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths]).to(device)[None],
        attention_mask=document_mask(bounds, max(lengths)),
        use_cache=False,
    )[0][0]


def _close(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> bool:
    """Equal up to the rounding of a deep model in this dtype; a leak is far larger."""
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    gap = (one.float() - other.float()).abs().max()
    return bool(gap <= tolerance * one.float().abs().max())


@contextmanager
def _quiet(model: PreTrainedModel) -> Iterator[Any]:
    """No gradients, no dropout, and the random state as it was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
