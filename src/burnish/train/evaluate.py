"""Loss on held-out data: by token, by source, every example exactly once."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int64

from burnish.data.collate import collate
from burnish.data.store import ExampleStore
from burnish.engine.base import Scorer
from burnish.records import EvalStats
from burnish.runtime import Ranks, send_array, sum_over_ranks

Cuts = Sequence[Sequence[Int64[np.ndarray, " _"]]]
"""`cuts[rank][m]`: the example numbers of micro-batch m on that rank; lengths differ."""


def evaluate(
    engine: Scorer,
    store: ExampleStore,
    cuts: Cuts,
    ranks: Ranks,
    *,
    step: int,
    packed: bool,
    pad_token_id: int,
) -> EvalStats:
    """`sum(weight * nll) / sum(weight)` over the whole held-out set, and per source.

    Nothing is averaged twice: each document's sum is added to its source's, ranks' sums are added
    to one another, and only then is divided. So neither the cut nor the number of ranks can move
    the result by more than rounding (sums are fp64).

    Args:
        engine: Runs the forward, in evaluation mode.
        store: The held-out examples.
        cuts: Which rank evaluates which examples; every rank has as many micro-batches.
        ranks: This process among the others.
        step: Optimizer steps done, for the record.
        packed: Lay documents end to end.
        pad_token_id: Fills rows where not packed.

    Returns:
        The same on every rank.
    """
    started = time.perf_counter()
    nll = torch.zeros(len(store.source_names), dtype=torch.float64, device=engine.device)
    for example_ids in cuts[ranks.rank]:
        micro_batch = collate([store[int(i)] for i in example_ids], example_ids, packed, pad_token_id)
        document_nll = engine.evaluate(micro_batch)
        if len(example_ids):
            sources = send_array(store.source_ids[example_ids].astype(np.int64), engine.device)
            nll.index_add_(0, sources, document_nll.double())
    totals = sum_over_ranks(nll, ranks).cpu().numpy()

    # Weights and counts are known beforehand and alike on every rank: no second collective.
    weight = np.bincount(store.source_ids, weights=store.total_weight, minlength=len(totals))
    supervised = np.bincount(store.source_ids, weights=store.num_supervised, minlength=len(totals))
    sources_stats = {
        name: _loss_entry(totals[i], weight[i], supervised[i]) for i, name in enumerate(store.source_names)
    }
    total = _loss_entry(totals.sum(), weight.sum(), supervised.sum())
    return EvalStats(
        step=step,
        loss=total["loss"],
        perplexity=total["perplexity"],
        num_supervised_tokens=int(supervised.sum()),
        sources=sources_stats,
        seconds=time.perf_counter() - started,
    )


def _loss_entry(nll: float, weight: float, num_supervised_tokens: float) -> dict[str, float | int]:
    loss = float(nll / weight) if weight > 0 else float("nan")
    try:
        perplexity = math.exp(loss)
    except OverflowError:
        perplexity = float("inf")
    return {"loss": loss, "perplexity": perplexity, "num_supervised_tokens": int(num_supervised_tokens)}
