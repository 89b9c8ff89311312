"""FlashAttention over many sequences (`varlen_attn`) by its formula, for machines without a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.varlen import _varlen_attn, _varlen_attn_backward


def stand_in_for_flash_attention() -> None:
    """Let `varlen_attn` run on a CPU: layouts, boundaries, groups of heads, windows, and how the compiler
    sees the call are those of a GPU."""
    _varlen_attn.register_kernel("cpu")(_attend)
    _varlen_attn_backward.register_kernel("cpu")(_attend_backward)


def _attend(q: Any, k: Any, v: Any, bounds: Any, key_bounds: Any, longest: int, *others: Any) -> Any:
    _, _, scale, window, *_ = others  # after the longest of the keys and a flag
    assert bounds.dtype == key_bounds.dtype == torch.int32
    assert all(x.stride(-1) == 1 and x.shape[-1] == q.shape[-1] for x in (q, k, v))
    assert int((bounds[1:] - bounds[:-1]).max()) <= longest
    out = torch.empty_like(q)
    for ours, theirs in _spans(bounds, key_bounds):
        key, value = _repeated(q, k[theirs]), _repeated(q, v[theirs])
        out[ours] = torch.einsum("hqk,khw->qhw", _shares(q[ours], key, scale, window), value).to(q.dtype)
    normalizers = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return out, normalizers, torch.zeros(2, dtype=torch.int64).view(torch.uint64)


def _attend_backward(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *others: Any) -> Any:
    bounds, key_bounds, *_, scale, window = others
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    for ours, theirs in _spans(bounds, key_bounds):
        key, value, query = _repeated(q, k[theirs]), _repeated(q, v[theirs]), q[ours].float()
        shares, g = _shares(query, key, scale, window), grad[ours].float()
        of_shares = torch.einsum("qhw,khw->hqk", g, value)
        of_scores = shares * (of_shares - (of_shares * shares).sum(-1, keepdim=True)) * scale
        dq[ours] = torch.einsum("hqk,khw->qhw", of_scores, key).to(q.dtype)
        groups = (len(key), k.shape[1], -1, q.shape[2])
        dk[theirs] = torch.einsum("hqk,qhw->khw", of_scores, query).reshape(groups).sum(2).to(k.dtype)
        dv[theirs] = torch.einsum("hqk,qhw->khw", shares, g).reshape(groups).sum(2).to(v.dtype)
    return dq, dk, dv


def _spans(bounds: Any, key_bounds: Any) -> list[tuple[slice, slice]]:
    ours, theirs = bounds.tolist(), key_bounds.tolist()
    return [(slice(*ours[i : i + 2]), slice(*theirs[i : i + 2])) for i in range(len(ours) - 1)]


def _repeated(q: Any, x: Any) -> Any:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1).float()


def _shares(q: Any, key: Any, scale: float, window: Any) -> Any:
    scores = torch.einsum("qhw,khw->hqk", q.float(), key) * scale
    behind = torch.arange(len(key) - len(q), len(key))[:, None] - torch.arange(len(key))
    seen = (behind >= 0) & ((behind <= window[0]) if window[0] >= 0 else True)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1)
