"""16 bits in plain torch: what the forward runs under, and the loss scale that fp16 needs."""

from __future__ import annotations

import contextlib

import torch

from burnish.engine.ds_config import FIRST_LOSS_SCALE_POWER


def autocast(device: torch.device, compute_dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """What a forward of fp32 weights is run under; nothing for fp32."""
    if compute_dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=compute_dtype)


def loss_scaler(device: torch.device, compute_dtype: torch.dtype) -> torch.amp.GradScaler:
    """The dynamic loss scale of fp16. For other dtypes it is disabled: it multiplies by nothing and skips
    nothing, so there is one path for all of them."""
    first = 2.0**FIRST_LOSS_SCALE_POWER
    return torch.amp.GradScaler(device.type, init_scale=first, enabled=compute_dtype == torch.float16)


def update_scale(scaler: torch.amp.GradScaler, applied: bool) -> bool:
    """Tell a scaler that its gradients are done with.

    Args:
        scaler: Its gradients have been unscaled.
        applied: Whether they were finite, and applied.

    Returns:
        Whether the same step may succeed with the scale that there is now: gradients were not finite, and
        the loss is still multiplied by something.
    """
    scaler.update()
    # Reads the scale back from the device, after an overflow only.
    return not applied and scaler.is_enabled() and scaler.get_scale() >= 1.0
