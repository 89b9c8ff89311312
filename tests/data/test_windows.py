"""What a step sees depends on data, seed, epoch and step; never on how it is cut."""

import itertools
from collections import Counter

import numpy as np
import pytest
from counts_on_the_spot import Counts
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.config.schema import BatchConfig, DataConfig, TrainConfig
from burnish.data.windows import WindowPlan, eval_cuts, order, plan_windows, shares
from burnish.errors import ConfigError, DataError


def counts(num: int, sizes: tuple[int, ...] | None = None, longest: int = 200) -> Counts:
    rng = np.random.default_rng(num)
    tokens = rng.integers(2, longest, num)
    sizes = sizes or (num,)
    source_ids = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    return Counts(tokens, tokens * 0.5, tokens - 1, source_ids, tuple(f"s{i}" for i in range(len(sizes))))


def plan(
    arrays: Counts,
    *,
    batch: dict | None = None,
    train: dict | None = None,
    world_size: int = 1,
    packed: bool = True,
    **data,
) -> WindowPlan:
    return plan_windows(
        arrays,
        DataConfig.model_validate({"train": [f"{name}.jsonl" for name in arrays.source_names], **data}),
        BatchConfig.model_validate(batch or {}),
        TrainConfig.model_validate(train or {}),
        world_size,
        packed,
    )


def everything(windows: WindowPlan) -> list:
    return [windows.window(step) for step in range(1, windows.num_steps + 1)]


def test_order_is_a_fixed_permutation() -> None:
    """Written out, because a changed order would silently break every resumed run."""
    assert order(42, 0, 8).tolist() == [7, 1, 6, 4, 3, 5, 0, 2]
    assert sorted(order(7, 3, 1000).tolist()) == list(range(1000))
    assert order(7, 3, 1000).tolist() != order(7, 4, 1000).tolist() != order(8, 4, 1000).tolist()


def test_every_example_once_an_epoch_and_the_last_window_is_smaller() -> None:
    windows = plan(counts(1000), batch={"global_examples": 128}, train={"epochs": 2})
    assert (windows.steps_per_epoch, windows.num_steps) == (8, 16)
    seen = everything(windows)
    assert [len(w.example_ids) for w in seen[:8]] == [128] * 7 + [1000 - 7 * 128]
    for epoch in range(2):
        ids = np.concatenate([w.example_ids for w in seen if w.epoch == epoch])
        assert sorted(ids.tolist()) == list(range(1000))
    assert windows.epochs_done(0) == 0
    assert windows.epochs_done(4) == 0.512
    assert windows.epochs_done(16) == 2


def test_default_is_128_examples() -> None:
    assert len(plan(counts(1000)).window(1).example_ids) == 128


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from([{}, {"micro_tokens": 4096}, {"micro_tokens": 16384}, {"micro_examples": 3}]),
    st.sampled_from([{"global_examples": 32}, {"global_tokens": 5000}]),
    st.integers(0, 5),
)
def test_machine_changes_only_cuts(world_size, packed, micro, whole, seed) -> None:
    arrays = counts(300)
    train = {"epochs": 1.5, "seed": seed}
    plain = plan(arrays, batch=whole, train=train)
    other = plan(arrays, batch=whole | micro, train=train, world_size=world_size, packed=packed)
    assert other.num_steps == plain.num_steps
    for a, b in zip(everything(plain), everything(other), strict=True):
        assert a.example_ids.tolist() == b.example_ids.tolist()
        assert (a.step, a.epoch, a.num_tokens, a.total_weight) == (
            b.step,
            b.epoch,
            b.num_tokens,
            b.total_weight,
        )
        dealt = np.concatenate([cut for rank in b.cuts for cut in rank])
        assert sorted(dealt.tolist()) == sorted(b.example_ids.tolist())
        assert len(b.cuts) == world_size
        assert len({len(rank) for rank in b.cuts}) == 1


def test_random_access_gives_what_going_through_gives() -> None:
    windows = plan(counts(300), batch={"global_examples": 32}, train={"epochs": 3})
    forward = [w.example_ids.tolist() for w in everything(windows)]
    for step in (25, 3, 30, 11, 1):
        assert windows.window(step).example_ids.tolist() == forward[step - 1]
    for outside in (0, windows.num_steps + 1):
        with pytest.raises(IndexError):
            windows.window(outside)


