"""Sizes that rows are filled up to on a CPU, so that compiled products are met again: see
`model/device_batch.py`."""

from __future__ import annotations

_STEPS_A_DOUBLING = 8
_LEAST_STEP = 32
"""Rows of a product in oneDNN's innermost loops."""


def size_met_again(size: int) -> int:
    """The next of few sizes: eight between a number and its double, an eighth apart at most, so that a
    sixteenth is filled up in the mean."""
    step = max(_LEAST_STEP, 2 ** max(0, size.bit_length() - 1) // _STEPS_A_DOUBLING)
    return -(-size // step) * step
