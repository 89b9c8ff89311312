"""Attention over a row in which documents share their beginnings.

The row is a tree of segments, depth first (`data/prefix_tree.py` has the picture): a token sees every
segment above its own, whole, and its own up to itself. So of two documents that begin alike each sees
exactly the tokens it would see alone, and positions go on where the segment above ends.

On a CPU in bf16 our own kernel does it in one go (`paths_of`). Else a segment takes two calls of aten's flash
kernel: causal among its own tokens, and whole
with the queries of all tokens below it, which are neighbours in the row. Parts of a softmax over disjoint
keys are merged by their normalizers, and the kernel's backward, given the merged output and
normalizer, gives each part's share of the gradient: the shares are `exp(score - normalizer)`.

Source: the merging is that of FlashAttention (Dao et al., 2022, section 3.1); sharing prefixes in one
row for inference is Hydragen's idea (Juravsky et al., 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch.autograd.function import FunctionCtx, once_differentiable

from burnish.model.native import attend as native
from burnish.model.varlen import varlen

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

PrefixMask = Int32[torch.Tensor, "1 segments_plus_1 longest numbers"]
"""See `prefix_numbers`. A document mask has 1 in the second place; this one always has more."""


@final
@dataclass(frozen=True)
class Segments:
    """Where the segments of a row are, on the host."""

    begins: tuple[int, ...]
    stops: tuple[int, ...]
    """Behind the segment's own last token."""
    ends: tuple[int, ...]
    """Behind the last token of the segments below it."""

    def keys(self, segment: int) -> list[tuple[int, int]]:
        """Columns that the segment's tokens may see: runs from the root down to itself."""
        begin = self.begins[segment]
        above = [i for i in range(segment) if self.begins[i] < begin < self.ends[i]]
        return [(self.begins[i], self.stops[i]) for i in (*above, segment)]


def prefix_numbers(segments: Int32[np.ndarray, "3 segments"]) -> Int32[np.ndarray, " numbers"]:
    """What attention needs to know of a row's segments, in one array.

    The segments' begins, stops and ends; then where the keys of each segment begin in a list of
    columns, and where the last ones end; then that list, which a kernel on the device gathers by.
    """
    table = Segments(*(tuple(row) for row in segments.tolist()))
    runs = [table.keys(i) for i in range(len(table.begins))]
    counts = [sum(b - a for a, b in run) for run in runs]
    columns = [np.arange(a, b) for run in runs for a, b in run]
    parts = [segments.reshape(-1), [0], np.cumsum(counts), *columns]
    return np.concatenate(parts).astype(np.int32)


def prefix_mask(numbers: Int32[torch.Tensor, " numbers"], num_segments: int, longest: int) -> PrefixMask:
    """`prefix_numbers` in the shape of an attention mask, for `document_attention`.

    Args:
        numbers: On the model's device.
        num_segments: Travels as a size, as `longest` does, so that the host need not ask the device.
        longest: Tokens of the longest document.
    """
    return numbers.view(1, 1, 1, -1).expand(1, num_segments + 1, longest, -1)


def is_prefix_mask(mask: torch.Tensor | None) -> bool:
    """Whether an attention mask carries segments."""
    return mask is not None and mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[1] > 1


def segments_of(mask: PrefixMask) -> Segments:
    """The segments that a mask carries. On CUDA the host waits for the device here."""
    num = mask.shape[1] - 1
    numbers = mask[0, 0, 0, : 3 * num].tolist()
    return Segments(*(tuple(numbers[i * num : (i + 1) * num]) for i in range(3)))


def paths_of(mask: PrefixMask) -> native.Paths:
    """The same as the kernel for bf16 on CPUs takes them: each segment with the columns of all above it."""
    num, numbers = mask.shape[1] - 1, mask[0, 0, 0]
    lengths = numbers[num : 2 * num] - numbers[:num]
    key_bounds = numbers[3 * num : 4 * num + 1].contiguous()
    return native.Paths(key_bounds, numbers[4 * num + 1 :].contiguous(), lengths, shared=True)


def shared_flash_attention(
    query: Float[torch.Tensor, "1 heads tokens width"],
    key: Float[torch.Tensor, "1 key_heads tokens width"],
    value: Float[torch.Tensor, "1 key_heads tokens width"],
    segments: Segments,
    scale: float,
) -> Float[torch.Tensor, "1 tokens heads width"]:
    """Attention of a row with shared prefixes, on the CPU, in fp32 inside (as for single documents).

    Args:
        query: Queries of the row.
        key: Keys; fewer heads than the queries for grouped-query attention.
        value: Values.
        segments: The row's.
        scale: Factor on the scores before the softmax.

    Returns:
        The attention's output in the dtype of `query`, heads behind tokens.
    """
    return _SharedFlash.apply(query, key, value, segments, scale)


