"""A window to micro-batches: arithmetic on lengths, nothing else.

Packed, a window of documents becomes `ranks * m` bins of at most `micro_tokens` tokens:

    rank 0   [aaaaaaaa|bbb|cc   ] [dddddd|eeeee|ff  ]      m = 2 micro-batches on every rank,
    rank 1   [ggggggg|hhhh|i    ] [jjjjj|kkkkk|lll  ]      the least number that can hold them

First the least m is found, then the documents are spread so that every rank costs the same. What m
is depends on lengths and budget alone, never on the cost, so a plan counts it without packing:
see `num_micro_batches`.

Padded, a micro-batch of documents costs its number of rows times its longest document, so
documents are sorted and cut into runs of neighbours.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64

from burnish.errors import ConfigError, Problem
from burnish.plan import CostModel, MicroBudget

Cuts = list[list[Int64[np.ndarray, " _documents"]]]
"""`cuts[rank][m]`: positions of the documents of micro-batch m, in descending length."""

_SHORT_LIST = 4096
"""Documents a subset-sum search looks at for one bin; enough to fill it to the last token."""


def pack_window(
    lengths: Int64[np.ndarray, " n"],
    num_ranks: int,
    budget: MicroBudget,
    cost: CostModel,
    packed: bool = True,
    costs: Float64[np.ndarray, " n"] | None = None,
) -> Cuts:
    """Cut the documents of one window among ranks and micro-batches.

    Pure and deterministic. Every document appears once, no micro-batch is over `budget`, every rank has
    the same number of micro-batches (some may be empty), and that number is `num_micro_batches`.

    Args:
        lengths: Tokens of each document, at least 1.
        num_ranks: Data-parallel ranks.
        budget: Most tokens (padding included) and documents of a micro-batch.
        cost: What to balance over ranks.
        packed: Documents end to end, or one padded row for each.
        costs: Of each packed document, where they are not what `cost` makes of its length.

    Raises:
        ConfigError: A document is longer than the budget.
    """
    check_lengths(lengths, budget)
    by_length = np.argsort(-lengths, kind="stable")
    descending = lengths[by_length]
    if packed:
        if costs is None:
            costs = cost.of(lengths)
        ranks = _pack(descending, num_ranks, budget, costs[by_length])
    else:
        ranks = _pad(descending, num_ranks, budget, cost)
    return [[by_length[np.asarray(bin_, dtype=np.int64)] for bin_ in rank] for rank in ranks]


def check_lengths(lengths: Int64[np.ndarray, " n"], budget: MicroBudget) -> None:
    """Raise ConfigError where one document alone is over the budget of a forward."""
    if budget.tokens is not None and len(lengths) and int(lengths.max()) > budget.tokens:
        raise ConfigError(
            Problem(
                "batch.micro_tokens",
                f"an example of {int(lengths.max())} tokens does not fit a forward of {budget.tokens}",
                "Raise batch.micro_tokens to data.max_tokens or more, or lower data.max_tokens.",
            )
        )


def num_micro_batches(
    lengths: Int64[np.ndarray, " n"], num_ranks: int, budget: MicroBudget, packed: bool = True
) -> int:
    """Micro-batches per rank that `pack_window` makes of these documents; at least 1."""
    descending = -np.sort(-lengths)
    if packed:
        return _num_packed(descending, num_ranks, budget)
    return max(1, -(-len(_runs(descending, budget)) // num_ranks))


def num_micro_batches_of_many(
    lengths: Int64[np.ndarray, " examples"],
    starts: Int64[np.ndarray, " windows_plus_1"],
    num_ranks: int,
    budget: MicroBudget,
    packed: bool = True,
) -> tuple[Int64[np.ndarray, " windows"], Int64[np.ndarray, " windows"]]:
    """`num_micro_batches` and `least_micro_batches` of many windows at once.

    Args:
        lengths: Tokens of each document, window after window.
        starts: Where each window starts in `lengths`, and where the last one ends; none is empty.
        num_ranks: Data-parallel ranks.
        budget: Of a micro-batch.
        packed: As in `pack_window`.
    """
    sizes = np.diff(starts)
    table = np.zeros((len(sizes), int(sizes.max())), np.int64)
    table[np.arange(table.shape[1]) < sizes[:, None]] = -lengths
    table.sort(axis=1)
    np.negative(table, out=table)
    least = np.ones(len(sizes), np.int64)
    if budget.tokens is not None:
        least = np.maximum(least, -(-table.sum(axis=1) // (num_ranks * budget.tokens)))
    if budget.examples is not None:
        least = np.maximum(least, -(-sizes // (num_ranks * budget.examples)))
    if not packed:
        return np.maximum(1, -(-_num_runs_of_many(table, sizes, budget) // num_ranks)), least
    num = least.copy()
    for window in np.flatnonzero(~surely_fits(table, least, num_ranks, budget)):
        num[window] = _num_packed(table[window, : sizes[window]], num_ranks, budget)
    return num, least


def least_micro_batches(lengths: Int64[np.ndarray, " n"], num_ranks: int, budget: MicroBudget) -> int:
    """Micro-batches per rank below which documents cannot fit, whatever the packing."""
    return _at_least(int(lengths.sum()), len(lengths), num_ranks, budget)


def imbalance(lengths: Int64[np.ndarray, " n"], cuts: Cuts, cost: CostModel, packed: bool = True) -> float:
    """Cost of the slowest rank over the mean of all ranks, minus 1."""
    per_rank = [sum(_micro_cost(lengths[bin_], cost, packed) for bin_ in rank) for rank in cuts]
    mean = sum(per_rank) / len(per_rank)
    return max(per_rank) / mean - 1 if mean else 0.0


def _micro_cost(lengths: np.ndarray, cost: CostModel, packed: bool) -> float:
    if not packed:
        lengths = np.full(len(lengths), lengths.max(initial=0))
    return float(cost.of(lengths).sum())


def _at_least(num_tokens: int, num_documents: int, num_ranks: int, budget: MicroBudget) -> int:
    least = 1
    if budget.tokens is not None:
        least = max(least, -(-num_tokens // (num_ranks * budget.tokens)))
    if budget.examples is not None:
        least = max(least, -(-num_documents // (num_ranks * budget.examples)))
    return least


# ---------------------------------------------------------------------------- packed


def _num_packed(descending: np.ndarray, num_ranks: int, budget: MicroBudget) -> int:
    """The least m that a certificate or one of two packings proves possible."""
    least = _at_least(int(descending.sum()), len(descending), num_ranks, budget)
    if surely_fits(descending[None, :], np.array([least]), num_ranks, budget)[0]:
        return least
    return max(least, -(-len(_tight_bins(descending, num_ranks, least, budget)) // num_ranks))


def surely_fits(
    descending: Int64[np.ndarray, "windows n"],
    num_micro: Int64[np.ndarray, " windows"],
    num_ranks: int,
    budget: MicroBudget,
) -> np.ndarray:
    """Whether any packing that never skips a bin with room must succeed, for many windows at once.

    Documents go in by descending length. Document j of length l finds no room only if every bin is full
    for it: c bins hold as many documents as they may (each at least l long), the others more than
    `budget.tokens - l` tokens. So the documents before it hold at least

        c * limit * l + (bins - c) * (budget.tokens - l + 1)

    tokens, for a c from 0 to `j // limit`; linear in c, so the ends decide. Where they hold fewer, for
    every j, no document can be left over. Rows may be padded with zeros on the right.
    """
    num_bins = (num_micro * num_ranks)[:, None]
    num_documents = (descending > 0).sum(axis=1)
    if budget.tokens is None:
        assert budget.examples is not None
        return num_documents <= num_bins[:, 0] * budget.examples
    before = np.cumsum(descending, axis=1)
    before -= descending
    blocked = budget.tokens + 1 - descending
    fits = ((before < num_bins * blocked) | (descending == 0)).all(axis=1)
    if budget.examples is None:
        return fits
    most = np.minimum(np.arange(descending.shape[1])[None, :] // budget.examples, num_bins)
    other = most * budget.examples * descending + (num_bins - most) * blocked
    return fits & ((before < other) | (descending == 0)).all(axis=1)


def _tight_bins(descending: np.ndarray, num_ranks: int, least: int, budget: MicroBudget) -> list[list[int]]:
    """As few bins as two packings find, stopping at the first that reaches the bound."""
    lengths: list[int] = descending.tolist()
    bins = _best_fit(lengths, budget)
    if len(bins) <= least * num_ranks or budget.tokens is None or budget.examples is not None:
        return bins
    exact = _fill_exactly(lengths, budget.tokens)
    return min(bins, exact, key=len)


def _best_fit(lengths: Sequence[int], budget: MicroBudget) -> list[list[int]]:
    """Best fit decreasing: each document into the fullest bin that has room for it."""
    most_tokens = budget.tokens if budget.tokens is not None else sum(lengths)
    most_documents = budget.examples if budget.examples is not None else len(lengths)
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for index, length in enumerate(lengths):
        at = bisect.bisect_left(room, (length, -1))
        left, bin_ = room.pop(at) if at < len(room) else (most_tokens, len(bins))
        if bin_ == len(bins):
            bins.append([])
        bins[bin_].append(index)
        if len(bins[bin_]) < most_documents and left > length:
            bisect.insort(room, (left - length, bin_))
    return bins


def _fill_exactly(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Fill one bin after the other to the last token where that is possible.

    Each bin takes the longest document left and then the set of others that comes nearest to the budget
    (subset sum; a set of reachable sums is the bits of one integer). Sums are first reached with the
    longest documents, so short ones stay for the end, where they fill what is left.
    """
    left = list(range(len(lengths)))
    bins: list[list[int]] = []
    while left:
        first, rest = left[0], left[1 : _SHORT_LIST + 1]
        chosen = _nearest_subset([lengths[i] for i in rest], most_tokens - lengths[first])
        taken = {rest[i] for i in chosen}
        bins.append([first, *sorted(taken)])
        left = [i for i in left[1:] if i not in taken]
    return bins


