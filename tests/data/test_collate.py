"""The shift to targets, packed and padded, and the stand-in of an empty share."""

import numpy as np
import pytest

from burnish.data.collate import collate
from burnish.records import NO_TARGET, Example

X = NO_TARGET


def example(tokens: list[int], weights: list[float]) -> Example:
    return Example("s", "s.jsonl:1", np.array(tokens, np.int32), np.array(weights, np.float32))


PAIR = [example([11, 12, 13, 14], [0, 0, 1, 0.5]), example([21, 22, 23], [1, 1, 0])]


def test_packed_lays_documents_end_to_end_and_never_crosses_a_border() -> None:
    batch = collate(PAIR, [7, 3], packed=True, pad_token_id=0)
    assert batch.token_ids.tolist() == [[11, 12, 13, 14, 21, 22, 23]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    # 14 does not predict 21 although 21 has a weight: it is the first token of another document.
    assert batch.targets.tolist() == [[X, 13, 14, X, 22, X, X]]
    assert batch.weights.tolist() == [[0, 1, 0.5, 0, 1, 0, 0]]
    assert batch.document_lengths.tolist() == [4, 3]
    assert batch.example_ids.tolist() == [7, 3]
    assert batch.num_tokens == 7


def test_padded_has_a_row_for_each_document() -> None:
    batch = collate(PAIR, np.array([7, 3]), packed=False, pad_token_id=99)
    assert batch.token_ids.tolist() == [[11, 12, 13, 14], [21, 22, 23, 99]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert batch.targets.tolist() == [[X, 13, 14, X], [22, X, X, X]]
    assert batch.weights.tolist() == [[0, 1, 0.5, 0], [1, 0, 0, 0]]
    assert batch.num_tokens == 7


@pytest.mark.parametrize("packed", [True, False])
def test_targets_are_the_same_set_packed_and_padded(packed: bool) -> None:
    batch = collate(PAIR, [0, 1], packed, pad_token_id=0)
    has_target = batch.targets != NO_TARGET
    assert sorted(batch.targets[has_target].tolist()) == [13, 14, 22]
    assert batch.weights.sum() == 2.5
    assert (batch.weights[~has_target] == 0).all()
    assert has_target.sum() == sum(int(e.trained.sum()) for e in PAIR)


@pytest.mark.parametrize("packed", [True, False])
def test_an_empty_share_is_a_stand_in_without_weight(packed: bool) -> None:
    batch = collate([], [], packed, pad_token_id=5)
    assert batch.token_ids.tolist() == [[5]]
    assert batch.targets.tolist() == [[NO_TARGET]]
    assert batch.weights.tolist() == [[0]]
    assert batch.document_lengths.tolist() == [1]
    assert batch.example_ids.tolist() == [-1]
    assert batch.num_tokens == 0


@pytest.mark.parametrize("packed", [True, False])
def test_one_token_has_nothing_to_predict(packed: bool) -> None:
    batch = collate([example([8], [1])], [0], packed, pad_token_id=0)
    assert batch.targets.tolist() == [[NO_TARGET]]
    assert batch.weights.sum() == 0


def test_numbers_must_match_examples() -> None:
    with pytest.raises(ValueError, match="2 examples but 1"):
        collate(PAIR, [1], packed=True, pad_token_id=0)
    with pytest.raises(ValueError, match="no tokens"):
        collate([example([], [])], [1], packed=True, pad_token_id=0)