class _SharedFlash(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: Segments,
        scale: float,
    ) -> torch.Tensor:
        work = torch.promote_types(query.dtype, torch.float32)  # fp64 stays, to tell rounding from error
        q, k, v = query.to(work), key.to(work), value.to(work)
        _, heads, tokens, width = q.shape
        out = q.new_empty(1, tokens, heads, width)
        normalizers = q.new_empty(1, heads, tokens)
        # Each segment among its own tokens first; then what those below it see of it is merged in.
        for begin, stop in zip(segments.begins, segments.stops, strict=True):
            own = slice(begin, stop)
            part, normalizer = _forward(q[:, :, own], k[:, :, own], v[:, :, own], 0.0, True, scale=scale)
            out[:, own] = part.transpose(1, 2)
            normalizers[:, :, own] = normalizer
        for begin, stop, end in zip(segments.begins, segments.stops, segments.ends, strict=True):
            if stop == end:
                continue
            own, below = slice(begin, stop), slice(stop, end)
            part, normalizer = _forward(q[:, :, below], k[:, :, own], v[:, :, own], 0.0, False, scale=scale)
            _merge(out[:, below], normalizers[:, :, below], part.transpose(1, 2), normalizer)
        ctx.save_for_backward(query, key, value, out, normalizers)
        ctx.segments, ctx.scale = segments, scale  # pyright: ignore
        return out.to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, out, normalizers = ctx.saved_tensors  # pyright: ignore
        segments, scale = ctx.segments, ctx.scale  # pyright: ignore
        q, k, v, g = (x.to(out.dtype) for x in (query, key, value, grad))

        def grads(queries: slice, keys: slice, causal: bool) -> Any:
            return _backward(
                g[:, queries].transpose(1, 2),
                q[:, :, queries],
                k[:, :, keys],
                v[:, :, keys],
                out[:, queries].transpose(1, 2),
                normalizers[:, :, queries],
                0.0,
                causal,
                scale=scale,
            )

        # Not yet in the inputs' dtype: a prefix gathers the gradients of all documents below it.
        dq, dk, dv = (torch.empty_like(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v))
        for begin, stop in zip(segments.begins, segments.stops, strict=True):
            own = slice(begin, stop)
            for whole, piece in zip((dq, dk, dv), grads(own, own, True), strict=True):
                whole[:, :, own] = piece
        for begin, stop, end in zip(segments.begins, segments.stops, segments.ends, strict=True):
            if stop == end:
                continue
            own, below = slice(begin, stop), slice(stop, end)
            for whole, piece, where in zip(
                (dq, dk, dv), grads(below, own, False), (below, own, own), strict=True
            ):
                whole[:, :, where] += piece
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), None, None


def _merge(
    out: torch.Tensor, normalizers: torch.Tensor, part: torch.Tensor, part_normalizers: torch.Tensor
) -> None:
    """Add a softmax over other keys to one over some keys, in place.

    Args:
        out: `[1, tokens, heads, width]`, changed.
        normalizers: Its log-sum-exp of scores, `[1, heads, tokens]`, changed.
        part: As `out`, over the other keys.
        part_normalizers: As `normalizers`.
    """
    # out * (1 - share) + part * share, where share = exp(b) / (exp(a) + exp(b)).
    share = torch.sigmoid(part_normalizers - normalizers).transpose(1, 2)[..., None]
    out.lerp_(part, share)
    normalizers.copy_(torch.logaddexp(normalizers, part_normalizers))


def shared_varlen_attention(
    query: Float[torch.Tensor, "tokens heads width"],
    key: Float[torch.Tensor, "tokens key_heads width"],
    value: Float[torch.Tensor, "tokens key_heads width"],
    mask: PrefixMask,
    scale: float,
    window: int | None,
) -> Float[torch.Tensor, "1 tokens heads width"]:
    """The same on CUDA, by FlashAttention inside PyTorch, in one call.

    A segment is a sequence whose keys are those of all segments above it and its own, gathered; with more
    keys than queries FlashAttention's causal mask is aligned to the last of both, which is what is
    wanted. Keys of a prefix are copied once per segment below it: memory traffic, but no computation.

    Not yet run on a GPU by anyone who wrote it; `data.share_prefix: auto` leaves it alone.
    """
    num, longest = mask.shape[1] - 1, mask.shape[2]
    numbers = mask[0, 0, 0]
    # Segments lie end to end: each begins where the one before stops.
    bounds = torch.cat([numbers[:1], numbers[num : 2 * num]])
    key_bounds = numbers[3 * num : 4 * num + 1].contiguous()
    columns = numbers[4 * num + 1 :].long()
    key, value = _gather(key, columns), _gather(value, columns)
    return varlen(query, key, value, bounds, key_bounds, longest, scale, window)


def _gather(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    gathered: Any = _Gather.apply(x, columns)
    return gathered


class _Gather(torch.autograd.Function):
    """`x[columns]`, whose backward sums in fp32: a prefix may have hundreds of documents below it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(columns)
        ctx.num_tokens = x.shape[0]
        return x.index_select(0, columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (columns,) = ctx.saved_tensors
        total = grad.new_zeros(ctx.num_tokens, *grad.shape[1:], dtype=torch.float32)
        return total.index_add_(0, columns, grad.float()).to(grad.dtype), None
