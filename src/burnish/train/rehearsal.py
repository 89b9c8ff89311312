"""Layers compiled before the first step, on micro-batches that are the same whenever a run starts.

A compiler looks at the sizes that it meets first: which operations it joins, and with that how sums are
rounded, may depend on them. A run that is resumed meets other sizes first than it did at its beginning. So
layers are compiled on rows made for it, whose sizes depend on the config alone; of what is computed on them
nothing is kept.
"""

from __future__ import annotations

import numpy as np

from burnish.config.schema import Config
from burnish.data.windows import micro_budget
from burnish.engine.base import Engine
from burnish.records import NO_TARGET, MicroBatch
from burnish.runtime import Ranks, log, seeded
from burnish.train.step import Feed

_TOKENS, _TOKENS_ALL_SUPERVISED = 1024, 128
_SUPERVISED_SHARE = 8
"""Of a row one in so many: a last layer is then computed at supervised rows, which is another computation
than that of all rows. Few enough for the head to stay within what the plan has for it."""


def rehearse(engine: Engine, config: Config, feed: Feed, evaluates: bool, ranks: Ranks) -> None:
    """Meet the sizes that layers are compiled for, where they are: packed rows in training and in evaluation.

    Args:
        engine: Over a model whose layers are to be compiled.
        config: As resolved; without `model.compile` nothing is done.
        feed: Whose token ids are taken.
        evaluates: Whether there is anything to evaluate on.
        ranks: This process among the others.
    """
    if config.model.compile is not True or not feed.packed:
        return
    if ranks.is_main:
        log.info("Compiling the layers: a minute or so, seconds where this machine knows them.")
    tokens = feed.store[0].token_ids.astype(np.int64)
    longest = config.data.max_tokens
    budget = micro_budget(config.batch, longest)
    most = budget.tokens or (budget.examples or 1) * longest
    with seeded(0):  # dropout draws
        for size, share in ((_TOKENS, _SUPERVISED_SHARE), (_TOKENS_ALL_SUPERVISED, 1)):
            row = _row(tokens, min(size, most), longest, share)
            engine.rehearse(row)
            if evaluates:
                engine.evaluate(row)


def _row(tokens: np.ndarray, size: int, max_tokens: int, share: int) -> MicroBatch:
    """A packed row of documents, none as long as the row; one token in `share` is a target."""
    longest = max(1, min(max_tokens, size * 5 // 8))
    lengths = [longest]
    while (left := size - sum(lengths)) > 0:
        lengths.append(min(left, max(1, longest * 2 // 3)))
    token_ids = np.resize(tokens, size)[None]
    supervised = np.arange(size)[None] % share == 0
    return MicroBatch(
        token_ids=token_ids,
        position_ids=np.concatenate([np.arange(length) for length in lengths])[None].astype(np.int64),
        targets=np.where(supervised, token_ids, NO_TARGET),
        weights=supervised.astype(np.float32),
        document_lengths=np.asarray(lengths, np.int32),
        example_ids=np.full(len(lengths), -1, np.int64),
        packed=True,
    )