def test_sums_are_the_windows_own() -> None:
    arrays = counts(300)
    window = plan(arrays, batch={"global_examples": 32}).window(2)
    assert window.num_tokens == arrays.num_tokens[window.example_ids].sum()
    assert window.num_supervised_tokens == arrays.num_supervised[window.example_ids].sum()
    assert window.total_weight == arrays.total_weight[window.example_ids].sum()


def test_global_tokens_fills_windows_up() -> None:
    arrays = counts(1000)
    windows = plan(arrays, batch={"global_tokens": 3000}, train={"epochs": 2})
    seen = everything(windows)
    for w, after in itertools.pairwise(seen):
        assert w.num_tokens <= 3000
        if after.epoch == w.epoch:  # the next example would not have fitted
            assert w.num_tokens + arrays.num_tokens[after.example_ids[0]] > 3000
    assert sorted(np.concatenate([w.example_ids for w in seen if w.epoch == 1]).tolist()) == list(range(1000))


def test_an_example_over_global_tokens_is_a_window_of_its_own() -> None:
    assert plan(counts(50), batch={"global_tokens": 1}).num_steps == 50


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps", "examples"),
    [
        (0.5, None, 2, 50),
        (1.1, None, 5, 110),
        (2, 3, 3, 96),
        (1, 6, 6, 164),  # max_steps wins: one epoch is 4 steps
        (0.001, None, 1, 1),
        (3, 4, 4, 100),
    ],
)
def test_fractions_and_limits(epochs, max_steps, steps, examples) -> None:
    windows = plan(
        counts(100), batch={"global_examples": 32}, train={"epochs": epochs, "max_steps": max_steps}
    )
    assert windows.num_steps == steps
    assert sum(len(w.example_ids) for w in everything(windows)) == examples


def test_shares_are_exact_by_largest_remainder() -> None:
    assert shares([1.0, 1.0, 1.0], 10) == [4, 3, 3]
    assert shares([0.7, 0.2, 0.1], 1000) == [700, 200, 100]
    assert shares([5.0, 1.0], 7) == [6, 1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 10_000))
def test_shares_sum_and_stay_within_one(weights, total) -> None:
    parts = shares(weights, total)
    assert sum(parts) == total
    assert all(abs(p - total * w / sum(weights)) < 1 + 1e-6 for p, w in zip(parts, weights, strict=True))


def test_weighted_mix_reuses_and_cuts() -> None:
    """Weights 3 : 1 over 100 + 300 examples: the small source three times, a third of the large one."""
    arrays = counts(400, (100, 300))
    sources = [{"path": "a", "weight": 3}, {"path": "b", "weight": 1}]
    windows = plan_windows(
        arrays,
        DataConfig.model_validate({"train": sources, "mix": "weighted"}),
        BatchConfig(global_examples=64),
        TrainConfig(epochs=3),
        1,
        True,
    )
    per_epoch = [np.sort(windows.epoch_order(epoch)) for epoch in range(3)]
    for ids in per_epoch:
        tally = Counter(ids.tolist())
        assert all(tally[i] == 3 for i in range(100))
        assert sum(tally[i] for i in range(100, 400)) == 100
        assert max(tally[i] for i in range(100, 400)) == 1
    # Three thirds make a whole pass: nothing is seen twice before everything was seen once.
    assert sorted(np.concatenate([ids[ids >= 100] for ids in per_epoch]).tolist()) == list(range(100, 400))


def test_a_weighted_source_without_examples_is_an_error() -> None:
    with pytest.raises(DataError, match=r"s1.jsonl has a weight but no usable example"):
        plan(counts(5, (5, 0)), mix="weighted")


def test_no_examples_is_an_error() -> None:
    with pytest.raises(DataError, match="no example"):
        plan(counts(0))


def test_an_example_over_the_micro_budget_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"batch\.micro_tokens"):
        plan(counts(100), batch={"micro_tokens": 64})


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("num", [0, 1, 7, 300])
@pytest.mark.parametrize("batch", [{}, {"micro_tokens": 256}, {"micro_examples": 4}])
def test_evaluation_takes_every_example_once(num, packed, batch) -> None:
    cuts = eval_cuts(counts(num), BatchConfig.model_validate(batch), 4, packed)
    assert len(cuts) == 4
    assert len({len(rank) for rank in cuts}) == 1
    assert len(cuts[0]) >= 1
    ids = np.concatenate([cut for rank in cuts for cut in rank])
    assert sorted(ids.tolist()) == list(range(num))
