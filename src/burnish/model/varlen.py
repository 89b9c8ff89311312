"""FlashAttention over sequences of many lengths in one call, inside PyTorch; CUDA only.

`torch.nn.attention.varlen` came with PyTorch 2.10 and is still changing: what is asked of it is here, and
nowhere else.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Float, Int32
from torch.nn.attention.varlen import varlen_attn

# Asked once, and not in a function: the compiler reads what uses it.
_PARAMETERS = frozenset(inspect.signature(varlen_attn).parameters)
_DTYPES = (torch.bfloat16, torch.float16)
_MAX_HEAD_WIDTH = 256


def varlen_dtype(query: torch.Tensor) -> torch.dtype:
    """What these queries are computed in on CUDA: autocast's dtype inside autocast, else their own."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype


def fits_varlen(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the kernel takes queries of this dtype and width (the last axis, a multiple of 8) and values
    that are not wider, this PyTorch can tell it a scale and a window (2.11 and later), and the GPU has it."""
    width = query.shape[-1]
    is_told = {"scale", "window_size"} <= _PARAMETERS
    fits = value.shape[-1] <= width <= _MAX_HEAD_WIDTH and width % 8 == 0
    return is_told and fits and varlen_dtype(query) in _DTYPES and _gpu_has_flash_attention()


@torch.compiler.assume_constant_result
def _gpu_has_flash_attention() -> bool:
    """Nvidia's GPUs since Ampere have it; AMD's of today count from 9."""
    return torch.cuda.get_device_capability() >= (8, 0)


def varlen(
    query: Float[torch.Tensor, "tokens heads width"],
    key: Float[torch.Tensor, "keys key_heads width"],
    value: Float[torch.Tensor, "keys key_heads width"],
    bounds: Int32[torch.Tensor, " bounds"],
    key_bounds: Int32[torch.Tensor, " bounds"],
    longest: int,
    scale: float,
    window: int | None,
) -> Float[torch.Tensor, "1 tokens heads width"]:
    """Causal attention of each sequence to its own keys, aligned to the last of both.

    Args:
        query: Of all sequences, end to end.
        key: Of all sequences, end to end; as many heads as queries have, or fewer.
        value: As `key`.
        bounds: Where the queries of each sequence begin, and where the last end.
        key_bounds: The same of keys.
        longest: Most queries or keys of a sequence.
        scale: Of the scores.
        window: How many tokens each one sees, itself included; None is all before it.
    """
    # Without being told, 2.11 takes fewer key heads than heads; later versions want it said.
    grouped = {"enable_gqa": query.shape[1] != key.shape[1]} if "enable_gqa" in _PARAMETERS else {}
    # The kernel's window counts the tokens before the token itself.
    before = -1 if window is None else window - 1
    call: Any = varlen_attn
    sizes = (bounds, key_bounds, longest, longest)
    out = call(query, key, value, *sizes, scale=scale, window_size=(before, 0), **grouped)
    assert isinstance(out, torch.Tensor)  # a tuple only where auxiliary results are asked for
    return out[None]
