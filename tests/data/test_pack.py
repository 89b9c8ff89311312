"""Packing as properties: every document once, nothing over budget, the least number, in balance."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.data.pack import (
    imbalance,
    least_micro_batches,
    num_micro_batches,
    pack_window,
    surely_fits,
)
from burnish.errors import ConfigError
from burnish.plan import CostModel, MicroBudget

COST = CostModel()
LENGTHS = st.lists(st.integers(1, 64), min_size=0, max_size=60).map(lambda v: np.array(v, np.int64))
BUDGETS = st.one_of(
    st.builds(MicroBudget, st.integers(64, 200), st.none()),
    st.builds(MicroBudget, st.none(), st.integers(1, 9)),
    st.builds(MicroBudget, st.integers(64, 200), st.integers(1, 9)),
)
MANY = settings(max_examples=150, deadline=None)


@MANY
@given(LENGTHS, st.integers(1, 9), BUDGETS, st.booleans())
def test_every_document_once_and_nothing_over_budget(lengths, num_ranks, budget, packed) -> None:
    cuts = pack_window(lengths, num_ranks, budget, COST, packed)
    assert len(cuts) == num_ranks
    assert {len(rank) for rank in cuts} == {num_micro_batches(lengths, num_ranks, budget, packed)}
    placed = np.concatenate([bin_ for rank in cuts for bin_ in rank])
    assert sorted(placed.tolist()) == list(range(len(lengths)))
    for bin_ in itertools.chain.from_iterable(cuts):
        if not len(bin_):
            continue
        tokens = lengths[bin_].sum() if packed else len(bin_) * lengths[bin_].max()
        assert budget.tokens is None or tokens <= budget.tokens
        assert budget.examples is None or len(bin_) <= budget.examples


@MANY
@given(LENGTHS, st.integers(1, 5), BUDGETS)
def test_the_certificate_is_never_wrong(lengths, num_ranks, budget) -> None:
    least = least_micro_batches(lengths, num_ranks, budget)
    descending = -np.sort(-lengths)
    padded = np.concatenate([descending, np.zeros(3, np.int64)])  # zeros on the right change nothing
    sure = surely_fits(descending[None], np.array([least]), num_ranks, budget)[0]
    assert sure == surely_fits(padded[None], np.array([least]), num_ranks, budget)[0]
    if sure:
        assert num_micro_batches(lengths, num_ranks, budget) == least


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(1, 3))
def test_the_number_is_the_least_possible_on_small_cases(values, num_ranks) -> None:
    """Against an exhaustive search: at most one above the optimum, nearly always the optimum."""
    lengths = np.array(values, np.int64)
    budget = MicroBudget(12, None)
    best = -(-fewest_bins(sorted(values, reverse=True), 12) // num_ranks)
    assert best <= num_micro_batches(lengths, num_ranks, budget) <= best + 1


def fewest_bins(lengths: list[int], size: int) -> int:
    best = len(lengths)

    def place(index: int, room: list[int]) -> None:
        nonlocal best
        if len(room) >= best:
            return
        if index == len(lengths):
            best = len(room)
            return
        for b in range(len(room)):
            if room[b] >= lengths[index]:
                place(index + 1, [*room[:b], room[b] - lengths[index], *room[b + 1 :]])
        place(index + 1, [*room, size - lengths[index]])

    place(0, [])
    return best


def alpaca_like(rng: np.random.Generator, num: int) -> np.ndarray:
    return np.clip(rng.lognormal(4.8, 0.7, num), 16, 2048).astype(np.int64)


def test_alpaca_like_windows_are_least_and_balanced() -> None:
    rng = np.random.default_rng(0)
    budget = MicroBudget(4096, None)
    above, worst = 0, []
    for _ in range(200):
        lengths = alpaca_like(rng, 256)
        cuts = pack_window(lengths, 8, budget, COST)
        above += len(cuts[0]) > least_micro_batches(lengths, 8, budget)
        worst.append(imbalance(lengths, cuts, COST))
    assert above <= 2
    assert max(worst) < 0.02


@pytest.mark.parametrize("slack", [0, 1, 8])
def test_windows_that_fill_the_budget_to_the_last_token(slack: int) -> None:
    """The hardest case: as many tokens as the ranks can hold. Still the least, and in balance."""
    rng = np.random.default_rng(slack)
    above = 0
    for _ in range(50):
        lengths = alpaca_like(rng, 400)
        lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), 8 * 4096))]
        rest = 8 * 4096 - slack - int(lengths.sum())
        lengths = np.append(lengths, rest) if 0 < rest <= 4096 else lengths
        cuts = pack_window(lengths, 8, MicroBudget(4096, None), COST)
        above += len(cuts[0]) > least_micro_batches(lengths, 8, MicroBudget(4096, None))
    assert above <= 1


def test_no_packing_can_do_it_in_the_bound() -> None:
    """Three documents of 60 % each need three bins though tokens alone would fit in two."""
    lengths = np.full(3, 60, np.int64)
    assert least_micro_batches(lengths, 1, MicroBudget(100, None)) == 2
    assert num_micro_batches(lengths, 1, MicroBudget(100, None)) == 3


def test_more_ranks_than_documents_leaves_shares_empty() -> None:
    cuts = pack_window(np.array([5, 9], np.int64), 4, MicroBudget(16, None), COST)
    assert sorted(len(rank[0]) for rank in cuts) == [0, 0, 1, 1]
    assert {len(rank) for rank in cuts} == {1}


def test_a_document_over_the_budget_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"batch.micro_tokens: an example of 101 tokens"):
        pack_window(np.array([5, 101], np.int64), 1, MicroBudget(100, None), COST)


def test_padding_is_counted() -> None:
    """One long and many short documents: the long one does not pad the others."""
    lengths = np.array([100, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10], np.int64)
    assert num_micro_batches(lengths, 1, MicroBudget(100, None), packed=False) == 2
    assert num_micro_batches(lengths, 1, MicroBudget(100, 4), packed=False) == 4


def test_a_window_of_a_big_cluster_is_packed_in_time() -> None:
    lengths = alpaca_like(np.random.default_rng(1), 512 * 128)
    started = time.process_time()
    cuts = pack_window(lengths, 512, MicroBudget(4096, None), COST)
    assert time.process_time() - started < 5
    assert imbalance(lengths, cuts, COST) < 0.02
