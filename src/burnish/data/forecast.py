"""What packing will give, told from the examples alone, before model and machine are known."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int64

from burnish.config.schema import Config
from burnish.data.pack import Cuts, pack_window
from burnish.data.store import ExampleStore
from burnish.data.windows import micro_budget, shares
from burnish.plan import DEFAULT_GLOBAL_EXAMPLES, CostModel, MicroBudget

_NUM_WINDOWS = 20
"""Windows that are drawn and packed for real: a few milliseconds, and fill is known within a percent."""
_MOST_EXAMPLES = 4096
"""Of a window; a larger one is packed no less well."""


def forecast_packing(config: Config, train: ExampleStore) -> dict[str, Any]:
    """How full one GPU's forwards will be, packed and padded, by packing windows drawn from the examples.

    `batch.micro_tokens: auto` counts as its least here; the plan, which knows the memory, says what it is.

    Returns:
        Plain JSON: `micro_tokens` (None where only `micro_examples` bounds a forward), the mean
        `examples_per_forward`, `tokens_per_forward` and `fill` (its share of `micro_tokens`), and
        `padding_if_padded`, the share of positions that would be padding without packing.
    """
    data, batch = config.data, config.batch
    budget = micro_budget(batch, data.max_tokens)
    longest = int(train.num_tokens.max())
    if budget.tokens is not None and longest > budget.tokens:
        # `plan_windows` says what is wrong with that; a forecast is no place for it.
        budget = MicroBudget(longest, budget.examples)
    windows = list(_drawn(config, train))
    packed = [pack_window(lengths, 1, budget, CostModel()) for lengths in windows]
    padded = [pack_window(lengths, 1, budget, CostModel(), packed=False) for lengths in windows]
    num_tokens = sum(int(lengths.sum()) for lengths in windows)
    num_forwards = sum(len(cuts[0]) for cuts in packed)
    positions = sum(_positions(lengths, cuts) for lengths, cuts in zip(windows, padded, strict=True))
    return {
        "micro_tokens": budget.tokens,
        "examples_per_forward": sum(map(len, windows)) / num_forwards,
        "tokens_per_forward": num_tokens / num_forwards,
        "fill": None if budget.tokens is None else num_tokens / num_forwards / budget.tokens,
        "padding_if_padded": 1 - num_tokens / positions,
        "windows": len(windows),
    }


def _drawn(config: Config, train: ExampleStore) -> list[Int64[np.ndarray, " examples"]]:
    """Lengths of windows like those of the run, with each source's share of a weighted mix."""
    batch = config.batch
    num = batch.global_examples or DEFAULT_GLOBAL_EXAMPLES
    if batch.global_tokens is not None:
        num = int(batch.global_tokens / train.num_tokens.mean())
    num = max(1, min(num, _MOST_EXAMPLES, len(train)))
    draw = np.random.Generator(np.random.Philox(key=np.array([config.train.seed % 2**64, 0], np.uint64)))
    if config.data.mix == "weighted":
        members = [np.flatnonzero(train.source_ids == i) for i in range(len(config.data.train))]
        # A source that is held out whole is for `plan_windows` to refuse, too.
        weights = [
            source.weight * bool(len(own)) for source, own in zip(config.data.train, members, strict=True)
        ]
        per_source = list(zip(members, shares(weights, num), strict=True))
    else:
        per_source = [(np.arange(len(train)), num)]
    drawn = []
    for _ in range(_NUM_WINDOWS):
        ids = np.concatenate([own[draw.integers(0, len(own), count)] for own, count in per_source if count])
        drawn.append(train.num_tokens[ids].astype(np.int64))
    return drawn


def _positions(lengths: Int64[np.ndarray, " examples"], cuts: Cuts) -> int:
    """Positions that padded micro-batches compute, padding included."""
    return sum(len(rows) * int(lengths[rows].max()) for rank in cuts for rows in rank if len(rows))
