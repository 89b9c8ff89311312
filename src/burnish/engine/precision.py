"""16 bits: what a forward in plain torch runs under, and the loss scale that fp16 needs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import nn

from burnish.engine.ds_config import FIRST_LOSS_SCALE_POWER

GROWTH_STEPS = 1000
"""Steps in a row without an overflow after which the scale is doubled."""


def autocast(device: torch.device, compute_dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """What a forward of fp32 weights is run under; nothing for fp32."""
    if compute_dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=compute_dtype)


def compiles_products(device: torch.device, compute_dtype: torch.dtype) -> bool:
    """Whether products are compiled for each size (`model/device_batch.py`): in 16 bits on a CPU."""
    return device.type == "cpu" and compute_dtype != torch.float32


@final
class LossScale:
    """fp16's dynamic loss scale (Micikevicius et al., 2018, section 3.2), the same on every rank and engine.

    Ours and not torch's or DeepSpeed's, because a step that overflows is computed again: a scale has to
    know what an attempt is, and those two disagree on when it may grow and what a checkpoint holds.

    Args:
        enabled: For fp16; else it is 1 and stays so.
    """

    def __init__(self, enabled: bool) -> None:
        self.value = 2.0**FIRST_LOSS_SCALE_POWER if enabled else 1.0
        self._enabled = enabled
        self._good_steps = 0
        self._at_first_attempt = self.value

    def update(self, applied: bool) -> bool:
        """Take note of an attempt at a step, once its gradients are done with.

        Args:
            applied: Whether they were finite, and applied.

        Returns:
            Whether the same step may succeed now: gradients were not finite, and the scale has been halved.
            At 1 no scale helps. The step is given up, and the next one begins at half the scale that this
            one began with: one bad window does not cost small gradients their bits for thousands of steps.
        """
        if not self._enabled:
            return False
        if applied:
            self._good_steps += 1
            if self._good_steps % GROWTH_STEPS == 0:
                self.value *= 2
            self._at_first_attempt = self.value
            return False
        self._good_steps = 0
        if self.value > 1:
            self.value = max(1.0, self.value / 2)
            return True
        self.value = self._at_first_attempt = max(1.0, self._at_first_attempt / 2)
        return False

    def unscale(self, parameters: Sequence[nn.Parameter]) -> None:
        """Divide gradients by the scale, in place."""
        if self.value == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(1 / self.value)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it; nothing where it is not used."""
        return {"scale": self.value, "good_steps": self._good_steps} if self._enabled else {}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; one of another dtype has nothing to go on from."""
        if self._enabled and "scale" in saved:
            self.value = self._at_first_attempt = float(saved["scale"])
            self._good_steps = int(saved.get("good_steps", 0))
