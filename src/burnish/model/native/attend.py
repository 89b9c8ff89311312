"""Attention inside documents by our kernel: `attention.c` on torch's tensors."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import BFloat16, Float, Int32

from burnish.model.native.build import kernels

# What torch would read from annotations, but not from those that name shapes.
_PATHS = "Tensor key_bounds, Tensor columns, Tensor query_lengths, bool shared, float scale, int? window"
_FORWARD = f"(Tensor query, Tensor key, Tensor value, {_PATHS}) -> (Tensor, Tensor)"
_BACKWARD = (
    "(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    f"{_PATHS}) -> (Tensor, Tensor, Tensor)"
)
_WIDEST = 256
_LONGEST = 32768
"""A thread lays out a document's keys, values and queries of one head: 90 MiB at this length, 128 wide."""
_LANES = 16


@dataclass(frozen=True)
class Paths:
    """Segments and what their queries see: documents, each by itself; or, where beginnings are shared, what
    documents have of their own, with all that leads to it."""

    key_bounds: Int32[torch.Tensor, " bounds"]
    """Where each segment's keys begin in `columns`, and where the last one's end."""
    columns: Int32[torch.Tensor, " keys"]
    """Columns of the row that a segment's queries see, in the order of their positions."""
    query_lengths: Int32[torch.Tensor, " segments"]
    """How many of a segment's last keys are its queries."""
    shared: bool = False
    """Whether a column is a key of several segments."""

    @staticmethod
    def of_documents(bounds: Int32[torch.Tensor, " bounds"], tokens: int) -> Paths:
        """Documents end to end in a row of `tokens`: `[0, ..., tokens]`."""
        return Paths(bounds.contiguous(), torch.arange(tokens, dtype=torch.int32), bounds.diff())


class _States(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), ("head", ctypes.c_int64), ("token", ctypes.c_int64))


class _Attention(ctypes.Structure):
    """`Attention` in attention.c."""

    _fields_ = (
        *((name, _States) for name in ("query", "key", "value", "out", "out_gradient")),
        *((name, ctypes.c_int64) for name in ("tokens", "heads", "key_heads", "width", "num_segments")),
        *((name, ctypes.c_void_p) for name in ("key_bounds", "columns", "query_lengths")),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("shared", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("result", "lse", "key_gradient", "value_gradient")),
        *((name, ctypes.c_void_p) for name in ("key_sums", "value_sums")),
    )


def dtype_of_products(query: torch.Tensor) -> torch.dtype:
    """What these queries are computed in on a CPU: autocast's dtype inside autocast, else their own."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype


def can_attend(query: torch.Tensor, value: torch.Tensor, longest: int) -> bool:
    """Whether the kernel is there, and is for such heads and documents: in bf16, the heads' width a multiple
    of 16, documents not so long that each thread would lay out gigabytes."""
    width = query.shape[-1]
    known = width == value.shape[-1] and width % _LANES == 0 and width <= _WIDEST
    known = known and longest <= _LONGEST
    bf16 = query.device.type == "cpu" and dtype_of_products(query) == torch.bfloat16
    return known and bf16 and _kernels_are_there()


@torch.compiler.assume_constant_result
def _kernels_are_there() -> bool:
    return kernels() is not None


def attend(
    query: Float[torch.Tensor, "1 heads tokens width"],
    key: Float[torch.Tensor, "1 key_heads tokens width"],
    value: Float[torch.Tensor, "1 key_heads tokens width"],
    paths: Paths,
    scale: float,
    window: int | None,
) -> BFloat16[torch.Tensor, "1 tokens heads width"]:
    """Causal attention inside segments.

    Args:
        query: Queries; `can_attend` has been asked.
        key: Keys; fewer heads than the queries for grouped-query attention.
        value: Values.
        paths: Who sees whom.
        scale: Factor on the scores before the softmax, positive.
        window: How many tokens a token sees, itself included; None for all before it.

    Returns:
        The output, heads behind tokens.

    Raises:
        MemoryError: There is none left.
    """
    q, k, v = (x.to(torch.bfloat16) for x in (query, key, value))
    numbers = paths.key_bounds, paths.columns, paths.query_lengths, paths.shared
    out, _ = _attention(q, k, v, *numbers, scale, window)
    return out


@torch.library.custom_op("burnish::attention", mutates_args=(), schema=_FORWARD)
def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_bounds: torch.Tensor,
    columns: torch.Tensor,
    query_lengths: torch.Tensor,
    shared: bool,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, `[1, tokens, heads, width]`, and the log-sum-exp of the scores, `[heads, tokens]`.

    An operation of torch's, so that `activation_checkpointing: light` sees it and keeps what it gives, and a
    compiled layer calls it without being cut in two.
    """
    out, lse = _like_results(query)
    paths = Paths(key_bounds, columns, query_lengths, shared)
    kept, job = _job(query, key, value, paths, scale, window)
    job.result, job.lse = out.data_ptr(), lse.data_ptr()
    _run("burnish_attention_forward", job)
    del kept
    return out, lse


