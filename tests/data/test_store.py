import numpy as np
import pytest

from burnish.data.store import ExampleStore, Part, PartWriter, index_batch, tokens_batch
from burnish.records import Example


def example(number: int, source: str = "a") -> Example:
    length = number % 5 + 2
    ids = np.arange(number, number + length, dtype=np.int32)
    weights = np.ones(length, np.float32) * 0.5
    weights[1] = 0
    return Example(source, f"{source}.jsonl:{number + 1}", ids, weights)


def assert_same(a: Example, b: Example) -> None:
    assert (a.source, a.row) == (b.source, b.row)
    np.testing.assert_array_equal(a.token_ids, b.token_ids)
    np.testing.assert_array_equal(a.weights, b.weights)


def test_in_memory_the_order_is_the_order_given():
    examples = [example(n, "ab"[n % 2]) for n in range(11)]
    store = ExampleStore.from_examples(examples)
    assert len(store) == 11 and store.source_names == ("a", "b")
    for number, given in enumerate(examples):
        assert_same(store[number], given)
    assert store.num_tokens.tolist() == [len(e.token_ids) for e in examples]
    assert store.num_supervised.tolist() == [int(e.trained.sum()) for e in examples]
    assert store.total_weight.tolist() == [float(e.weights[1:].sum()) for e in examples]
    with pytest.raises(IndexError):
        store[11]


def test_a_part_on_disk_is_what_was_written(tmp_path):
    examples = [example(n) for n in range(10_000)]
    writer = PartWriter(tmp_path)
    for start in range(0, len(examples), 700):
        batch = examples[start : start + 700]
        cuts = [(n % 3, 0) for n in range(len(batch))]
        writer.add(tokens_batch(batch), index_batch(batch, cuts, list(range(len(batch))), [0] * len(batch)))
    digest = writer.close()
    store = ExampleStore([Part.open(tmp_path)], ["a"])
    assert len(store) == len(examples) and len(digest) == 32
    for number in (0, 699, 700, 4095, 4096, 9999):
        assert_same(store[number], examples[number])
    assert Part.open(tmp_path).column("tokens_cut").tolist()[:4] == [0, 1, 2, 0]
    assert not store[3].token_ids.flags.writeable


def test_an_empty_store_has_no_examples():
    store = ExampleStore.from_examples([])
    assert len(store) == 0 and store.num_tokens.shape == (0,)


def test_a_store_may_hold_some_examples_of_a_part(tmp_path):
    examples = [example(n) for n in range(6)]
    writer = PartWriter(tmp_path)
    writer.add(tokens_batch(examples), index_batch(examples, [(0, 0)] * 6, [7 + (1 << 70)] * 6, [0] * 6))
    writer.close()
    store = ExampleStore([Part.open(tmp_path)], ["a"], np.zeros(2, np.int32), np.array([5, 1]))
    assert [e.row for e in (store[0], store[1])] == ["a.jsonl:6", "a.jsonl:2"]
    assert store.row_hashes.tolist() == [7, 7]
