"""The loss on supervised positions only: the head, the softmax and their gradients in one go.

The weights of a window's loss are known before its first forward. So the gradient of the logits is
known as soon as the logits are, and the gradients of the hidden states and of the head are formed in
the forward, chunk by chunk: three matrix products instead of four, and never more than one chunk of
logits in memory. The idea is that of Cut Cross-Entropy and Liger's fused linear cross-entropy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch.autograd.function import once_differentiable

from burnish.model.native.softmax import can_softmax, head_product, softmax
from burnish.model.objective import PLAIN, Objective

CHUNK_ROWS = 1024
"""Rows of logits per matrix product: fewer run below the matrix rate, and so do, by 5 to 10 % on a CPU, those
that are no multiple of 64. So chunks are of this size and a rest is by itself; equal chunks were slower."""
BLOCK_BYTES_CPU = 4 * 2**20
BLOCK_BYTES_CUDA = 256 * 2**20
"""fp32 logits worked on at once, inside a chunk: what stays in a CPU's cache, or fills a GPU."""


@dataclass(frozen=True)
class HeadShape:
    """What becomes of `hidden @ weight.T + bias` before the softmax."""

    scale: float = 1.0
    """Factor on the logits (Cohere's `logit_scale`, one over Granite's `logits_scaling`)."""
    softcap: float | None = None
    """After that, logits become `softcap * tanh(logits / softcap)` (Gemma 2)."""


def supervised_loss(
    hidden: Float[torch.Tensor, "targets width"],
    head_weight: Float[torch.Tensor, "vocabulary width"],
    head_bias: Float[torch.Tensor, " vocabulary"] | None,
    targets: Int64[torch.Tensor, " targets"],
    weights: Float32[torch.Tensor, " targets"],
    shape: HeadShape,
    objective: Objective = PLAIN,
) -> Float32[torch.Tensor, ""]:
    """`sum(weight * nll)` over supervised positions, differentiable once.

    The value is always the plain loss, so that it compares with evaluation; the gradient is that of
    the objective, label smoothing and z-loss included.

    Args:
        hidden: Hidden states at the supervised positions; there may be none: the loss is then 0, and
            its gradients are zeros, not absent, so that every rank's collectives match.
        head_weight: The head's matrix.
        head_bias: Its bias.
        targets: Token to be produced at each position.
        weights: Loss weight of each position.
        shape: What is done to the logits.
        objective: What the gradient is of.
    """
    return _SupervisedLoss.apply(hidden, head_weight, head_bias, targets, weights, shape, objective)


@torch.no_grad()
def token_nll(
    hidden: Float[torch.Tensor, "targets width"],
    head_weight: Float[torch.Tensor, "vocabulary width"],
    head_bias: Float[torch.Tensor, " vocabulary"] | None,
    targets: Int64[torch.Tensor, " targets"],
    shape: HeadShape,
) -> Float32[torch.Tensor, " targets"]:
    """Negative log-likelihood of every target, without gradients and without full logits."""
    work = _Work.prepare(hidden, head_weight, head_bias, shape)
    nll = torch.zeros(len(targets), dtype=torch.float32, device=hidden.device)
    for begin in range(0, len(targets), CHUNK_ROWS):
        rows = slice(begin, begin + CHUNK_ROWS)
        work.nll_and_gradient(work.hidden[rows], targets[rows], nll[rows], None)
    return nll


