"""The softmax of the head by our kernel: `softmax.c` on torch's tensors."""

from __future__ import annotations

import ctypes

import torch
from jaxtyping import BFloat16, Float32, Int64

from burnish.model.native.build import kernels


def can_softmax_rows(logits: torch.Tensor) -> bool:
    """Whether the kernel is there, and takes such logits."""
    return logits.dtype == torch.bfloat16 and logits.device.type == "cpu" and kernels() is not None


def softmax_rows(
    logits: BFloat16[torch.Tensor, "rows vocabulary"],
    targets: Int64[torch.Tensor, " rows"],
    nll: Float32[torch.Tensor, " rows"],
    gradient: bool,
) -> None:
    """Fill `nll` with each row's negative log-likelihood of its target, worked out in fp32.

    Args:
        logits: With `gradient`, replaced by the derivative of `nll` by them, `softmax - one_hot(target)`.
        targets: Token to be produced by each row.
        nll: Where the results go.
        gradient: Whether the derivative is wanted.

    Raises:
        MemoryError: There is none left.
    """
    library = kernels()
    assert library is not None  # `can_softmax_rows` has been asked
    assert logits.stride(1) == 1 and targets.is_contiguous() and nll.is_contiguous()
    rows, size = logits.shape
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (logits, targets, nll))
    at_logits, at_targets, at_nll = pointers
    sizes = (ctypes.c_int64(x) for x in (rows, logits.stride(0), size))
    if library.burnish_softmax_rows(at_logits, *sizes, at_targets, at_nll, int(gradient)) != 0:
        raise MemoryError("no memory left for the softmax")
