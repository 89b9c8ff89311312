"""A plan's counts are the run's: compared with every window cut for real. And planning is fast."""

import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from counts_on_the_spot import Counts
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.config.schema import BatchConfig, DataConfig, TrainConfig
from burnish.data.count import count_windows
from burnish.data.windows import plan_windows
from burnish.errors import ConfigError


def counts(num: int, seed: int = 0, longest: int = 2048) -> Counts:
    rng = np.random.default_rng(seed)
    tokens = np.clip(rng.lognormal(4.8, 0.7, num), 2, longest).astype(np.int64)
    source_ids = (np.arange(num) % 3 == 0).astype(np.int32)
    return Counts(tokens, tokens * 0.5, tokens - 1, source_ids, ("a", "b"))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(3, 200),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from([{}, {"micro_tokens": 300}, {"micro_tokens": 5000}, {"micro_examples": 3}]),
    st.sampled_from([{}, {"global_examples": 7}, {"global_tokens": 900}]),
    st.sampled_from([{}, {"epochs": 2.3}, {"epochs": 0.4}, {"max_steps": 2}]),
    st.sampled_from(["concat", "weighted"]),
)
def test_counts_equal_the_sums_over_all_windows(num, ranks, packed, micro, whole, train, mix) -> None:
    arrays = counts(num, num, longest=300)
    data = DataConfig.model_validate(
        {"train": [{"path": "a", "weight": 0.3}, {"path": "b", "weight": 0.5}], "mix": mix}
    )
    batch = BatchConfig.model_validate(micro | whole)
    plan = plan_windows(arrays, data, batch, TrainConfig.model_validate(train), ranks, packed)
    planned = count_windows(plan, arrays)
    run = [plan.window(step) for step in range(1, plan.num_steps + 1)]
    micro_batches = [len(w.cuts[0]) for w in run]
    assert planned.num_steps == len(run)
    assert planned.num_examples == sum(len(w.example_ids) for w in run)
    assert planned.num_tokens == sum(w.num_tokens for w in run)
    assert planned.num_supervised_tokens == sum(w.num_supervised_tokens for w in run)
    assert planned.micro_batches_total == sum(micro_batches)
    assert (planned.micro_batches_min, planned.micro_batches_max) == (min(micro_batches), max(micro_batches))
    assert planned.max_window_tokens == max(w.num_tokens for w in run)
    held = np.concatenate([w.example_ids for w in run])
    assert planned.max_example_tokens == arrays.num_tokens[held].max()
    assert (
        list(planned.examples_per_source.values())
        == np.bincount(arrays.source_ids[held], minlength=2).tolist()
    )
    for w in run:
        for cut in (cut for rank in w.cuts for cut in rank if len(cut)):
            lengths = arrays.num_tokens[cut]
            tokens = lengths.sum() if packed else len(lengths) * lengths.max()
            assert tokens <= planned.max_micro_tokens


