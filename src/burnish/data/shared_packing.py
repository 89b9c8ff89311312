"""A window to micro-batches where examples begin alike: those that do are kept together.

Examples that share a beginning are tied into bundles, and a bundle is packed like one document of as many
tokens as it computes. A bundle is a branch of the window's prefix tree; a branch that is larger than a
forward may be is cut into several, each of which computes the beginning again:

    [system|a|b|c|d|e|f]  ->  [system|a|d|f] [system|b|c|e]

Several sizes of bundles are tried, because large ones save more tokens and small ones spread better
over ranks. What the window gains is the time of its slowest rank; where that is less than
`MIN_GAIN`, nothing is shared and the window is cut as if nobody had looked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Int64

from burnish.data.pack import Cuts, pack_window
from burnish.data.prefix_tree import PrefixTree, common_of_some, grow
from burnish.plan import CostModel, MicroBudget

MIN_GAIN = 0.1
"""Share of a window's time that sharing has to save."""
_PARTS = (1, 2, 3, 4, 6, 8)
"""Bundles are at most a forward's tokens over one of these."""


@final
@dataclass(frozen=True)
class Alike:
    """Examples of a window, those that begin alike side by side."""

    order: Int64[np.ndarray, " documents"]
    """Positions in the window."""
    common: Int64[np.ndarray, " documents"]
    """Tokens in common with the example before in `order`; as `prefix_tree.sort_by_tokens` gives it."""


@final
@dataclass(frozen=True)
class SharedCuts:
    """A window cut so that beginnings are shared."""

    cuts: Cuts
    num_computed_tokens: int
    rank_costs: tuple[float, ...]
    """Of each rank, by the cost model."""


def pack_alike(
    lengths: Int64[np.ndarray, " n"],
    alike: Alike,
    num_ranks: int,
    budget: MicroBudget,
    cost: CostModel,
) -> SharedCuts | None:
    """Cut a window's documents among ranks and micro-batches, beginnings shared.

    Pure and deterministic. Every document appears once, no micro-batch computes more tokens than the
    budget has, and every rank has the same number of micro-batches.

    Args:
        lengths: Tokens of each document of the window; none is over the budget.
        alike: All documents of the window, sorted.
        num_ranks: Data-parallel ranks.
        budget: Of a micro-batch; limited by tokens.
        cost: What is saved and balanced.

    Returns:
        None where it would save less than `MIN_GAIN`, or no cut was found that keeps to the budget.
    """
    assert budget.tokens is not None
    sorted_lengths = lengths[alike.order]
    tree = grow(sorted_lengths.tolist(), alike.common.tolist())
    if tree.num_tokens > (1 - MIN_GAIN) * lengths.sum():
        return None
    best: SharedCuts | None = None
    for parts in _PARTS:
        most = budget.tokens // parts
        bundles = _bundles(tree, most, budget.tokens)
        trial = _pack_bundles(bundles, sorted_lengths, alike, num_ranks, budget, cost)
        if trial is not None and (best is None or max(trial.rank_costs) < max(best.rank_costs)):
            best = trial
        if most < tree.num_tokens // len(lengths):
            break
    if best is None:
        return None
    apart = pack_window(lengths, num_ranks, budget, cost)
    slowest = max(sum(float(cost.of(lengths[m]).sum()) for m in rank) for rank in apart)
    return best if max(best.rank_costs) <= (1 - MIN_GAIN) * slowest else None


def _cost_of(tree: PrefixTree, cost: CostModel) -> float:
    return cost.per_token * tree.num_tokens + cost.per_token_squared * tree.squares()


def _pack_bundles(
    bundles: Sequence[Int64[np.ndarray, " _documents"]],
    lengths: Int64[np.ndarray, " documents"],
    alike: Alike,
    num_ranks: int,
    budget: MicroBudget,
    cost: CostModel,
) -> SharedCuts | None:
    """Pack bundles, whose documents are positions in sorted order.

    None where one turns out over the budget: its documents alone, or with those of others, may share less
    than among all. With beginnings of 40, 60 and 80 tokens, 40 is shared and then 80, which is 32 more;
    without the documents that have just 40 in common, 60 is, and 80 no more.
    """
    assert budget.tokens is not None

    def tree_of(documents: Int64[np.ndarray, " chosen"]) -> PrefixTree:
        return grow(lengths[documents].tolist(), common_of_some(alike.common, documents).tolist())

    trees = [tree_of(bundle) for bundle in bundles]
    sizes = np.array([tree.num_tokens for tree in trees], np.int64)
    if sizes.max() > budget.tokens:
        return None
    costs = np.array([_cost_of(tree, cost) for tree in trees])
    ranks = pack_window(sizes, num_ranks, budget, cost, costs=costs)
    cuts: Cuts = []
    num_computed, rank_costs = 0, []
    for rank in ranks:
        cuts.append([])
        rank_costs.append(0.0)
        for chosen in rank:
            # Bundles of one beginning that come together share it after all.
            documents = np.sort(np.concatenate([np.empty(0, np.int64), *(bundles[i] for i in chosen)]))
            cuts[-1].append(alike.order[documents])
            if len(documents):
                tree = tree_of(documents)
                if tree.num_tokens > budget.tokens:
                    return None
                num_computed += tree.num_tokens
                rank_costs[-1] += _cost_of(tree, cost)
    return SharedCuts(cuts, num_computed, tuple(rank_costs))


def _bundles(tree: PrefixTree, most: int, limit: int) -> list[Int64[np.ndarray, " _documents"]]:
    """Branches of about `most` tokens, none over `limit`, beginnings included.

    From the leaves up, each segment's branches are joined while they have room together, or else dealt
    into as few bundles as have room, evenly.
    """
    # Of each segment, and of the root at -1: (tokens below the segment, documents) of bundles so far.
    below: list[list[tuple[int, list[int]]]] = [[] for _ in range(len(tree.size) + 1)]
    for document, tip in enumerate(tree.tips.tolist()):
        below[tip].append((0, [document]))
    for segment in range(len(tree.size) - 1, -1, -1):
        size, depth = int(tree.size[segment]), int(tree.first[segment] + tree.size[segment])
        for tokens, documents in _joined(below[segment], most - depth, limit - depth):
            below[int(tree.parent[segment])].append((size + tokens, documents))
    return [np.array(sorted(documents), np.int64) for _, documents in below[-1]]


def _joined(parts: list[tuple[int, list[int]]], most: int, limit: int) -> list[tuple[int, list[int]]]:
    """Deal (tokens, documents) into as few bins of `most` tokens as it takes; none over `limit` or empty."""
    total = sum(tokens for tokens, _ in parts)
    num = 1 if total <= most else max(2, -(-total // max(1, most)))
    descending = sorted(parts, key=lambda part: -part[0])
    while num < len(parts):
        bins: list[tuple[int, list[int]]] = [(0, []) for _ in range(num)]
        for tokens, documents in descending:
            # By documents too: one that ends where another goes on, or equals it, has no token of its own.
            emptiest = min(range(num), key=lambda i: (bins[i][0], len(bins[i][1])))
            bins[emptiest] = (bins[emptiest][0] + tokens, bins[emptiest][1] + documents)
        if max(tokens for tokens, _ in bins) <= limit:
            return bins
        num += 1
    return parts
