"""Which examples of a window begin alike, found without reading tokens where none do.

The prepared index holds a hash of every example's first tokens (`prefix_tree.MIN_PREFIX_TOKENS` of them).
Examples whose hash no other example of the window has cannot share anything; of the others, and of those
alone, tokens are read and compared.
"""

from __future__ import annotations

from typing import Protocol, final, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from burnish.data.prefix_tree import MIN_PREFIX_TOKENS, sort_by_tokens
from burnish.data.shared_packing import MIN_GAIN, Alike
from burnish.records import Example


@runtime_checkable
class Examples(Protocol):
    """What finding examples that begin alike needs of the store."""

    @property
    def num_tokens(self) -> Int64[np.ndarray, " examples"]:
        """Tokens of each example."""
        ...

    @property
    def prefix_hashes(self) -> UInt64[np.ndarray, " examples"]:
        """A hash of each example's first tokens, 0 where it has too few."""
        ...

    def __getitem__(self, number: int) -> Example:
        """An example with its tokens."""
        ...


@final
class Prefixes:
    """Beginnings that examples have in common.

    Args:
        store: Prepared examples.
        problem: Why nothing is shared, if so: then nothing begins alike.
    """

    def __init__(self, store: Examples, problem: str | None = None) -> None:
        self._store = store
        self.problem = problem
        if problem is None:
            # Not only those that stand twice in the data: a blend draws one example several times.
            self._hashes = store.prefix_hashes

    def alike(self, example_ids: Int64[np.ndarray, " examples"]) -> Alike | None:
        """Sort a window's examples so that those that begin alike are side by side.

        Returns:
            None where fewer tokens are shared than are worth sharing.
        """
        if self.problem is not None:
            return None
        starts = np.array([0, len(example_ids)], np.int64)
        if not self.may_share(example_ids, starts)[0]:
            return None
        hashes = self._hashes[example_ids]
        shares = _repeated(hashes)
        chosen, others = np.flatnonzero(shares), np.flatnonzero(~shares)
        order, common = sort_by_tokens([self._store[int(i)].token_ids for i in example_ids[chosen]])
        common[common < MIN_PREFIX_TOKENS] = 0
        zeros = np.zeros(len(others), np.int64)
        return Alike(np.concatenate([chosen[order], others]), np.concatenate([common, zeros]))

    def may_share(
        self, example_ids: Int64[np.ndarray, " examples"], starts: Int64[np.ndarray, " windows_plus_1"]
    ) -> Bool[np.ndarray, " windows"]:
        """Of many windows, which could save enough by what the index tells; no token is read.

        Args:
            example_ids: Window after window.
            starts: Where each window starts in `example_ids`, and where the last one ends.
        """
        lengths = self._store.num_tokens[example_ids]
        window = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        hashes = self._hashes[example_ids]
        order = np.lexsort((hashes, window))
        repeats = np.zeros(len(order), bool)
        repeats[1:] = (np.diff(hashes[order]) == 0) & (np.diff(window[order]) == 0)
        repeats &= hashes[order] != 0
        # At most, an example whose hash came before in its window is computed for nothing.
        saved = np.bincount(window[order[repeats]], lengths[order[repeats]], minlength=len(starts) - 1)
        return saved >= MIN_GAIN * np.add.reduceat(lengths, starts[:-1])


def _repeated(hashes: UInt64[np.ndarray, " examples"]) -> Bool[np.ndarray, " examples"]:
    """Which hashes stand here more than once, 0 not counted."""
    ascending = np.sort(hashes)
    twice = np.unique(ascending[1:][ascending[1:] == ascending[:-1]])
    twice = twice[twice != 0]
    if not len(twice):
        return np.zeros(len(hashes), bool)
    at = np.minimum(np.searchsorted(twice, hashes), len(twice) - 1)
    return twice[at] == hashes
