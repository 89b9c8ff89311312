"""Attention that keeps packed documents apart: which implementation, and the function itself.

**How boundaries travel.** A model is handed, as its `attention_mask`, a small integer tensor that
holds where documents begin (`document_mask`). transformers passes a mask of four dimensions on as it
is, builds none of its own, and every layer hands it to the attention function. So the boundaries are
an ordinary argument of every layer: activation checkpointing saves it and gives it back in the
backward, and nothing is held in a global. Real masks are bool or float, so ours cannot be mistaken.

Without such a tensor (generation, padded micro-batches) the function is transformers' own SDPA.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float, Int32
from torch import nn

from burnish.model.cpu_kernel import causal_mask, document_flash_attention
from burnish.model.native.attend import Paths, attend, can_attend
from burnish.model.prefix_attention import (
    is_prefix_mask,
    paths_of,
    segments_of,
    shared_flash_attention,
    shared_varlen_attention,
)
from burnish.model.varlen import fits_varlen, varlen, varlen_dtype

ATTENTION_NAME = "burnish"
"""Under this name transformers knows our attention function, once `register_attention` was called."""

# What families pass to an attention function without wanting another result from it.
_WITHOUT_EFFECT = frozenset(
    {
        "position_ids", "use_cache", "output_attentions", "output_hidden_states", "cache_position",
        "is_causal", "return_dict", "output_router_logits", "num_items_in_batch", "labels",
        "layer_idx", "deterministic",
    }
)  # fmt: skip

_READS_BOUNDS = "numbers of tokens are read from a tensor"
"""Why a compiled layer calls these as they are."""

Kernel = Literal["native", "flash_cpu", "varlen"]
DocumentMask = Int32[torch.Tensor, "1 1 longest bounds"]


@dataclass(frozen=True)
class Scores:
    """What a layer wants done to its attention scores."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None
    dropout: float

    @property
    def plain(self) -> bool:
        """Nothing but scale, window and softmax: what kernels know."""
        return self.softcap is None and self.sinks is None and self.dropout == 0.0


class UnsupportedAttentionError(RuntimeError):
    """A layer asks for something that packed documents cannot be given; they must be padded."""


def register_attention() -> None:
    """Make our attention function known to transformers. Needed before a model uses it; harmless twice."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION_NAME, document_attention)
    # Only asked for when there is no document mask: then the function is SDPA and needs its masks.
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def document_mask(bounds: Int32[torch.Tensor, " bounds"], longest: int) -> DocumentMask:
    """Document boundaries in the shape of an attention mask.

    Args:
        bounds: `[0, ..., tokens]`, where documents begin and the last one ends.
        longest: Length of the longest document. It travels as a size, because a kernel needs it on
            the host and reading it from the device would stop the step.
    """
    return bounds.view(1, 1, 1, -1).expand(1, 1, longest, -1)


def is_document_mask(mask: torch.Tensor | None) -> bool:
    """Whether an attention mask carries document boundaries, or the segments of a `prefix_mask`."""
    return mask is not None and mask.dtype == torch.int32 and mask.dim() == 4


def document_attention(  # noqa: PLR0913, PLR0917 (transformers calls it by these names)
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers' layers call, under the name `burnish`.

    Args:
        module: The layer; not used where documents are packed.
        query: `[1, heads, tokens, width]`, documents end to end.
        key: `[1, key_heads, tokens, width]`.
        value: The same.
        attention_mask: A `document_mask` or a `prefix_mask`; anything else goes to transformers' SDPA.
        scaling: Factor on the scores; `1 / sqrt(width)` if None.
        dropout: Probability of dropping an attention weight.
        sliding_window: How many tokens a token sees, itself included.
        softcap: Scores become `softcap * tanh(score / softcap)` (Gemma 2).
        s_aux: One more score per head that takes its share of the softmax: a sink (gpt-oss).
        **others: What the layer passes besides.

    Returns:
        `[1, tokens, heads, width]`, and None for the attention weights.

    Raises:
        UnsupportedAttentionError: The layer asks for something that is not known here.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = Scores(scale, sliding_window, softcap, s_aux, dropout)
    if attention_mask is None or not is_document_mask(attention_mask):
        return _without_documents(module, query, key, value, attention_mask, scores, others)
    unknown = sorted(
        name for name, given in others.items() if given is not None and name not in _WITHOUT_EFFECT
    )
    if unknown:
        raise UnsupportedAttentionError(f"its layers pass {', '.join(unknown)} to attention")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise UnsupportedAttentionError("packed documents need one row and as many keys as queries")
    kernel = kernel_for(query, value, attention_mask.shape[2]) if scores.plain else None
    if kernel == "native":
        return _native(query, key, value, attention_mask, scores), None
    if is_prefix_mask(attention_mask):
        return _with_prefixes(query, key, value, attention_mask, scores, kernel), None
    if kernel == "flash_cpu":
        return _flash_on_cpu(query, key, value, attention_mask, scores), None
    if kernel == "varlen":
        return _varlen(query, key, value, attention_mask, scale, sliding_window), None
    return _one_by_one(query, key, value, attention_mask, scores), None


def kernel_for(query: torch.Tensor, value: torch.Tensor, longest: int) -> Kernel | None:
    """Which kernel knows documents, the longest of that length, where these queries and values are; None
    where none does."""
    if query.device.type == "cpu":
        if can_attend(query, value, longest):
            return "native"
        return "flash_cpu" if query.shape[-1] == value.shape[-1] else None
    return "varlen" if query.device.type == "cuda" and fits_varlen(query, value) else None


def _without_documents(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scores: Scores,
    others: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """Generation and padded rows: transformers' SDPA, or written out where SDPA would ignore something."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if scores.softcap is None and scores.sinks is None:
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=scores.dropout, scaling=scores.scale, **others
        )
    if mask is None:  # transformers leaves a mask out only where causality is all it says
        num_queries, num_keys = query.shape[2], key.shape[2]
        mask = causal_mask(num_keys, None, query.device)[num_keys - num_queries :]
    return _written_out(query, key, value, mask, scores), None