def _like_results(query: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    heads, tokens, width = query.shape[1:]
    return query.new_empty(1, tokens, heads, width), query.new_empty(heads, tokens, dtype=torch.float32)


@torch.library.custom_op("burnish::attention_backward", mutates_args=(), schema=_BACKWARD)
def _attention_backward(  # noqa: PLR0913, PLR0917 (an operation of torch takes tensors and numbers, no records)
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    key_bounds: torch.Tensor,
    columns: torch.Tensor,
    query_lengths: torch.Tensor,
    shared: bool,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, in their shapes; heads behind tokens in memory."""
    d_query, d_key, d_value = gradients = _like_gradients(gradient, query, key, value)
    paths = Paths(key_bounds, columns, query_lengths, shared)
    kept, job = _job(query, key, value, paths, scale, window)
    outs, out_gradients = _rows(out.transpose(1, 2)), _rows(gradient.transpose(1, 2))
    job.out, job.out_gradient = _states(outs), _states(out_gradients)
    job.result, job.lse = d_query.data_ptr(), lse.data_ptr()
    if shared:
        sums = [torch.zeros(x.transpose(1, 2).shape, dtype=torch.float32) for x in (key, value)]
        job.key_sums, job.value_sums = (x.data_ptr() for x in sums)
        _run("burnish_attention_backward", job)
        d_key.copy_(sums[0].transpose(1, 2))
        d_value.copy_(sums[1].transpose(1, 2))
    else:
        job.key_gradient, job.value_gradient = d_key.data_ptr(), d_value.data_ptr()
        _run("burnish_attention_backward", job)
    del kept
    return gradients


def _like_gradients(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    del gradient
    q, k, v = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (query, key, value))
    return q, k, v


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.shared, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, gradient: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    query, key, value, *numbers, out, lse = ctx.saved_tensors
    rest = ctx.shared, ctx.scale, ctx.window
    found = _attention_backward(gradient, query, key, value, out, lse, *numbers, *rest)
    return (*found, *(None for _ in range(6)))


_attention.register_fake(_like_results)
_attention.register_autograd(_gradients, setup_context=_keep)
_attention_backward.register_fake(_like_gradients)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """With each row's numbers side by side, as the kernel reads them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _states(x: torch.Tensor) -> _States:
    return _States(x.data_ptr(), x.stride(1), x.stride(2))


def _job(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    paths: Paths,
    scale: float,
    window: int | None,
) -> tuple[Any, _Attention]:
    """What both directions say; and the tensors that are pointed into, to be kept until the call is over."""
    rows = [_rows(x) for x in (query, key, value)]
    numbers = [x.contiguous() for x in (paths.key_bounds, paths.columns, paths.query_lengths)]
    job = _Attention(*(_states(x) for x in rows))
    _, job.heads, job.tokens, job.width = query.shape
    job.key_heads, job.num_segments = key.shape[1], len(paths.query_lengths)
    job.key_bounds, job.columns, job.query_lengths = (x.data_ptr() for x in numbers)
    job.window, job.scale, job.shared = window or 0, scale, paths.shared
    return (rows, numbers), job


def _run(name: str, job: _Attention) -> None:
    library = kernels()
    assert library is not None  # `can_attend` has been asked
    if library[name](ctypes.byref(job)) != 0:
        raise MemoryError("no memory left for attention")
