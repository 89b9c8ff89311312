"""Examples as windows see them: numbers and no tokens, made by the tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Counts:
    """An `ExampleCounts` of plain arrays."""

    num_tokens: np.ndarray
    total_weight: np.ndarray
    num_supervised: np.ndarray
    source_ids: np.ndarray
    source_names: tuple[str, ...]
