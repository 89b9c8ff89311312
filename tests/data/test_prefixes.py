"""Examples that begin alike: found, laid out as a tree, and packed so that they share."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.config.schema import BatchConfig, Config, DataConfig, TrainConfig
from burnish.data.collate import collate
from burnish.data.count import count_windows
from burnish.data.prefix_tree import common_of_some, grow, sort_by_tokens
from burnish.data.prefixes import Prefixes
from burnish.data.shared_packing import MIN_GAIN, Alike, pack_alike
from burnish.data.store import ExampleStore
from burnish.data.windows import plan_windows
from burnish.errors import ConfigError
from burnish.plan import CostModel, MicroBudget, unshared, unsuited
from burnish.records import NO_TARGET, Example

COST = CostModel(per_token_squared=1e-3)


def documents(seed: int, num: int) -> list[np.ndarray]:
    """Beginnings of beginnings: every document goes on from a part of another, or from nothing, or is
    another once more (a blend draws an example of a small source several times)."""
    rng = np.random.default_rng(seed)
    made: list[np.ndarray] = []
    for _ in range(num):
        if made and rng.random() < 0.2:
            made.append(made[rng.integers(len(made))])
            continue
        above = made[rng.integers(len(made))] if made and rng.random() < 0.8 else np.zeros(0, np.int32)
        kept = above[: int(rng.integers(0, len(above) + 1))] if rng.random() < 0.7 else above
        more = rng.integers(0, 3, int(rng.integers(0, 60))).astype(np.int32)
        made.append(np.concatenate([kept, more, [1]])[:200].astype(np.int32))
    return made


def in_common(one: np.ndarray, other: np.ndarray) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


cases = st.tuples(st.integers(0, 10_000), st.integers(1, 25))


@settings(max_examples=60, deadline=None)
@given(cases)
def test_sorted_neighbours_tell_what_any_two_have_in_common(case) -> None:
    made = documents(*case)
    order, common = sort_by_tokens(made)
    assert sorted(order.tolist()) == list(range(len(made)))
    chosen = np.flatnonzero(np.random.default_rng(case[0]).random(len(made)) < 0.5)
    some = common_of_some(common, chosen) if len(chosen) else np.zeros(0)
    for i in range(1, len(chosen)):
        assert some[i] == in_common(made[order[chosen[i - 1]]], made[order[chosen[i]]])


@settings(max_examples=60, deadline=None)
@given(cases)
def test_a_tree_holds_every_document_once(case) -> None:
    made = documents(*case)
    order, common = sort_by_tokens(made)
    made = [made[i] for i in order]
    tree = grow([len(d) for d in made], common.tolist())
    row = np.concatenate(
        [made[d][a : a + n] for d, a, n in zip(tree.document, tree.first, tree.size, strict=True)]
    )
    assert len(row) == tree.num_tokens
    for number, document in enumerate(made):
        assert (row[tree.columns(number)] == document).all()
    # What is shared is at least 32 tokens long.
    assert (tree.size[np.unique(tree.parent[tree.parent >= 0])] >= 32).all()
    apart = sum(len(d) for d in made)
    begins, ends = tree.begins(), tree.ends()
    for segment, above in enumerate(tree.parent):
        if above >= 0:
            assert begins[above] + tree.size[above] <= begins[segment] < ends[segment] <= ends[above]
    assert tree.is_shared == (tree.num_tokens < apart)


def test_squares_of_a_tree_are_those_of_its_documents_less_what_is_shared() -> None:
    tree = grow([40, 40], [0, 36])
    assert tree.size.tolist() == [36, 4, 4]
    assert tree.squares() == 2 * 40**2 - 36**2
    assert grow([40], [0]).squares() == 40**2


def test_a_shared_row_by_hand() -> None:
    begin = list(range(100, 132))
    one = Example(
        "s", "s:1", np.array([*begin, 1, 2], np.int32), np.r_[np.zeros(31), 1, 1, 1].astype(np.float32)
    )
    two = Example("s", "s:2", np.array([*begin, 5], np.int32), np.r_[np.zeros(31), 0.5, 1].astype(np.float32))
    batch = collate([two, one], [7, 3], True, 0, share_prefixes=True)
    assert batch.token_ids.tolist() == [[*begin, 1, 2, 5]]
    assert batch.position_ids.tolist() == [[*range(32), 32, 33, 32]]
    assert batch.example_ids.tolist() == [3, 7] and batch.document_lengths.tolist() == [34, 33]
    assert batch.num_tokens == 67
    assert (batch.targets == NO_TARGET).all()
    shared = batch.shared
    assert shared is not None
    # 131 for both; then 1 or 5 behind the same position; then 2.
    assert shared.columns.tolist() == [30, 31, 31, 32]
    assert shared.targets.tolist() == [131, 1, 5, 2]
    assert shared.weights.tolist() == [1.5, 1, 1, 1]
    assert shared.segments.tolist() == [[0, 32, 34], [32, 34, 35], [35, 34, 35]]


def test_a_row_that_shares_nothing_is_laid_out_as_ever() -> None:
    examples = [Example("s", "s", np.full(40, i, np.int32), np.ones(40, np.float32)) for i in range(3)]
    assert collate(examples, [0, 1, 2], True, 0, share_prefixes=True).shared is None


@settings(max_examples=60, deadline=None)
@given(cases, st.integers(1, 5), st.sampled_from([200, 333, 1000]))
def test_micro_batches_share_within_their_budget(case, num_ranks, budget) -> None:
    made = documents(*case)
    lengths = np.array([len(d) for d in made], np.int64)
    alike = Alike(*sort_by_tokens(made))
    found = pack_alike(lengths, alike, num_ranks, MicroBudget(budget, None), COST)
    if found is None:
        return
    assert len(found.cuts) == num_ranks and len({len(rank) for rank in found.cuts}) == 1
    held = np.concatenate([micro for rank in found.cuts for micro in rank])
    assert sorted(held.tolist()) == list(range(len(made)))
    computed = 0
    for micro in (m for rank in found.cuts for m in rank if len(m)):
        examples = [Example("s", "s", made[i], np.ones(len(made[i]), np.float32)) for i in micro]
        columns = collate(examples, micro, True, 0, share_prefixes=True).token_ids.shape[1]
        assert columns <= budget
        computed += columns
    assert computed == found.num_computed_tokens < lengths.sum()


@pytest.mark.parametrize("num", [2, 3, 8, 20])
@pytest.mark.parametrize("length", [40, 120, 190])
def test_equal_documents_are_computed_once_in_each_forward(num: int, length: int) -> None:
    """Those that end where others end add no token, and go wherever there is room."""
    lengths = np.full(num, length)
    alike = Alike(*sort_by_tokens([np.arange(length, dtype=np.int32)] * num))
    for num_ranks in (1, 2, 3):
        found = pack_alike(lengths, alike, num_ranks, MicroBudget(200, None), COST)
        if num_ranks > num // 2:  # too few to go round: apart they are as fast
            continue
        assert found is not None
        assert sorted(i for rank in found.cuts for micro in rank for i in micro) == list(range(num))
        assert found.num_computed_tokens <= length * num_ranks


def test_what_shares_less_without_others_keeps_to_the_budget() -> None:
    """Twelve have 80 tokens in common, 60 with another and 40 with a third: all of them share 40 and then 80,
    but those without the third share 60 and no more."""
    begin = np.arange(1000, 1080, dtype=np.int32)
    more = [np.full(10, number, np.int32) for number in range(12)]
    made = [np.concatenate([begin[:size], np.full(20, size, np.int32)]) for size in (40, 60)]
    made += [np.concatenate([begin, tail]) for tail in more]
    lengths = np.array([len(document) for document in made])
    order, common = sort_by_tokens(made)
    without_third = np.flatnonzero(order != 0)
    sizes = [
        grow(lengths[order[some]].tolist(), common_of_some(common, some).tolist()).num_tokens
        for some in (np.arange(14), without_third)
    ]
    assert sizes[0] < sizes[1] + 20, "of fewer documents, but larger"
    found = pack_alike(lengths, Alike(order, common), 1, MicroBudget(190, None), COST)
    for micro in found.cuts[0] if found else ():
        examples = [Example("s", "s", made[i], np.ones(len(made[i]), np.float32)) for i in micro]
        assert collate(examples, micro, True, 0, share_prefixes=True).token_ids.shape[1] <= 190


@settings(max_examples=40, deadline=None)
@given(cases, st.integers(1, 3), st.sampled_from(["concat", "weighted"]), st.sampled_from([3, 20, 60]))
def test_every_window_is_computed_as_planned(case, num_ranks, mix, num) -> None:
    made = documents(*case)
    examples = [
        Example(f"s{i % 2}", str(i), tokens, np.ones(len(tokens), np.float32))
        for i, tokens in enumerate(made)
    ]
    store = ExampleStore.from_examples(examples)
    sources = [
        {"path": name, "weight": weight} for name, weight in zip(store.source_names, (1, 5), strict=False)
    ]
    data = DataConfig.model_validate({"train": sources, "mix": mix, "max_tokens": 200})
    batch = BatchConfig(global_examples=num, micro_tokens=250)
    plan = plan_windows(
        store, data, batch, TrainConfig(epochs=2), num_ranks, True, COST, prefixes=Prefixes(store)
    )
    for window in map(plan.window, range(1, plan.num_steps + 1)):
        shares = window.num_computed_tokens is not None
        computed = 0
        for micro in (micro for rank in window.cuts for micro in rank if len(micro)):
            row = collate([store[int(i)] for i in micro], micro, True, 0, share_prefixes=shares)
            assert row.token_ids.shape[1] <= 250
            computed += row.token_ids.shape[1]
        assert computed == (window.num_computed_tokens if shares else window.num_tokens)
        held = np.concatenate([micro for rank in window.cuts for micro in rank])
        assert sorted(held.tolist()) == sorted(window.example_ids.tolist())


def test_an_example_that_a_blend_draws_again_is_shared_as_planned() -> None:
    rng = np.random.default_rng(0)
    examples = [
        Example(source, f"{source}:{i}", rng.integers(3, 90, 100).astype(np.int32), np.ones(100, np.float32))
        for source, num in (("small", 1), ("large", 9))
        for i in range(num)
    ]
    store = ExampleStore.from_examples(examples)
    data = DataConfig.model_validate(
        {"train": [{"path": "small"}, {"path": "large"}], "mix": "weighted", "max_tokens": 100}
    )
    batch = BatchConfig(global_examples=10, micro_tokens=1024)
    plan = plan_windows(store, data, batch, TrainConfig(), 1, True, prefixes=Prefixes(store))
    window = plan.window(1)
    assert (window.example_ids == 0).sum() == 5
    rows = [
        collate([store[int(i)] for i in micro], micro, True, 0, share_prefixes=True)
        for micro in window.cuts[0]
    ]
    assert window.num_computed_tokens == sum(row.token_ids.shape[1] for row in rows) == 600


def four_answers(num_prompts: int = 8, prompt: int = 140, answer: int = 60) -> ExampleStore:
    rng = np.random.default_rng(0)
    examples = []
    for _ in range(num_prompts):
        begin = rng.integers(3, 90, prompt)
        for i in range(4):
            tokens = np.concatenate([begin, rng.integers(3, 90, answer)]).astype(np.int32)
            weights = (np.arange(len(tokens)) >= prompt).astype(np.float32)
            examples.append(Example("s", f"s:{i}", tokens, weights))
    return ExampleStore.from_examples(examples)


def windows_of(store, prefixes, ranks=1, num=32, micro=1024, max_steps=None):
    data = DataConfig.model_validate({"train": "x"})
    batch = BatchConfig(global_examples=num, micro_tokens=micro)
    train = TrainConfig(epochs=2, max_steps=max_steps)
    return plan_windows(store, data, batch, train, ranks, True, prefixes=prefixes)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_windows_stay_the_same_and_cost_less(ranks) -> None:
    store = four_answers()
    shared, apart = (windows_of(store, p, ranks).window(1) for p in (Prefixes(store), None))
    assert replace(shared, cuts=(), num_computed_tokens=None) == replace(
        apart, cuts=(), example_ids=shared.example_ids
    )
    assert (shared.example_ids == apart.example_ids).all()
    assert shared.num_computed_tokens == 8 * (140 + 4 * 60)
    again = windows_of(store, Prefixes(store), ranks).window(1)
    assert all(
        (a == b).all()
        for x, y in zip(shared.cuts, again.cuts, strict=True)
        for a, b in zip(x, y, strict=True)
    )


class Unread:
    """A store whose tokens must not be looked at."""

    def __init__(self, store: ExampleStore) -> None:
        self.num_tokens, self.prefix_hashes = store.num_tokens, store.prefix_hashes

    def __getitem__(self, number: int) -> Example:
        raise AssertionError(f"the tokens of example {number} were read")


def test_no_token_is_read_where_nothing_is_shared() -> None:
    rng = np.random.default_rng(0)
    made = [rng.integers(0, 99, int(n)).astype(np.int32) for n in rng.integers(2, 200, 60)]
    store = ExampleStore.from_examples([Example("s", "s", d, np.ones(len(d), np.float32)) for d in made])
    shared, apart = (windows_of(store, p, 2, num=16) for p in (Prefixes(Unread(store)), None))
    for step in range(1, shared.num_steps + 1):
        one, other = shared.window(step), apart.window(step)
        assert one.num_computed_tokens is None
        pairs = zip(one.cuts, other.cuts, strict=True)
        assert all((a == b).all() for x, y in pairs for a, b in zip(x, y, strict=True))
    assert count_windows(shared, store) == count_windows(apart, store)


def test_little_in_common_is_not_worth_it() -> None:
    store = four_answers(prompt=33, answer=400)
    assert MIN_GAIN > 3 * 33 / (4 * 433)
    assert windows_of(store, Prefixes(store)).window(1).num_computed_tokens is None


@pytest.mark.parametrize("num", [4, 20, 32])
def test_the_plan_counts_what_windows_compute(num, monkeypatch) -> None:
    store = four_answers()
    plan = windows_of(store, Prefixes(store), ranks=2, num=num)
    run = [plan.window(step) for step in range(1, plan.num_steps + 1)]
    counts = count_windows(plan, store)
    computed = [w.num_tokens if w.num_computed_tokens is None else w.num_computed_tokens for w in run]
    assert (counts.num_computed_tokens or counts.num_tokens) == sum(computed)
    assert counts.num_tokens == sum(w.num_tokens for w in run)
    assert counts.micro_batches_total == sum(len(w.cuts[0]) for w in run)
    assert counts.micro_batches_max == max(len(w.cuts[0]) for w in run)
    if num == 4:
        return  # two windows cannot stand for those few that share
    # With a sample of the windows it is near.
    monkeypatch.setattr("burnish.data.count._SHARED_WINDOWS", 2)
    near = count_windows(plan, store)
    assert near.num_computed_tokens == pytest.approx(counts.num_computed_tokens, rel=0.15)
    assert near.num_computed_windows <= 2


def config(**changes) -> Config:
    values = {"model": {"path": "m"}, "data": {"train": "x"}, "output_dir": "out"}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section] = {**values.get(section, {}), name: value}
    return Config.model_validate(values)


@pytest.mark.parametrize(
    "changes",
    [
        {"data__packing": "off"},
        {"model__attention": "sdpa"},
        {"batch__micro_examples": 4},
        {"engine__sequence_parallel": 2},
        {"train__neftune_alpha": 5.0},
        {"train__router_aux_loss": "auto"},
        {"adapter__dropout": 0.1},
    ],
)
def test_what_tells_examples_apart_shares_nothing(changes) -> None:
    assert unshared(config(**changes), "cpu", None) is not None
    with pytest.raises(ConfigError, match=r"share_prefix"):
        unshared(config(**changes, data__share_prefix="on"), "cpu", None)


def test_auto_shares_on_a_cpu_and_on_shares_everywhere() -> None:
    assert unshared(config(), "cpu", None) is None
    assert "CPU only" in str(unshared(config(), "cuda", None))
    assert unshared(config(data__share_prefix="on"), "cuda", None) is None
    assert unshared(config(data__share_prefix="off"), "cpu", None) is not None
    assert unshared(config(), "cpu", "its layers mix") == "its layers mix"


def test_models_that_draw_or_cap_or_look_back_a_little_share_nothing() -> None:
    plain = {"hidden_size": 8, "attention_dropout": 0.0, "summary_first_dropout": 0.1, "sliding_window": None}
    assert unsuited(plain, 4096) is None
    assert "attn_pdrop" in str(unsuited({**plain, "attn_pdrop": 0.1}, 4096))
    assert "caps" in str(unsuited({"text_config": {"attn_logit_softcapping": 50.0}}, 4096))
    assert "window of 512" in str(unsuited({"sliding_window": 512}, 4096))
    assert unsuited({"sliding_window": 4096}, 4096) is None
    assert unsuited({"sliding_window": 512, "use_sliding_window": False}, 4096) is None
