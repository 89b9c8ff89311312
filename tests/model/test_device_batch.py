"""Micro-batches as tensors, and rows that are filled up to sizes that are met again."""

import numpy as np
import pytest
import torch
from tiny_models import build, make_documents

from breadth.batches import collate
from burnish.data.collate import collate as collate_examples
from burnish.model.attention import can_isolate
from burnish.model.device_batch import to_device
from burnish.model.forward import SupervisedModel
from burnish.model.objective import Objective
from burnish.plan.sizes import size_met_again
from burnish.records import Example

CPU = torch.device("cpu")


def test_sizes_are_few_and_near():
    sizes = [size_met_again(n) for n in range(1, 8193)]
    assert all(size >= n for n, size in enumerate(sizes, start=1))
    assert all(size - n < max(32, n / 8) for n, size in enumerate(sizes, start=1))
    assert len({size for size in sizes if 1024 < size <= 2048}) == 8
    assert all(size_met_again(size) == size for size in sizes)


def losses(model, documents, fill_up, objective):
    model.zero_grad(set_to_none=True)
    supervised = SupervisedModel(model, can_isolate(model), objective)
    batch = to_device(collate(documents, True), CPU, fill_up)
    torch.manual_seed(0)
    loss = supervised(batch)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return batch, loss.item(), gradients, supervised.eval()(batch, per_document=True)


@pytest.mark.parametrize(
    ("family", "objective"),
    [
        ("llama", Objective()),
        ("llama", Objective(label_smoothing=0.1, z_loss=1e-3)),
        ("gemma2", Objective()),
        ("mixtral", Objective()),
        ("mixtral", Objective(router_aux_loss=0.1)),
        ("gpt2", Objective()),
    ],
)
def test_what_fills_a_row_up_changes_nothing(family, objective):
    model = build(family).train()
    plain, expected, gradients, each = losses(model, make_documents(), False, objective)
    filled, found, ours, ours_each = losses(model, make_documents(), True, objective)
    assert filled.token_ids.shape[1] == size_met_again(plain.token_ids.shape[1]) and filled.num_filled > 0
    assert len(filled.supervised) == size_met_again(len(plain.supervised)) > len(plain.supervised)
    assert found == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(ours_each, each, rtol=1e-5, atol=1e-6)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


def test_shared_beginnings_are_filled_up_too():
    begin = np.arange(1, 41, dtype=np.int32)
    ends = [np.arange(50, 57), np.arange(60, 71), np.arange(80, 83)]
    documents = [np.concatenate([begin, end]).astype(np.int32) for end in ends]
    examples = [Example("rows", str(i), d, np.ones(len(d), np.float32)) for i, d in enumerate(documents)]
    micro_batch = collate_examples(examples, np.arange(3), True, 0, share_prefixes=True)
    assert micro_batch.shared is not None
    model = build("llama").train()
    supervised = SupervisedModel(model, can_isolate(model))
    expected = supervised(to_device(micro_batch, CPU)).item()
    batch = to_device(micro_batch, CPU, fill_up=True)
    assert batch.num_filled > 0 and supervised(batch).item() == pytest.approx(expected, rel=1e-6)


def test_a_part_of_a_row_and_padded_rows_are_left_as_they_are():
    whole = collate(make_documents(), True)
    columns = whole.token_ids.shape[1] - 3
    part = whole.__class__(
        **{
            **whole.__dict__,
            **{
                name: getattr(whole, name)[:, :columns]
                for name in ("token_ids", "position_ids", "targets", "weights")
            },
        }
    )
    assert to_device(part, CPU, fill_up=True).num_filled == 0
    rows = collate(make_documents(), False)
    padded = to_device(rows, CPU, fill_up=True)
    assert padded.num_filled == 0 and padded.token_ids.shape == rows.token_ids.shape


def test_nothing_supervised_stays_nothing():
    documents = [(tokens, np.zeros_like(weights)) for tokens, weights in make_documents()]
    batch = to_device(collate(documents, True), CPU, fill_up=True)
    assert len(batch.supervised) == len(batch.targets) == len(batch.weights) == 0
