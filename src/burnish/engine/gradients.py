"""Gradients across ranks: summed in buckets, measured, clipped. Plain torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import nn

from burnish.runtime import Ranks, sum_over_ranks

BUCKET_BYTES = 64 * 2**20
"""Gradients travel in flat buckets of this size: large enough that latency does not count, small
enough that the copy is not a second set of gradients."""


def sum_gradients(parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Replace every gradient by its sum over all ranks.

    A parameter without a gradient on this rank counts as zeros, because another rank may have
    one. Buckets follow the order of `parameters`, which is the same on every rank.
    """
    if ranks.world_size == 1:
        return
    for bucket in _buckets(parameters):
        gradients = [_gradient(p) for p in bucket]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        sum_over_ranks(flat, ranks)
        offset = 0
        for gradient in gradients:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """Consecutive parameters of one dtype, at most BUCKET_BYTES together (or one larger one)."""
    bucket: list[nn.Parameter] = []
    num_bytes = 0
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        if bucket and (num_bytes + size > BUCKET_BYTES or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, num_bytes = [], 0
        bucket.append(parameter)
        num_bytes += size
    if bucket:
        yield bucket


def global_grad_norm(parameters: Sequence[nn.Parameter]) -> Float[torch.Tensor, ""]:
    """L2 norm over all gradients together, summed in fp64, given in fp32.

    torch adds up a norm in the tensor's own dtype; on a CPU that loses 1e-4 of the norm of an embedding
    of two million weights, and another way of cutting the tensor (ZeRO's) loses another part.
    """
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in parameters if p.grad is not None]
    if not norms:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack(norms)).float()


def clip_gradients(
    parameters: Sequence[nn.Parameter], norm: Float[torch.Tensor, ""], max_norm: float | None
) -> None:
    """Scale all gradients so that their global norm is at most `max_norm`; None does nothing."""
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


def finite_on_all_ranks(norm: Float[torch.Tensor, ""], ranks: Ranks) -> bool:
    """True if every rank's norm is finite: one rank's NaN stops the step on all of them."""
    num_bad = (~torch.isfinite(norm)).float()
    return sum_over_ranks(num_bad, ranks).item() == 0.0
