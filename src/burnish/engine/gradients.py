"""Gradients across ranks: summed in buckets, measured, clipped. Plain torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import nn

from burnish.runtime import Ranks, sum_over_ranks

ALONE_BYTES = 2**20
"""From this size on a gradient is summed where it stands: latency does not count any more, and copies into a
bucket and back would."""
BUCKET_BYTES = 64 * 2**20
"""The others travel in flat buckets of at most this size."""
ROW_NUMBERS = 4096
"""How much of a gradient is squared and summed in fp32 at once: 1e-7 of the sum at most is lost."""


_CLIP_EPS = 1e-6
"""What torch adds to the norm before it divides by it."""


def drop_gradients(loss: Float[torch.Tensor, ""], model: nn.Module) -> None:
    """A backward of which nothing is kept, and which no hook of a parameter learns of."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.autograd.grad(loss, trained, allow_unused=True)


def sum_gradients(parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Replace every gradient by its sum over all ranks.

    A parameter without a gradient on this rank counts as zeros, because another rank may have
    one. Buckets follow the order of `parameters`, which is the same on every rank.
    """
    if ranks.world_size == 1:
        return
    small: list[nn.Parameter] = []
    for parameter in parameters:
        # A sum over ranks wants one run of memory; gradients are laid out as their parameters are.
        if _num_bytes(parameter) < ALONE_BYTES or not parameter.is_contiguous():
            small.append(parameter)
        else:
            sum_over_ranks(_gradient(parameter), ranks)
    for bucket in _buckets(small):
        gradients = [_gradient(p) for p in bucket]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        sum_over_ranks(flat, ranks)
        offset = 0
        for gradient in gradients:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()


def _num_bytes(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size()


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """Consecutive parameters of one dtype, at most BUCKET_BYTES together (or one larger one)."""
    bucket: list[nn.Parameter] = []
    num_bytes = 0
    for parameter in parameters:
        size = _num_bytes(parameter)
        if bucket and (num_bytes + size > BUCKET_BYTES or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, num_bytes = [], 0
        bucket.append(parameter)
        num_bytes += size
    if bucket:
        yield bucket


def global_grad_norm(parameters: Sequence[nn.Parameter]) -> Float[torch.Tensor, ""]:
    """L2 norm over all gradients together, given in fp32.

    torch adds up a norm in the tensor's own dtype; on a CPU that loses 1e-4 of the norm of an embedding
    of two million weights, and another cut of the tensor (ZeRO's) loses another part. So rows of a few
    thousand numbers are summed in fp32 and the rows' norms in fp64: as exact as all in fp64, without
    turning every gradient into fp64, which costs 2 % of a step on a CPU.
    """
    norms = [row_norms(p.grad) for p in parameters if p.grad is not None]
    if not norms:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.cat(norms), dtype=torch.float64).float()


def row_norms(gradient: torch.Tensor) -> Float[torch.Tensor, " rows"]:
    """Norms of a gradient cut into rows short enough to be summed in fp32; their norm is the gradient's."""
    flat = gradient.detach().reshape(-1)
    wide = torch.promote_types(flat.dtype, torch.float32)
    whole = flat.numel() // ROW_NUMBERS * ROW_NUMBERS
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, ROW_NUMBERS), dim=1, dtype=wide)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=wide)
    return torch.cat([rows, rest[None]])


def clip_gradients(
    parameters: Sequence[nn.Parameter], norm: Float[torch.Tensor, ""], max_norm: float | None
) -> None:
    """Scale all gradients so that their global norm is at most `max_norm`; None does nothing.

    Reads the norm on the host: the caller has waited for it already (`finite_on_all_ranks`).
    """
    # torch multiplies by 1 where nothing is to be clipped: a pass over all gradients for nothing.
    if max_norm is not None and norm.item() + _CLIP_EPS > max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


def finite_on_all_ranks(norm: Float[torch.Tensor, ""], ranks: Ranks) -> bool:
    """True if every rank's norm is finite: one rank's NaN stops the step on all of them."""
    num_bad = (~torch.isfinite(norm)).float()
    return sum_over_ranks(num_bad, ranks).item() == 0.0
