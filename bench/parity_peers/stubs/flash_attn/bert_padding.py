"""Padded rows to tokens end to end and back, in plain torch, with flash-attn 2.8's shapes and meaning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange

__all__ = ["index_first_axis", "pad_input", "rearrange", "unpad_input"]


def unpad_input(
    hidden: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """Leave the padding out.

    Args:
        hidden: rows x columns x anything.
        mask: rows x columns; not 0 where there is a token.

    Returns:
        tokens x anything; each token's position in `rows * columns`; where each row's tokens start and the
        last ones end; tokens of the longest row; tokens of each row.
    """
    lengths = mask.sum(dim=-1, dtype=torch.int32)
    indices = torch.nonzero(mask.flatten(), as_tuple=False).flatten()
    starts = F.pad(torch.cumsum(lengths, dim=0, dtype=torch.int32), (1, 0))
    return index_first_axis(hidden.flatten(0, 1), indices), indices, starts, int(lengths.max()), lengths


def index_first_axis(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The entries at `indices` of the first axis; differentiable."""
    return values[indices]


def pad_input(hidden: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """Put tokens (tokens x anything) back at their places in rows of `seqlen` columns, 0 elsewhere."""
    padded = hidden.new_zeros(batch * seqlen, *hidden.shape[1:])
    return padded.index_put((indices,), hidden).unflatten(0, (batch, seqlen))
