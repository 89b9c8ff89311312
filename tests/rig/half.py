"""fp16 on a machine without a GPU: slow there, and the same arithmetic of loss scales."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from burnish.engine import ds_config, precision


@contextmanager
def restless_scale(power: int) -> Iterator[None]:
    """While entered, loss scales begin at this power of two, and are doubled after every step."""
    with (
        mock.patch.object(ds_config, "FIRST_LOSS_SCALE_POWER", power),
        mock.patch.object(precision, "FIRST_LOSS_SCALE_POWER", power),
        mock.patch.object(precision, "GROWTH_STEPS", 1),
    ):
        yield


@contextmanager
def deepspeed_accepts_fp16() -> Iterator[None]:
    """While entered, DeepSpeed does not turn fp16 down for want of fast kernels: torch has slow ones."""
    from deepspeed.accelerator import get_accelerator

    with mock.patch.object(type(get_accelerator()), "is_fp16_supported", return_value=True):
        yield
