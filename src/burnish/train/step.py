"""The step: one window in, one update out."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from burnish.data.collate import collate
from burnish.data.store import ExampleStore
from burnish.engine.base import Engine, StepResult
from burnish.records import StepStats, Window
from burnish.runtime import Ranks, log, peak_memory_bytes, sum_over_ranks


@dataclass(frozen=True)
class Feed:
    """Examples and how they are laid out: everything a micro-batch is made from."""

    store: ExampleStore
    packed: bool
    pad_token_id: int


def train_step(
    engine: Engine, window: Window, feed: Feed, ranks: Ranks, lr: float, stop_asked: bool = False
) -> tuple[StepStats, bool]:
    """One optimizer step over one window: `loss = sum(weight * nll) / sum(weight)`.

    The denominator is the whole window's, over all ranks, and known before the first forward; so
    neither the number of ranks nor that of micro-batches changes the gradient.

    Args:
        engine: Adds up gradients, then applies them.
        window: What this step consumes, and this rank's share of it.
        feed: Where the examples are.
        ranks: This process among the others.
        lr: Learning rate of this step.
        stop_asked: This rank was asked to stop; travels with the loss, so that all ranks learn of
            it at the same step without a collective of its own.

    Returns:
        What happened, and whether any rank was asked to stop. `StepStats.epoch` counts whole
        passes only; who knows the plan adds the fraction.
    """
    started = time.perf_counter()
    attempts = [_attempt(engine, window, feed, ranks, lr, stop_asked)]
    # A step that fp16's range was too small for is not lost: its examples would be left out of the epoch.
    while attempts[-1].result.may_repeat and math.isfinite(attempts[-1].nll_sum):
        log.info("Step %d: gradients overflow fp16. Again, with a smaller loss scale.", window.step)
        attempts.append(_attempt(engine, window, feed, ranks, lr, stop_asked))
    attempt = attempts[-1]
    seconds = time.perf_counter() - started
    stats = StepStats(
        step=window.step,
        epoch=float(window.epoch),
        loss=attempt.nll_sum / window.total_weight,
        lr=lr,
        grad_norm=attempt.result.grad_norm,
        applied=attempt.result.applied,
        num_examples=len(window.example_ids),
        num_tokens=window.num_tokens,
        num_supervised_tokens=window.num_supervised_tokens,
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(engine.device),
        example_ids=tuple(int(i) for i in window.example_ids),
        num_micro_batches=len(window.cuts[ranks.rank]),
        phase_seconds=_phase_seconds(attempts, seconds, engine.device),
    )
    return stats, attempt.stop_asked


@dataclass(frozen=True)
class _Attempt:
    """What came of computing a window and applying it."""

    nll_sum: float
    """Over all ranks."""
    stop_asked: bool
    """On any rank."""
    result: StepResult
    data_seconds: float
    update_seconds: float


def _attempt(
    engine: Engine, window: Window, feed: Feed, ranks: Ranks, lr: float, stop_asked: bool
) -> _Attempt:
    """This rank's share of a window, forward and backward, and the step of all ranks."""
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    data_seconds = 0.0
    for example_ids in window.cuts[ranks.rank]:
        asked = time.perf_counter()
        examples = [feed.store[int(i)] for i in example_ids]
        shares = window.num_computed_tokens is not None
        micro_batch = collate(examples, example_ids, feed.packed, feed.pad_token_id, shares)
        data_seconds += time.perf_counter() - asked
        sums[0] += engine.forward_backward(micro_batch, window.total_weight)
    asked = time.perf_counter()
    result = engine.step(lr)
    update_seconds = time.perf_counter() - asked
    sums[1] = float(stop_asked)
    nll_sum, num_asked = sum_over_ranks(sums, ranks).tolist()
    return _Attempt(nll_sum, num_asked > 0, result, data_seconds, update_seconds)


def _phase_seconds(attempts: Sequence[_Attempt], seconds: float, device: torch.device) -> dict[str, float]:
    """Where the time of a step went, in all attempts at it: see `StepStats.phase_seconds`."""
    named = {"data": sum(attempt.data_seconds for attempt in attempts), "forward": 0.0, "backward": 0.0}
    for attempt in attempts:
        forward, backward = attempt.result.forward_seconds, attempt.result.backward_seconds
        if forward is None or backward is None:
            return {}
        named["forward"] += forward
        named["backward"] += backward
    if device.type == "cuda":
        # The host waits in `step` for what it queued before, so its own clock says nothing of the update.
        return {**named, "update": max(0.0, seconds - sum(named.values())), "other": 0.0}
    named["update"] = sum(attempt.update_seconds for attempt in attempts)
    return {**named, "other": seconds - sum(named.values())}