def _native(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scores: Scores
) -> Float[torch.Tensor, "1 tokens heads width"]:
    """Our own kernel, for bf16 on CPUs that multiply it in hardware; shared beginnings too."""
    paths = paths_of(mask) if is_prefix_mask(mask) else Paths.of_documents(mask[0, 0, 0], query.shape[2])
    return attend(query, key, value, paths, scores.scale, scores.window)


@torch.compiler.disable(reason=_READS_BOUNDS)
def _flash_on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scores: Scores
) -> Float[torch.Tensor, "1 tokens heads width"]:
    bounds = mask[0, 0, 0].tolist()
    return document_flash_attention(query, key, value, bounds, scores.scale, scores.window)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    window: int | None,
) -> Float[torch.Tensor, "1 tokens heads value_width"]:
    """FlashAttention over all documents in one call."""
    bounds = mask[0, 0, 0].contiguous()
    q, k, v = _as_varlen_wants(query, key, value)
    return varlen(q, k, v, bounds, bounds, mask.shape[2], scale, window)[..., : value.shape[-1]]


def _as_varlen_wants(*states: torch.Tensor) -> Iterator[Float[torch.Tensor, "tokens _heads width"]]:
    """Query, key and value, tokens first, in the kernel's dtype. Values narrower than queries (latent
    attention) get zeros: what becomes of those is cut off."""
    dtype, width = varlen_dtype(states[0]), states[0].shape[-1]
    for state in states:
        narrower = width - state.shape[-1]
        wide = nn.functional.pad(state, (0, narrower)) if narrower else state
        yield wide[0].transpose(0, 1).to(dtype)


@torch.compiler.disable(reason=_READS_BOUNDS)
def _with_prefixes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scores: Scores,
    kernel: Kernel | None,
) -> Float[torch.Tensor, "1 tokens heads value_width"]:
    """Rows in which documents share their beginnings."""
    window = scores.window if scores.window is not None and scores.window < mask.shape[2] else None
    if kernel == "flash_cpu" and window is None:
        return shared_flash_attention(query, key, value, segments_of(mask), scores.scale)
    if kernel == "varlen":
        q, k, v = _as_varlen_wants(query, key, value)
        return shared_varlen_attention(q, k, v, mask, scores.scale, window)[..., : value.shape[-1]]
    segments, outs = segments_of(mask), []
    for i, (begin, stop) in enumerate(zip(segments.begins, segments.stops, strict=True)):
        runs = segments.keys(i)
        k, v = (torch.cat([x[:, :, a:b] for a, b in runs], dim=2) for x in (key, value))
        seen = causal_mask(k.shape[2], window, query.device)[begin - stop :]
        outs.append(_written_out(query[:, :, begin:stop], k, v, seen, scores))
    return torch.cat(outs, dim=1)


@torch.compiler.disable(reason=_READS_BOUNDS)
def _one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scores: Scores
) -> Float[torch.Tensor, "1 tokens heads value_width"]:
    """Each document by itself: the slower path, for everything that kernels do not know."""
    bounds = mask[0, 0, 0].tolist()  # on CUDA a host sync per layer: this is not the fast path
    outs = []
    for begin, end in pairwise(bounds):
        q, k, v = (x[:, :, begin:end] for x in (query, key, value))
        if scores.plain and query.device.type == "cuda":
            outs.append(_torchs_own(q, k, v, scores))
        else:
            outs.append(_written_out(q, k, v, causal_mask(end - begin, scores.window, q.device), scores))
    return torch.cat(outs, dim=1)


def _torchs_own(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores
) -> Float[torch.Tensor, "1 tokens heads value_width"]:
    """One document by PyTorch's kernels, which keep no matrix of scores on a GPU, in fp32 neither."""
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    hides = scores.window is not None and scores.window < length
    mask = causal_mask(length, scores.window, query.device).to(query.dtype) if hides else None
    attend = nn.functional.scaled_dot_product_attention
    out = attend(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scores.scale)
    return out.transpose(1, 2)


def _written_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scores: Scores
) -> Float[torch.Tensor, "rows queries heads value_width"]:
    """Softmax attention as the formula has it.

    `mask` is added to the scores, or True where a key is seen if it is bool.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    wide = torch.promote_types(query.dtype, torch.float32)
    logits = (query @ key.transpose(-1, -2)).to(wide) * scores.scale
    if scores.softcap is not None:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    if mask.dtype == torch.bool:
        # Not -inf: a padding token may see nothing at all, and must not become NaN.
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    else:
        logits = logits + mask
    if scores.sinks is not None:
        sink = scores.sinks.to(wide).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], dim=-1)
    shares = logits.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    shares = nn.functional.dropout(shares, scores.dropout)
    return (shares @ value).transpose(1, 2)