def _nearest_subset(lengths: Sequence[int], room: int) -> list[int]:
    """Positions of documents whose sum is as near to `room` from below as any."""
    mask = (1 << (room + 1)) - 1
    reachable = [1]  # reachable[i]: bit s is set when some of the first i documents sum to s
    for length in lengths:
        if reachable[-1] >> room & 1:
            break
        reachable.append((reachable[-1] | reachable[-1] << length) & mask)
    total = reachable[-1].bit_length() - 1
    chosen: list[int] = []
    for i in range(len(reachable) - 1, 0, -1):
        if not reachable[i - 1] >> total & 1:
            chosen.append(i - 1)
            total -= lengths[i - 1]
    return chosen


def _pack(
    descending: np.ndarray, num_ranks: int, budget: MicroBudget, costs: Float64[np.ndarray, " n"]
) -> list[list[list[int]]]:
    num_micro = _num_packed(descending, num_ranks, budget)
    ranks = _spread(descending.tolist(), costs.tolist(), num_ranks, num_micro, budget)
    if ranks is None:  # too tight to balance freely: take the tight bins and deal those out
        bins = _tight_bins(descending, num_ranks, num_micro, budget)
        ranks = _deal(bins, [float(costs[bin_].sum()) for bin_ in bins], num_ranks, num_micro)
    return ranks


