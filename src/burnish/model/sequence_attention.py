"""Attention over a sequence whose tokens are shared out among ranks (DeepSpeed Ulysses' scheme).

Everything but attention looks at one token at a time, so each of N ranks keeps T/N tokens of the row.
For attention they change places: before it every rank gets all tokens of 1/N of the heads, and after
it all heads of its own tokens.

    queries    rank 0: tokens 0..3, heads a b        rank 0: tokens 0..7, head a
               rank 1: tokens 4..7, heads a b   ->   rank 1: tokens 4..7 and 0..3 too, head b

Documents are then whole wherever attention looks, so the document attention is used as it is.

Source: Jacobs et al., DeepSpeed Ulysses, 2023 (arXiv 2309.14509), section 3.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from jaxtyping import Float
from torch import nn

from burnish.errors import ConfigError, Problem
from burnish.model.anatomy import causal_model
from burnish.model.attention import Capability
from burnish.model.document_attention import (
    UnsupportedAttentionError,
    document_attention,
    is_document_mask,
)

SEQUENCE_ATTENTION_NAME = "burnish_sequence"
"""Under this name transformers knows the function, once `share_sequence` was called."""


def share_sequence(model: nn.Module, capability: Capability, group: Any, size: int) -> None:
    """Let a model's attention see the tokens of all ranks of a group.

    Args:
        model: The causal language model, adapted or not.
        capability: What `can_isolate` found for it.
        group: The process group of the ranks that share each sequence.
        size: How many they are.

    Raises:
        ConfigError: The model's attention is not ours, or its heads cannot be shared out equally.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    causal = causal_model(model)
    if not capability.packed:
        what = f"is {size}, but documents cannot be packed here: {capability.reason}"
        raise ConfigError(Problem("engine.sequence_parallel", what, "Leave it at 1."))
    num_heads = causal.config.get_text_config(decoder=True).num_attention_heads
    if num_heads % size:
        what = f"is {size}, which does not divide the model's {num_heads} attention heads"
        raise ConfigError(Problem("engine.sequence_parallel", what, "Give a divisor of the heads."))
    attention = functools.partial(_shared_attention, group=group, size=size)
    AttentionInterface.register(SEQUENCE_ATTENTION_NAME, attention)
    AttentionMaskInterface.register(SEQUENCE_ATTENTION_NAME, sdpa_mask)
    causal.set_attn_implementation(SEQUENCE_ATTENTION_NAME)


def _shared_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    group: Any,
    size: int,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """`document_attention` over the tokens of all ranks; arguments and result are this rank's."""
    if attention_mask is None or not is_document_mask(attention_mask):
        raise UnsupportedAttentionError("a shared sequence needs document boundaries")
    key, value = (_enough_heads(x, query.shape[1], size) for x in (key, value))
    if s_aux is not None:
        s_aux = s_aux.chunk(size)[torch.distributed.get_rank(group)]
    query, key, value = _tokens_for_heads((query, key, value), group, size)
    out, _ = document_attention(module, query, key, value, attention_mask, s_aux=s_aux, **others)
    return _heads_for_tokens(out, group, size), None


def _enough_heads(x: torch.Tensor, num_query_heads: int, size: int) -> torch.Tensor:
    """Repeat key or value heads until each rank can have its own, in the order of the query heads.

    `[1, key_heads, tokens, width]`; where 8 query heads share 2 key heads and 4 ranks 2 query heads
    each, every key head is needed by two ranks.
    """
    num_heads = x.shape[1]
    if num_heads % size == 0:
        return x
    repeats = size // num_heads if size % num_heads == 0 else num_query_heads // num_heads
    return x.repeat_interleave(repeats, dim=1)


def _tokens_for_heads(
    parts: tuple[torch.Tensor, ...], group: Any, size: int
) -> tuple[Float[torch.Tensor, "1 heads tokens width"], ...]:
    """Of each part, from this rank's tokens of all heads to all tokens of this rank's heads.

    Queries, keys and values travel in one message: fewer of them, and no order to keep.
    """
    tokens = parts[0].shape[2]
    # [1, heads, tokens, width] -> [rank, tokens, heads of that rank * width]
    pieces = [p[0].unflatten(0, (size, -1)).transpose(1, 2).flatten(2) for p in parts]
    arrived = _exchange(torch.cat(pieces, dim=2), group).flatten(0, 1)
    wholes = arrived.split([piece.shape[2] for piece in pieces], dim=1)
    return tuple(
        whole.reshape(tokens * size, -1, part.shape[3]).transpose(0, 1)[None].to(part.dtype)
        for whole, part in zip(wholes, parts, strict=True)
    )


def _heads_for_tokens(
    out: Float[torch.Tensor, "1 tokens heads width"], group: Any, size: int
) -> Float[torch.Tensor, "1 own_tokens all_heads width"]:
    """From all tokens of this rank's heads back to this rank's tokens of all heads."""
    arrived = _exchange(out[0].unflatten(0, (size, -1)), group)  # [rank, tokens, heads, width]
    return arrived.transpose(0, 1).flatten(1, 2)[None]


def _exchange(x: torch.Tensor, group: Any) -> torch.Tensor:
    exchanged: Any = _Exchange.apply(x, group)
    return exchanged


class _Exchange(torch.autograd.Function):
    """Send `x[i]` to rank i of the group and receive its `x[me]`; the backward is the same again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_to_all(grads[0], ctx.group), None


def _all_to_all(x: torch.Tensor, group: Any) -> torch.Tensor:
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.distributed.all_to_all_single(received, x.contiguous(), group=group)
    return received