@pytest.mark.parametrize(("ranks", "global_examples"), [(8, 256), (512, 32 * 1024)])
def test_a_million_examples_are_planned_in_seconds(ranks, global_examples) -> None:
    """A tenth of the ten million that are promised in 30 s and 1 GiB."""
    arrays = counts(1_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    data = DataConfig.model_validate({"train": ["a", "b"]})
    plan = plan_windows(
        arrays, data, BatchConfig(global_examples=global_examples), TrainConfig(), ranks, True
    )
    planned = count_windows(plan, arrays)
    assert time.process_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB
    assert planned.least_micro_batches_share > 0.99
    assert planned.imbalance_mean < 0.01
    assert planned.imbalance_max < 0.02


def test_512_ranks_take_every_example_once_in_equal_micro_batches() -> None:
    """The simulation of a cluster, on a twentieth of its data so that the test stays short."""
    arrays = counts(500_000, seed=3)
    data = DataConfig.model_validate({"train": ["a", "b"]})
    plan = plan_windows(arrays, data, BatchConfig(global_examples=65_536), TrainConfig(), 512, True)
    seen = np.zeros(len(arrays.num_tokens), np.int64)
    for step in range(1, plan.num_steps + 1):
        window = plan.window(step)
        assert len(window.cuts) == 512
        assert len({len(rank) for rank in window.cuts}) == 1
        for rank in window.cuts:
            for cut in rank:
                seen[cut] += 1
                assert arrays.num_tokens[cut].sum() <= 4096
    assert (seen == 1).all()


@pytest.mark.slow
def test_ten_million_examples_in_thirty_seconds_and_a_gibibyte() -> None:
    """In a process of its own, for its peak; the arrays that describe the examples are counted too."""
    code = f"""
import sys, time; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_count import *
arrays = counts(10_000_000)
started = time.perf_counter()
data, batch = DataConfig(train=["a", "b"]), BatchConfig(global_examples=256)
plan = plan_windows(arrays, data, batch, TrainConfig(), 8, True)
planned = count_windows(plan, arrays)
assert time.perf_counter() - started < 30
# Not ru_maxrss, which is the parent's where that was larger.
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:"))
assert peak < 2**20
assert planned.num_examples == 10_000_000 and planned.least_micro_batches_share > 0.99
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("mix", ["concat", "weighted"])
def test_very_many_epochs_are_counted_on_the_first(mix, monkeypatch) -> None:
    arrays = counts(50, 1, longest=300)
    sources = (
        [{"path": "a", "weight": 0.3}, {"path": "b", "weight": 0.5}] if mix == "weighted" else ["a", "b"]
    )
    data = DataConfig.model_validate({"train": sources, "mix": mix})
    plan = plan_windows(arrays, data, BatchConfig(global_examples=7), TrainConfig(epochs=200.5), 2, True)
    exact = count_windows(plan, arrays)
    assert exact.num_counted_steps is None
    monkeypatch.setattr("burnish.data.count._COUNTED_EXAMPLES", 100 * 50)
    scaled = count_windows(plan, arrays)
    assert scaled.num_counted_steps == 100 * plan.steps_per_epoch
    assert (scaled.num_steps, scaled.num_examples) == (exact.num_steps, exact.num_examples)
    assert sum(scaled.examples_per_source.values()) == exact.num_examples
    for name in ("num_tokens", "num_supervised_tokens", "micro_batches_total", "sum_squared_tokens"):
        assert getattr(scaled, name) == pytest.approx(getattr(exact, name), rel=0.01)
    whole = plan_windows(arrays, data, BatchConfig(global_examples=7), TrainConfig(epochs=200), 2, True)
    if mix == "concat":
        assert count_windows(whole, arrays).num_tokens == 200 * arrays.num_tokens.sum()


@pytest.mark.parametrize(
    ("whole", "train"),
    [
        ({"global_examples": 16}, {"epochs": 30_000}),
        ({"global_tokens": 2000}, {"epochs": 20_000}),
        ({"global_examples": 16}, {"max_steps": 10**9}),
    ],
)
def test_absurdly_long_runs_are_answered_in_seconds(whole, train) -> None:
    arrays = counts(100)
    data, batch = DataConfig.model_validate({"train": ["a", "b"]}), BatchConfig.model_validate(whole)
    started = time.process_time()
    try:
        plan = plan_windows(arrays, data, batch, TrainConfig.model_validate(train), 1, True)
        assert count_windows(plan, arrays).num_steps == plan.num_steps
    except ConfigError as error:
        assert train == {"max_steps": 10**9}
        assert "train.max_steps: is 1,000,000,000: more than 100,000 passes over the 100" in str(error)
    assert time.process_time() - started < 30


def test_more_steps_than_anybody_takes_are_refused() -> None:
    arrays = counts(2000)
    data, batch = DataConfig.model_validate({"train": ["a", "b"]}), BatchConfig(global_examples=1)
    with pytest.raises(ConfigError, match=r"train.epochs: is 60,000(\.0)?: more than 100,000,000 steps"):
        plan_windows(arrays, data, batch, TrainConfig(epochs=60_000), 1, True)