def _spread(
    lengths: Sequence[int], costs: Sequence[float], num_ranks: int, num_micro: int, budget: MicroBudget
) -> list[list[list[int]]] | None:
    """Longest processing time first: each document to the cheapest rank that has room for it.

    Inside the rank it goes to the emptiest micro-batch. None where a document finds no room anywhere.
    """
    most_tokens = budget.tokens if budget.tokens is not None else sum(lengths)
    most_documents = budget.examples if budget.examples is not None else len(lengths)
    ranks: list[list[list[int]]] = [[[] for _ in range(num_micro)] for _ in range(num_ranks)]
    open_bins = [[(0, m) for m in range(num_micro)] for _ in range(num_ranks)]  # heaps by tokens
    order = [(0.0, rank) for rank in range(num_ranks)]  # heap by cost
    for index, (length, price) in enumerate(zip(lengths, costs, strict=True)):
        skipped: list[tuple[float, int]] = []
        while order:
            spent, rank = order[0]
            bins = open_bins[rank]
            if bins and bins[0][0] + length <= most_tokens:
                break
            skipped.append(heapq.heappop(order))
        else:
            return None
        tokens, m = bins[0]
        ranks[rank][m].append(index)
        if len(ranks[rank][m]) < most_documents:
            heapq.heapreplace(bins, (tokens + length, m))
        else:
            heapq.heappop(bins)
        heapq.heapreplace(order, (spent + price, rank))
        for entry in skipped:
            heapq.heappush(order, entry)
    return ranks


