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
    """L2 norm over all gradients together, in fp32."""
    gradients = [p.grad.float() for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients, norm_type=2.0)


def clip_gradients(parameters: Sequence[nn.Parameter], norm: float, max_norm: float | None) -> None:
    """Scale all gradients so that their global norm is at most `max_norm`; None does nothing."""
    if max_norm is None or norm <= max_norm:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))


def finite_on_all_ranks(norm: float, device: torch.device, ranks: Ranks) -> bool:
    """True if every rank's norm is finite: one rank's NaN stops the step on all of them."""
    bad = torch.tensor(0.0 if torch.isfinite(torch.tensor(norm)) else 1.0, device=device)
    return sum_over_ranks(bad, ranks).item() == 0.0
