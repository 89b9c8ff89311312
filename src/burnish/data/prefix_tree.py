"""Documents that begin alike, as a tree whose every token stands once.

    system prompt ──┬── question 1 ──┬── answer a        laid out depth first, in one row:
                    │                └── answer b
                    └── question 2 ───── answer c        [system|question 1|a|b|question 2 + c]

A token's hidden state depends on the tokens before it and on nothing else, so what documents begin with
can be computed once for all of them. A segment is a run of tokens of one or more documents; the segments
from a root down to a leaf are a document. `model/prefix_attention.py` lets each segment see the segments
above it.

A segment is shared only where it is `MIN_PREFIX_TOKENS` long or longer: less is not worth the calls of
kernels that it costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import numpy as np
from jaxtyping import Int32, Int64

MIN_PREFIX_TOKENS = 32
"""Documents share a beginning of at least so many tokens, or none."""


def sort_by_tokens(
    documents: Sequence[Int32[np.ndarray, " _tokens"]],
) -> tuple[Int64[np.ndarray, " documents"], Int64[np.ndarray, " documents"]]:
    """Put documents that begin alike side by side.

    Returns:
        Positions in `documents` in an order in which the beginning that any two have in common is the
        shortest of those between neighbours from one to the other; and of each in that order, how many
        tokens it has in common with the one before (0 for the first).
    """
    keys = [np.ascontiguousarray(document).tobytes() for document in documents]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    common = [0] + [_num_common(documents[a], documents[b]) for a, b in pairwise(order)]
    return np.array(order, np.int64), np.array(common[: len(order)], np.int64)


def _num_common(one: np.ndarray, other: np.ndarray) -> int:
    shorter = min(len(one), len(other))
    differs = one[:shorter] != other[:shorter]
    first = int(differs.argmax()) if shorter else 0
    return first if shorter and differs[first] else shorter


def common_of_some(
    common: Int64[np.ndarray, " documents"], chosen: Int64[np.ndarray, " chosen"]
) -> Int64[np.ndarray, " chosen"]:
    """`common` of a choice out of sorted documents.

    Args:
        common: As `sort_by_tokens` gives it.
        chosen: Positions in that order, ascending.
    """
    if len(chosen) == 1:
        return np.zeros(1, np.int64)
    # From the document behind one that is chosen up to the next that is: the shortest of these.
    least = np.minimum.reduceat(common[: chosen[-1] + 1], chosen[:-1] + 1)
    return np.concatenate([[0], least])


@final
@dataclass(frozen=True)
class PrefixTree:
    """Segments in the order of the row, depth first, every parent before its children.

    `documents` are numbered as they were given, in sorted order.
    """

    document: Int64[np.ndarray, " segments"]
    """A document that holds the segment's tokens."""
    first: Int64[np.ndarray, " segments"]
    """Where the segment begins in that document: so many tokens stand above it."""
    size: Int64[np.ndarray, " segments"]
    """Its tokens."""
    parent: Int64[np.ndarray, " segments"]
    """The segment above; -1 where there is none."""
    tips: Int64[np.ndarray, " documents"]
    """Of each document, the segment that it ends with."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the row."""
        return int(self.size.sum())

    @property
    def is_shared(self) -> bool:
        """Whether any token belongs to more than one document."""
        return len(self.size) < len(self.tips) or bool((self.parent >= 0).any())

    def begins(self) -> Int64[np.ndarray, " segments"]:
        """The column at which each segment begins."""
        return np.cumsum(self.size) - self.size

    def ends(self) -> Int64[np.ndarray, " segments"]:
        """The column behind the last segment below each one (behind itself, where it has none)."""
        total = self.size.copy()
        for segment in range(len(total) - 1, -1, -1):
            if self.parent[segment] >= 0:
                total[self.parent[segment]] += total[segment]
        return self.begins() + total

    def squares(self) -> float:
        """What attention costs, in tokens squared: that of a document alone is its length squared."""
        size = self.size.astype(np.float64)
        below = self.ends() - self.begins() - self.size
        return float((size * size + 2 * size * below).sum())

    def columns(self, document: int) -> Int64[np.ndarray, " tokens"]:
        """The columns of a document's tokens, in order."""
        begins, parts = self.begins(), []
        segment = int(self.tips[document])
        while segment >= 0:
            parts.append(np.arange(begins[segment], begins[segment] + self.size[segment]))
            segment = int(self.parent[segment])
        return np.concatenate(parts[::-1])


def grow(lengths: Sequence[int], common: Sequence[int]) -> PrefixTree:
    """The tree of documents whose order and common beginnings `sort_by_tokens` found.

    Args:
        lengths: Tokens of each document, in that order, at least 1.
        common: Of each, the tokens it has in common with the one before.
    """
    rows: list[tuple[int, int, int, int]] = []
    tips = [-1] * len(lengths)
    # A range of documents, how many tokens of theirs stand in segments already, and the last of those.
    waiting = [(0, len(lengths), 0, -1)] if len(lengths) else []
    while waiting:
        start, stop, depth, above = waiting.pop()
        if stop - start == 1:
            tips[start] = len(rows) if lengths[start] > depth else above
            if lengths[start] > depth:
                rows.append((start, depth, lengths[start] - depth, above))
            continue
        worth = depth + MIN_PREFIX_TOKENS
        cuts = [start, *(i for i in range(start + 1, stop) if common[i] < worth), stop]
        if len(cuts) > 2:
            waiting += [(a, b, depth, above) for a, b in reversed(list(pairwise(cuts)))]
            continue
        shared = min(common[start + 1 : stop])
        rows.append((start, depth, shared - depth, above))
        waiting.append((start, stop, shared, len(rows) - 1))
    table = np.array(rows, np.int64).reshape(-1, 4)
    return PrefixTree(table[:, 0], table[:, 1], table[:, 2], table[:, 3], np.array(tips, np.int64))
