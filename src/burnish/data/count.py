"""What all windows of a run hold, counted exactly and without packing them one by one.

Ten million examples take seconds: windows are sorted many at a time, and for nearly every one the
certificate of `pack.surely_fits` says that the least number of micro-batches is the number. Only what it
leaves open is packed to see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool, Int64

from burnish.data.pack import imbalance, num_micro_batches_of_many, pack_window
from burnish.data.windows import ExampleCounts, WindowPlan, shares
from burnish.plan import WindowCounts

_CHUNK_EXAMPLES = 1 << 20
"""Examples looked at together: enough to be fast, and 8 MiB an array."""
_COUNTED_EXAMPLES = 1 << 25
"""Of a run of more examples, as many whole epochs as hold so many are counted, at least `_COUNTED_EPOCHS`;
the others hold the same examples in another order."""
_COUNTED_EPOCHS = 16
_SAMPLED_WINDOWS = 1000
_SAMPLED_EXAMPLES = 1 << 20
"""The imbalance is measured on so many windows and examples at most (about a second), evenly spread."""
_SHARED_WINDOWS = 2000
"""Where more windows may share beginnings, so many of them, evenly spread, stand for all: their tokens have
to be read."""


@dataclass
class _Sums:
    """Running sums over chunks of windows."""

    num_tokens: int = 0
    num_supervised: int = 0
    squared: float = 0.0
    least_windows: int = 0
    most_window_tokens: int = 0
    longest: int = 0
    may_share: list[Bool[np.ndarray, " windows"]] = field(default_factory=list)
    window_tokens: list[Int64[np.ndarray, " windows"]] = field(default_factory=list)


def count_windows(plan: WindowPlan, counts: ExampleCounts) -> WindowCounts:
    """Count steps, tokens and micro-batches of a run: equal to the sums over `plan.window`.

    Only where very many windows share beginnings are micro-batches and computed tokens estimated, from
    `_SHARED_WINDOWS` of them; and of a run of very many epochs micro-batches, from its first epochs.

    Args:
        plan: The run's windows.
        counts: The numbers that `plan` was made from.
    """
    enough = max(_COUNTED_EPOCHS, _COUNTED_EXAMPLES // plan.num_examples_per_epoch)
    if plan.num_epochs <= enough:
        return _count_epochs(plan, counts, plan.num_epochs)
    return _extended(_count_epochs(plan, counts, enough), plan)


def _extended(counted: WindowCounts, plan: WindowPlan) -> WindowCounts:
    """The counts of a run from those of its first, whole epochs.

    Over whole epochs without a blend tokens come out exactly, because every epoch holds the same ones.
    """
    total, part = plan.num_examples, counted.num_examples
    per_source = shares([float(num) for num in counted.examples_per_source.values()], total)
    computed = counted.num_computed_tokens
    return replace(
        counted,
        num_steps=plan.num_steps,
        num_examples=total,
        num_tokens=counted.num_tokens * total // part,
        num_supervised_tokens=counted.num_supervised_tokens * total // part,
        micro_batches_total=counted.micro_batches_total * plan.num_steps // counted.num_steps,
        sum_squared_tokens=counted.sum_squared_tokens * (total / part),
        examples_per_source=dict(zip(counted.examples_per_source, per_source, strict=True)),
        num_computed_tokens=None if computed is None else computed * total // part,
        num_counted_steps=counted.num_steps,
    )


def _count_epochs(plan: WindowPlan, counts: ExampleCounts, num_epochs: int) -> WindowCounts:
    """Count the first epochs of a run."""
    sums = _Sums()
    per_source = np.zeros(len(counts.source_names), np.int64)
    num_micro: list[Int64[np.ndarray, " windows"]] = []
    for example_ids, starts in _chunks(plan, num_epochs):
        lengths = counts.num_tokens[example_ids].astype(np.int64)
        window_tokens = np.add.reduceat(lengths, starts[:-1])
        micro, least = num_micro_batches_of_many(lengths, starts, plan.world_size, plan.budget, plan.packed)
        num_micro.append(micro)
        sums.least_windows += int((micro == least).sum())
        sums.window_tokens.append(window_tokens)
        if plan.prefixes is not None and plan.prefixes.problem is None:
            sums.may_share.append(plan.prefixes.may_share(example_ids, starts))
        sums.num_tokens += int(window_tokens.sum())
        sums.num_supervised += int(counts.num_supervised[example_ids].sum())
        sums.squared += float(np.square(lengths.astype(np.float64)).sum())
        sums.most_window_tokens = max(sums.most_window_tokens, int(window_tokens.max()))
        sums.longest = max(sums.longest, int(lengths.max()))
        per_source += np.bincount(counts.source_ids[example_ids], minlength=len(per_source))
    per_step = np.concatenate(num_micro)
    computed, num_looked_at = _count_shared(plan, sums, per_step)
    excess = _sample_imbalance(plan, counts, len(per_step))
    return WindowCounts(
        num_steps=len(per_step),
        num_examples=int(per_source.sum()),
        num_tokens=sums.num_tokens,
        num_supervised_tokens=sums.num_supervised,
        num_examples_per_epoch=plan.num_examples_per_epoch,
        steps_per_epoch=plan.steps_per_epoch,
        micro_batches_total=int(per_step.sum()),
        micro_batches_min=int(per_step.min()),
        micro_batches_max=int(per_step.max()),
        least_micro_batches_share=sums.least_windows / len(per_step),
        max_window_tokens=sums.most_window_tokens,
        max_example_tokens=sums.longest,
        max_micro_tokens=_most_micro_tokens(plan, sums),
        sum_squared_tokens=sums.squared,
        imbalance_mean=float(np.mean(excess)),
        imbalance_max=float(np.max(excess)),
        imbalance_windows=len(excess),
        examples_per_source=dict(zip(counts.source_names, per_source.tolist(), strict=True)),
        packed=plan.packed,
        world_size=plan.world_size,
        num_computed_tokens=computed,
        num_computed_windows=num_looked_at,
        unshared=None if plan.prefixes is None else plan.prefixes.problem,
    )


def _count_shared(
    plan: WindowPlan, sums: _Sums, per_step: Int64[np.ndarray, " windows"]
) -> tuple[int | None, int]:
    """Tokens left to compute (None: all), and on how many windows that was counted.

    `per_step`, micro-batches of each window, is set to what it is where beginnings are shared.
    """
    if not sums.may_share:
        return None, 0
    steps = np.flatnonzero(np.concatenate(sums.may_share))
    if not len(steps):
        return None, 0
    tokens = np.concatenate(sums.window_tokens)
    computed = tokens.copy()
    looked_at = steps[np.linspace(0, len(steps) - 1, min(len(steps), _SHARED_WINDOWS)).astype(int)]
    found = [plan.shared_cuts(plan.example_ids(int(step) + 1)) for step in looked_at]
    # A window that was not looked at is taken for the one before it that was.
    like = np.searchsorted(looked_at, steps, side="right") - 1
    for step, which in zip(steps.tolist(), like.tolist(), strict=True):
        cut = found[which]
        if cut is not None:
            share = cut.num_computed_tokens / int(tokens[looked_at[which]])
            computed[step] = round(share * int(tokens[step]))
            per_step[step] = len(cut.cuts[0])
    total = int(computed.sum())
    return (total if total < sums.num_tokens else None), len(looked_at)


def _most_micro_tokens(plan: WindowPlan, sums: _Sums) -> int:
    """No forward holds more: the budget, or less where windows are small."""
    most = plan.budget.tokens
    if most is None:
        most = (plan.budget.examples or 1) * sums.longest
    return min(most, sums.most_window_tokens) if plan.packed else most


def _chunks(
    plan: WindowPlan, num_epochs: int
) -> Iterator[tuple[Int64[np.ndarray, " examples"], Int64[np.ndarray, " windows_plus_1"]]]:
    """Runs of whole windows: their examples in order, and where each window starts in them.

    Short epochs come together, so that a thousand of them are no slower than one as long.
    """
    held: list[tuple[Int64[np.ndarray, " examples"], Int64[np.ndarray, " windows_plus_1"]]] = []
    num_held = 0
    for epoch in range(num_epochs):
        for example_ids, starts in _epoch_chunks(plan, epoch):
            if held and num_held + len(example_ids) > _CHUNK_EXAMPLES:
                yield _joined(held)
                held, num_held = [], 0
            held.append((example_ids, starts))
            num_held += len(example_ids)
    yield _joined(held)


def _joined(
    chunks: Sequence[tuple[Int64[np.ndarray, " _"], Int64[np.ndarray, " _"]]],
) -> tuple[Int64[np.ndarray, " all"], Int64[np.ndarray, " all_windows_plus_1"]]:
    """Chunks as one."""
    if len(chunks) == 1:
        return chunks[0]
    ends = np.cumsum([0] + [len(example_ids) for example_ids, _ in chunks])
    starts = [starts[:-1] + before for (_, starts), before in zip(chunks, ends[:-1], strict=True)]
    return np.concatenate([example_ids for example_ids, _ in chunks]), np.concatenate([*starts, ends[-1:]])


def _epoch_chunks(
    plan: WindowPlan, epoch: int
) -> Iterator[tuple[Int64[np.ndarray, " examples"], Int64[np.ndarray, " windows_plus_1"]]]:
    starts = plan.epoch_starts(epoch)
    example_ids = plan.epoch_order(epoch)
    first = 0
    while first < len(starts) - 1:
        last = int(np.searchsorted(starts, starts[first] + _CHUNK_EXAMPLES, side="right")) - 1
        last = max(last, first + 1)
        chunk = starts[first : last + 1]
        yield example_ids[chunk[0] : chunk[-1]], chunk - chunk[0]
        first = last


def _sample_imbalance(plan: WindowPlan, counts: ExampleCounts, num_steps: int) -> list[float]:
    """Imbalance of evenly spread windows of the first steps, each packed for real."""
    mean_window = max(1, plan.num_examples_per_epoch // plan.steps_per_epoch)
    num = min(num_steps, _SAMPLED_WINDOWS, max(4, _SAMPLED_EXAMPLES // mean_window))
    excess: list[float] = []
    for step in np.linspace(1, num_steps, num).astype(int).tolist():
        lengths = counts.num_tokens[plan.example_ids(step)].astype(np.int64)
        shared = plan.shared_cuts(plan.example_ids(step))
        if shared is not None:
            excess.append(max(shared.rank_costs) * plan.world_size / sum(shared.rank_costs) - 1)
            continue
        cuts = pack_window(lengths, plan.world_size, plan.budget, plan.cost, plan.packed)
        excess.append(imbalance(lengths, cuts, plan.cost, plan.packed))
    return excess
