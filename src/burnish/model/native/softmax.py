"""The softmax of the head by our kernel: `softmax.c` on torch's tensors."""

from __future__ import annotations

import ctypes

import torch
from jaxtyping import BFloat16, Float32, Int64

from burnish.model.native.build import kernels


def can_softmax(states: torch.Tensor) -> bool:
    """Whether the kernel is there, and takes logits of such hidden states."""
    return states.dtype == torch.bfloat16 and states.device.type == "cpu" and kernels() is not None


def head_product(
    states: BFloat16[torch.Tensor, "tokens width"], weight: BFloat16[torch.Tensor, "vocabulary width"]
) -> BFloat16[torch.Tensor, "tokens vocabulary"]:
    """`states @ weight.T`, laid out in memory as this machine's products are fastest, this one and those
    with its gradient: with AMX vocabulary first, 0.6 of the time; else tokens first."""
    return (weight @ states.T).T if torch.cpu._is_amx_tile_supported() else states @ weight.T


def softmax(
    logits: BFloat16[torch.Tensor, "tokens vocabulary"],
    targets: Int64[torch.Tensor, " tokens"],
    nll: Float32[torch.Tensor, " tokens"],
    gradient: bool,
) -> None:
    """Fill `nll` with each token's negative log-likelihood of its target, worked out in fp32.

    Args:
        logits: In either layout. With `gradient`, replaced by the derivative of `nll` by them,
            `softmax - one_hot(target)`.
        targets: What is to be produced at each token.
        nll: Where the results go.
        gradient: Whether the derivative is wanted.

    Raises:
        MemoryError: There is none left.
    """
    library = kernels()
    assert library is not None  # `can_softmax` has been asked
    by_tokens = logits.stride(1) == 1
    outer = logits if by_tokens else logits.T
    assert outer.stride(1) == 1 and targets.is_contiguous() and nll.is_contiguous()
    at_logits, at_targets, at_nll = (ctypes.c_void_p(x.data_ptr()) for x in (logits, targets, nll))
    sizes = (ctypes.c_int64(x) for x in (outer.shape[0], outer.stride(0), outer.shape[1]))
    kernel = library.burnish_softmax_rows if by_tokens else library.burnish_softmax_columns
    if kernel(at_logits, *sizes, at_targets, at_nll, int(gradient)) != 0:
        raise MemoryError("no memory left for the softmax")
