"""Hold out a share of the training examples, by their content."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64, UInt64

from burnish.data.store import ExampleStore


def split_off(store: ExampleStore, fraction: float, seed: int) -> tuple[ExampleStore, ExampleStore | None]:
    """Split into examples to train on and examples to evaluate on.

    Which are held out is a pure function of the seed and of what the rows say, not of where they
    stand: every row gets a random-looking number from its hash and the seed, and the lowest are held
    out. Rows that are equal get equal numbers, so no held-out row has a twin in training; nor has one
    piece of a split row the others.

    Args:
        store: All training examples.
        fraction: Share to hold out, rounded to whole examples, at least one; 0 holds out none.
        seed: Of the choice.

    Returns:
        Training examples and held-out ones (None where nothing is held out, because all rows are equal or
        there is only one), both in order.
    """
    if fraction == 0.0 or len(store) < 2:
        return store, None
    held_out = held_out_examples(store.row_hashes, max(1, round(fraction * len(store))), seed)
    if not held_out.any():
        return store, None
    return (
        store.subset(np.flatnonzero(~held_out).astype(np.int64), keep_empty=True),
        store.subset(np.flatnonzero(held_out).astype(np.int64), keep_empty=False),
    )


def held_out_examples(
    hashes: UInt64[np.ndarray, " examples"], num_wanted: int, seed: int
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """True for examples to hold out: as many as wanted, or fewer where groups of equals do not fit.

    At least one group of equals is held out, and at least one is not (if there are two).
    """
    groups, members = np.unique(hashes, return_inverse=True)
    sizes = np.bincount(members, minlength=len(groups))
    order = np.argsort(_mixed(groups, seed), kind="stable")
    chosen = np.zeros(len(groups), bool)
    left = num_wanted
    for group in order[:-1]:
        if sizes[group] <= left or left == num_wanted:
            chosen[group] = True
            left -= int(sizes[group])
        if left <= 0:
            break
    return chosen[members.reshape(-1)]


def _mixed(values: UInt64[np.ndarray, " n"], seed: int) -> Int64[np.ndarray, " n"]:
    """Numbers without order from the values and the seed: the finaliser of splitmix64
    (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)."""
    # The golden ratio's bits spread neighbouring seeds far apart.
    mixed = values ^ np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
    with np.errstate(over="ignore"):
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))).view(np.int64)
