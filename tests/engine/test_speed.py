"""What makes a step fast must not change it: the norm in rows, clipping only where needed, chunks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from burnish.engine.gradients import ROW_NUMBERS, clip_gradients, global_grad_norm
from burnish.engine.phases import PhaseClock
from burnish.model.head import CHUNK_ROWS, HeadShape, supervised_loss


def with_gradient(*shape: int, scale: float = 1.0) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(shape))
    parameter.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale
    return parameter


@pytest.mark.parametrize("shape", [(3,), (ROW_NUMBERS,), (ROW_NUMBERS + 1,), (2000, 1100), (0, 7)])
def test_the_norm_is_that_of_fp64(shape) -> None:
    parameters = [with_gradient(*shape), with_gradient(5, 2, scale=1e-3)]
    exact = torch.cat([p.grad.double().reshape(-1) for p in parameters]).norm()
    assert abs(global_grad_norm(parameters).double() - exact) <= 1e-7 * exact


def test_the_norm_keeps_what_is_not_finite() -> None:
    parameter = with_gradient(ROW_NUMBERS * 2 + 1)
    parameter.grad[-1] = float("nan")
    assert torch.isnan(global_grad_norm([parameter]))
    assert global_grad_norm([nn.Parameter(torch.zeros(2))]) == 0


@pytest.mark.parametrize("max_norm", [0.5, 0.999999, 1.0, 1.000002, 2.0, None])
def test_clipping_is_torchs(max_norm) -> None:
    ours, theirs = with_gradient(7, 9), with_gradient(7, 9)
    for parameter in (ours, theirs):
        parameter.grad /= parameter.grad.norm()
    clip_gradients([ours], global_grad_norm([ours]), max_norm)
    if max_norm is not None:
        nn.utils.clip_grad_norm_([theirs], max_norm)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=0)


def test_a_loss_over_several_chunks_is_one() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * CHUNK_ROWS + 57, 8, generator=generator, requires_grad=True)
    weight = torch.randn(11, 8, generator=generator, requires_grad=True)
    targets = torch.randint(11, (len(hidden),), generator=generator)
    ones = torch.ones(len(hidden))
    plain = nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    expected = torch.autograd.grad(plain, (hidden, weight))
    loss = supervised_loss(hidden, weight, None, targets, ones, HeadShape())
    torch.testing.assert_close(loss, plain)
    for found, right in zip(torch.autograd.grad(loss, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-4)


def test_phases_add_up_and_start_anew() -> None:
    clock = PhaseClock(torch.device("cpu"))
    for _ in range(2):
        with clock.phase("forward"):
            torch.randn(100, 100) @ torch.randn(100, 100)
    assert set(clock.take()) == {"forward"}
    assert clock.take() == {}


def test_a_confident_and_a_hopeless_target_keep_their_digits() -> None:
    """A share near 1 leaves a small slope, one that underflows a large loss: neither becomes 0 or inf."""
    hidden = torch.tensor([[12.0], [-150.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-0.5]], requires_grad=True)
    targets, ones = torch.tensor([0, 0]), torch.ones(2)
    exact = nn.functional.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="sum")
    expected = torch.autograd.grad(exact, (hidden, weight))
    loss = supervised_loss(hidden, weight, None, targets, ones, HeadShape())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    for found, right in zip(torch.autograd.grad(loss, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=2e-2, atol=0)
