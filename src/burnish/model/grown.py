"""Rows of their own for new tokens, beside a frozen embedding and head.

With an adapter the old rows stay frozen, and new tokens have rows of their own beside them:

    embedding   [ old rows, frozen ]  +  [ new rows, trained ]      a token is looked up in one or the other
    head        logits of the old     |  logits of the new          each in its token's column

They are saved in the adapter as peft's `trainable_token_indices`. Not trained by peft's own layers, because
those read weights that ZeRO-3 has not gathered, and leave a head's bias out.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float, Int64
from torch import nn


@final
class GrownEmbedding(nn.Module):
    """A frozen embedding, and rows of their own for some tokens.

    Args:
        base: The embedding; its rows of those tokens are not used.
        tokens: Their numbers, ascending.
        rows: Their vectors, trained.
    """

    tokens: torch.Tensor

    def __init__(self, base: nn.Embedding, tokens: Sequence[int], rows: nn.Parameter) -> None:
        super().__init__()
        self.base = base
        self.new = _lookalike(base, rows)
        self.new.num_embeddings, self.new.padding_idx = len(tokens), None
        self.register_buffer("tokens", torch.tensor(tokens, device=rows.device), persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """The frozen rows, as what looks at an embedding from outside expects them."""
        return self.base.weight

    def forward(self, ids: Int64[torch.Tensor, "*shape"]) -> Float[torch.Tensor, "*shape width"]:
        """Vectors of tokens. `base` is called for all of them, so that whatever the family does to its
        embeddings (Gemma scales them) is done to both kinds."""
        tokens = self.tokens
        place = torch.searchsorted(tokens, ids).clamp(max=len(tokens) - 1)
        is_new = tokens[place] == ids
        old, new = self.base(ids), self.new(place)
        return torch.where(is_new[..., None], new.to(old.dtype), old)


@final
class GrownHead(nn.Module):
    """A frozen head without a bias, and rows of their own for some tokens; else as `GrownEmbedding`."""

    tokens: torch.Tensor

    def __init__(self, base: nn.Linear, tokens: Sequence[int], rows: nn.Parameter) -> None:
        super().__init__()
        self.base = base
        self.new = nn.Linear(1, 1, bias=False)
        self.new.weight = rows
        self.new.in_features, self.new.out_features = base.in_features, len(tokens)
        self.register_buffer("tokens", torch.tensor(tokens, device=rows.device), persistent=False)

    def merged_weight(self) -> Float[torch.Tensor, "vocabulary width"]:
        """The whole matrix, through which gradients reach the new rows."""
        weight, tokens = self.base.weight, self.tokens
        return weight.index_copy(0, tokens, self.new.weight.to(weight.dtype))

    def forward(self, hidden: Float[torch.Tensor, "*shape width"]) -> torch.Tensor:
        """Logits. Each part is called as a module of its own: so ZeRO-3 gathers it."""
        logits = self.base(hidden)
        new = self.new(hidden.to(self.new.weight.dtype)).to(logits.dtype)
        return logits.index_copy(-1, self.tokens, new)


def _lookalike(base: nn.Embedding, rows: nn.Parameter) -> nn.Embedding:
    """An embedding of the same class and settings with other rows."""
    other = copy.copy(base)
    other._parameters = {"weight": rows}
    other._buffers = dict(base._buffers)
    other._forward_hooks = type(base._forward_hooks)()
    other._forward_pre_hooks = type(base._forward_pre_hooks)()
    return other