@dataclass(frozen=True)
class _Work:
    """The head in the dtype that matrix products run in, and how many rows are softmaxed at once."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    shape: HeadShape
    block_rows: int

    @staticmethod
    def prepare(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        shape: HeadShape,
    ) -> _Work:
        kind = hidden.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else weight.dtype
        block_bytes = BLOCK_BYTES_CUDA if kind == "cuda" else BLOCK_BYTES_CPU
        block_rows = max(1, block_bytes // (4 * weight.shape[0]))
        # One cast of the head per micro-batch, not one per chunk.
        bias = None if bias is None else bias.to(dtype)
        return _Work(hidden.to(dtype), weight.to(dtype), bias, shape, block_rows)

    def nll_and_gradient(
        self, hidden: torch.Tensor, targets: torch.Tensor, nll: torch.Tensor, objective: Objective | None
    ) -> torch.Tensor:
        """Fill `nll`; with an objective, return the objective's gradient, row by row and not yet weighted,
        with respect to `hidden @ weight.T + bias`, in the place of those logits."""
        of_nll = objective is None or not (objective.z_loss or objective.label_smoothing)
        by_kernel = of_nll and self.shape == HeadShape() and can_softmax(hidden)
        logits = head_product(hidden, self.weight) if by_kernel else hidden @ self.weight.T
        if self.bias is not None:
            logits += self.bias
        if by_kernel:
            softmax(logits, targets, nll, gradient=objective is not None)
            return logits
        for begin in range(0, len(targets), self.block_rows):
            rows = slice(begin, begin + self.block_rows)
            block, slope = self._shaped(logits[rows])
            at_target = targets[rows, None]
            if objective is not None and of_nll:
                nll[rows], shares = _nll_and_slope(block, at_target)
                logits[rows] = shares if slope is None else shares.mul_(slope)
                continue
            log_shares = torch.log_softmax(block, dim=-1)
            nll[rows] = -log_shares.gather(1, at_target)[:, 0]
            if objective is None:
                continue
            shares = log_shares.exp_()
            if objective.z_loss:  # d lse^2 / d logits = 2 lse softmax, and lse = logit - log softmax
                lse = block.gather(1, at_target) + nll[rows, None]
                shares.mul_(lse.mul_(2 * objective.z_loss).add_(1))
            # d nll / d logits = softmax - one_hot(target); smoothed, the target's share goes to all
            smoothing = objective.label_smoothing
            at_target_less = shares.new_full((1, 1), smoothing - 1.0)
            shares.scatter_add_(1, at_target, at_target_less.expand_as(at_target))
            if smoothing:
                shares.sub_(smoothing / shares.shape[1])
            logits[rows] = shares if slope is None else shares.mul_(slope)
        return logits

    def _shaped(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float | None]:
        """Logits in fp32 (fp64 stays) as the model means them, and their derivative by the raw ones."""
        shape = self.shape
        plain = shape.scale == 1.0 and shape.softcap is None  # then nothing is done in place
        wide = block.to(torch.promote_types(block.dtype, torch.float32))
        block = wide if plain or wide is not block else block.clone()
        slope: torch.Tensor | float | None = None
        if shape.scale != 1.0:
            block, slope = block.mul_(shape.scale), shape.scale
        if shape.softcap is not None:
            squashed = torch.tanh_(block.div_(shape.softcap))
            slope = (1 - squashed * squashed).mul_(shape.scale)
            block = squashed * shape.softcap
        return block, slope


def _nll_and_slope(block: torch.Tensor, at_target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of each row's target, and its derivative by the row's logits.

    One softmax instead of a log_softmax and its exponential: the normaliser is found again from the
    largest share, which is `exp(largest logit - normaliser)` and cannot underflow.
    """
    largest, own = block.amax(-1, keepdim=True), block.gather(1, at_target)
    shares = torch.softmax(block, dim=-1)
    nll = (largest - own) - shares.amax(-1, keepdim=True).log_()
    # softmax - 1 at the target
    shares.scatter_(1, at_target, torch.expm1(-nll))
    return nll[:, 0], shares


def _add(total: torch.Tensor, part: torch.Tensor, first: bool) -> None:
    """`total += part`, without reading what the first part overwrites."""
    if first:
        total.copy_(part)
    else:
        total.add_(part)


def _kept(total: torch.Tensor | None, parameter: torch.Tensor | None) -> torch.Tensor | None:
    """A parameter's gradient as it waits for the backward, in its dtype. Not in fp16: before it is
    divided by the window's weight, a sum over thousands of targets may be beyond range at any scale."""
    if total is None or parameter is None or parameter.dtype == torch.float16:
        return total
    return total.to(parameter.dtype)


class _SupervisedLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        weights: torch.Tensor,
        shape: HeadShape,
        objective: Objective,
    ) -> torch.Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wanted = objective if wants_hidden or wants_weight or wants_bias else None
        num_targets = len(targets)
        work = _Work.prepare(hidden, weight, bias, shape)
        nll = torch.zeros(num_targets, dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        # bf16 sums over several chunks lose 2e-3 of the gradient: fp32 between chunks.
        wide = torch.promote_types(hidden.dtype, torch.float32)
        d_weight = hidden.new_empty(weight.shape, dtype=wide) if wants_weight else None
        d_bias = hidden.new_zeros(weight.shape[0], dtype=wide) if wants_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            # Weighted here and not in the logits' gradient, which is as wide as the vocabulary.
            weighted = work.hidden * weights[:, None].to(work.hidden.dtype)
            for begin in range(0, num_targets, CHUNK_ROWS):
                rows = slice(begin, begin + CHUNK_ROWS)
                gradient = work.nll_and_gradient(work.hidden[rows], targets[rows], nll[rows], wanted)
                if d_hidden is not None:
                    d_hidden[rows] = (gradient @ work.weight).mul_(weights[rows, None])
                if d_weight is not None:
                    _add(d_weight, gradient.T @ weighted[rows], first=begin == 0)
                if d_bias is not None:
                    d_bias += (gradient * weights[rows, None]).sum(0)
                del gradient  # before the next chunk's logits take as much again
        if d_weight is not None and num_targets == 0:
            d_weight.zero_()
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.gradients = d_hidden, _kept(d_weight, weight), _kept(d_bias, bias)
        # fp64 for one number: the sum over a window's tokens must not depend on how it was cut.
        return (nll.double() * weights.double()).sum().float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the supervised loss can be differentiated only once")
        # In place: a second matrix of the head's size would be the peak of the step.
        scaled = (None if g is None else g.mul_(grad) for g in gradients)
        inputs = zip(scaled, ctx.dtypes, strict=True)
        return *(None if g is None else g.to(dtype) for g, dtype in inputs), None, None, None, None
