"""The supervised head alone: value, gradients, chunks, dtypes, and what must not be computed."""

import weakref

import pytest
import torch
from torch.nn import functional

from burnish.model import head as head_module
from burnish.model.head import HeadShape, supervised_loss, token_nll

SHAPES = [HeadShape(), HeadShape(scale=0.25), HeadShape(softcap=3.0), HeadShape(scale=0.5, softcap=2.0)]


def problem(num_targets=37, width=16, vocabulary=53, dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_targets, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    offset = torch.randn(vocabulary, generator=generator).to(dtype).requires_grad_() if bias else None
    targets = torch.randint(vocabulary, (num_targets,), generator=generator)
    weights = torch.rand(num_targets, generator=generator)
    return hidden, weight, offset, targets, weights


def plain(hidden, weight, bias, targets, weights, shape):
    logits = functional.linear(hidden, weight, bias).float() * shape.scale
    if shape.softcap is not None:
        logits = shape.softcap * torch.tanh(logits / shape.softcap)
    return (functional.cross_entropy(logits, targets, reduction="none") * weights).sum()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [8, 1024])
def test_value_and_gradients(monkeypatch, shape, bias, rows):
    monkeypatch.setattr(head_module, "CHUNK_ROWS", rows)
    monkeypatch.setattr(head_module, "BLOCK_BYTES_CPU", 3 * 4 * 53)
    inputs = problem(bias=bias)
    leaves = [t for t in inputs[:3] if t is not None]
    expected = torch.autograd.grad(plain(*inputs, shape) * 3.0, leaves)
    loss = supervised_loss(*inputs, shape)
    torch.testing.assert_close(loss, plain(*inputs, shape), rtol=1e-6, atol=0)
    for ours, theirs in zip(torch.autograd.grad(loss * 3.0, leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    nll = token_nll(*inputs[:4], shape)
    torch.testing.assert_close((nll * inputs[4]).sum(), plain(*inputs, shape), rtol=1e-6, atol=0)


def test_nothing_supervised_still_touches_the_head():
    hidden, weight, bias, targets, weights = problem(num_targets=0)
    loss = supervised_loss(hidden, weight, bias, targets, weights, HeadShape())
    loss.backward()
    assert loss.item() == 0.0
    assert weight.grad is not None and not weight.grad.any()
    assert bias.grad is not None and not bias.grad.any()
    assert hidden.grad is not None and hidden.grad.shape == (0, 16)


def test_one_chunk_of_logits_at_a_time(monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_ROWS", 8)
    inner, chunks, living = head_module._Work.nll_and_gradient, [], []

    def remembered(*arguments):
        living.append(sum(chunk() is not None for chunk in chunks))
        logits = inner(*arguments)
        chunks.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr(head_module._Work, "nll_and_gradient", remembered)
    supervised_loss(*problem(), HeadShape())
    assert living == [0, 0, 0, 0, 0]


def test_frozen_parts_get_no_gradient():
    hidden, weight, bias, targets, weights = problem()
    (expected,) = torch.autograd.grad(plain(hidden, weight, bias, targets, weights, HeadShape()), hidden)
    loss = supervised_loss(hidden, weight.detach(), bias.detach(), targets, weights, HeadShape())
    loss.backward()
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-5, atol=1e-6)
    frozen = supervised_loss(hidden.detach(), weight, None, targets, weights, HeadShape())
    frozen.backward()
    assert weight.grad is not None
    nothing = supervised_loss(hidden.detach(), weight.detach(), None, targets, weights, HeadShape())
    assert not nothing.requires_grad


def test_the_second_backward_is_refused():
    inputs = problem()
    loss = supervised_loss(*inputs, HeadShape())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_bf16_chunks_are_summed_in_fp32(monkeypatch):
    """Many small bf16 chunks must give the gradient of one large one."""
    inputs = problem(num_targets=2048, dtype=torch.bfloat16, bias=False)
    exact = [
        t.detach().float().requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs
    ]
    (expected,) = torch.autograd.grad(plain(*exact, HeadShape()), exact[1])
    monkeypatch.setattr(head_module, "CHUNK_ROWS", 64)
    supervised_loss(*inputs, HeadShape()).backward()
    gap = (inputs[1].grad.float() - expected).norm() / expected.norm()
    assert gap < 5e-3


def test_autocast_runs_in_bf16_and_keeps_dtypes():
    hidden, weight, bias, targets, weights = problem()
    exact = supervised_loss(hidden, weight, bias, targets, weights, HeadShape())
    with torch.autocast("cpu", torch.bfloat16):
        loss = supervised_loss(hidden, weight, bias, targets, weights, HeadShape())
        nll = token_nll(hidden, weight, bias, targets, HeadShape())
    loss.backward()
    assert loss.dtype == nll.dtype == torch.float32
    assert weight.grad.dtype == hidden.grad.dtype == torch.float32
    assert loss.item() != exact.item()
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)


def test_fp16_sums_over_many_targets_stay_in_range():
    """The head's gradient is divided by the window's weight in the backward: until then it may be large."""
    hidden = torch.full((16_384, 8), 5.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(11, 8, dtype=torch.float16, requires_grad=True)
    targets, weights = torch.full((16_384,), 3), torch.ones(16_384)
    (supervised_loss(hidden, weight, None, targets, weights, HeadShape()) / 16_384).backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float16
    expected = torch.full((11, 8), 5 / 11)
    expected[3] -= 5
    torch.testing.assert_close(weight.grad.float(), expected, rtol=2e-3, atol=2e-3)