def _deal(
    bins: Sequence[list[int]], costs: Sequence[float], num_ranks: int, num_micro: int
) -> list[list[list[int]]]:
    """Whole bins to ranks, the dearest first to the cheapest rank that has a micro-batch free."""
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    order = [(0.0, rank) for rank in range(num_ranks)]
    for bin_ in sorted(range(len(bins)), key=lambda b: -costs[b]):
        spent, rank = order[0]
        ranks[rank].append(bins[bin_])
        if len(ranks[rank]) < num_micro:
            heapq.heapreplace(order, (spent + costs[bin_], rank))
        else:
            heapq.heappop(order)
    return [rank + [[] for _ in range(num_micro - len(rank))] for rank in ranks]


# ---------------------------------------------------------------------------- padded


def _runs(descending: np.ndarray, budget: MicroBudget) -> list[tuple[int, int]]:
    """Cut into the fewest runs of neighbours whose rows times longest document are in budget.

    Taking as many as fit from the longest on is optimal: any other cut can be shifted into it.
    """
    runs: list[tuple[int, int]] = []
    start, n = 0, len(descending)
    while start < n:
        stop = min(n, start + _rows(int(descending[start]), n, budget))
        runs.append((start, stop))
        start = stop
    return runs


def _num_runs_of_many(
    table: Int64[np.ndarray, "windows n"], sizes: Int64[np.ndarray, " windows"], budget: MicroBudget
) -> Int64[np.ndarray, " windows"]:
    """`len(_runs(...))` of many windows: rows of descending lengths, zeros on the right."""
    start = np.zeros(len(sizes), np.int64)
    num = np.zeros(len(sizes), np.int64)
    left = np.arange(len(sizes))
    while len(left):
        longest = table[left, start[left]]
        rows = np.full(len(left), table.shape[1])
        if budget.examples is not None:
            rows = np.minimum(rows, budget.examples)
        if budget.tokens is not None:
            rows = np.minimum(rows, np.maximum(1, budget.tokens // longest))
        start[left] += rows
        num[left] += 1
        left = left[start[left] < sizes[left]]
    return num


def _rows(longest: int, most: int, budget: MicroBudget) -> int:
    """Rows of a padded micro-batch whose longest document has this length."""
    if budget.examples is not None:
        most = min(most, budget.examples)
    if budget.tokens is not None:
        most = min(most, max(1, budget.tokens // longest))
    return most


def _pad(
    descending: np.ndarray, num_ranks: int, budget: MicroBudget, cost: CostModel
) -> list[list[list[int]]]:
    """The fewest micro-batches, then the smallest token budget that still needs no more of them."""
    runs = _runs(descending, budget)
    num_micro = max(1, -(-len(runs) // num_ranks))
    num_bins = num_micro * num_ranks
    if len(descending):
        low, high = int(descending[0]), budget.tokens or int(descending[0]) * len(descending)
        while low < high:  # smallest budget that needs at most num_bins runs
            middle = (low + high) // 2
            if len(_runs(descending, MicroBudget(middle, budget.examples))) <= num_bins:
                high = middle
            else:
                low = middle + 1
        runs = _runs(descending, MicroBudget(high, budget.examples))
    costs = [_micro_cost(descending[start:stop], cost, packed=False) for start, stop in runs]
    return _deal([list(range(start, stop)) for start, stop in runs], costs, num_ranks, num_micro)
