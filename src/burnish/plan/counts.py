"""What planning counts: the budget of one forward, what a document costs, what the windows hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

DEFAULT_GLOBAL_EXAMPLES = 128
"""Examples per optimizer step when the config names neither examples nor tokens."""
DEFAULT_MICRO_TOKENS = 4096
"""Tokens per forward with `micro_tokens: auto`, unless one example may be longer."""


@dataclass(frozen=True)
class MicroBudget:
    """What one forward on one rank may hold: tokens (padding included), documents, or both."""

    tokens: int | None
    """None is no limit; then `examples` limits."""
    examples: int | None
    """None is no limit."""


@dataclass(frozen=True)
class CostModel:
    """Time of a document of T tokens, up to a factor: `per_token * T + per_token_squared * T^2`.

    The square is the attention inside the document. The default is a transformer of width 4096:
    12 * width^2 weights a layer against `width * T` for causal attention, so 1 / (12 * width).
    """

    per_token: float = 1.0
    per_token_squared: float = 1.0 / (12 * 4096)

    def of(self, lengths: Int64[np.ndarray, " documents"]) -> Float64[np.ndarray, " documents"]:
        """The cost of each document."""
        return self.per_token * lengths + self.per_token_squared * lengths.astype(np.float64) ** 2


@dataclass(frozen=True)
class WindowCounts:
    """What the windows of a run hold: exact sums, except the imbalance, which may be sampled."""

    num_steps: int
    num_examples: int
    """Over the whole run, repeats counted."""
    num_tokens: int
    num_supervised_tokens: int
    num_examples_per_epoch: int
    steps_per_epoch: int
    """Of the first epoch; with `global_tokens` later ones may differ by a few."""
    micro_batches_total: int
    """Over all steps, on one rank (every rank has the same number)."""
    micro_batches_min: int
    """Fewest in one step, on one rank."""
    micro_batches_max: int
    least_micro_batches_share: float
    """Share of the windows with no more micro-batches than tokens and documents alone demand."""
    max_window_tokens: int
    max_example_tokens: int
    max_micro_tokens: int
    """Most tokens that one forward may hold, padding included."""
    sum_squared_tokens: float
    """Sum of T^2 over all documents of the run: what attention costs."""
    imbalance_mean: float
    """Slowest rank over the mean rank, minus 1, mean over the windows looked at."""
    imbalance_max: float
    imbalance_windows: int
    """How many windows the imbalance was measured on."""
    examples_per_source: dict[str, int]
    """Over the whole run."""
    packed: bool
    world_size: int
    """Data-parallel ranks that the windows were cut for."""
    num_computed_tokens: int | None = None
    """Of `num_tokens`, those left to compute where examples share their beginnings; None: all of them."""
    num_computed_windows: int = 0
    """On how many windows that was counted: all that may share, or a sample."""
    unshared: str | None = None
    """Why beginnings are not shared; None where they are wherever it pays."""
    num_counted_steps: int | None = None
    """Of a run of very many epochs, the first steps, which were counted: micro-batches are scaled up from
    theirs, and so are tokens of a blend or of a last part of an epoch. None: all were."""
