"""Muon for matrices and AdamW for the rest, as one optimizer, over whole weights or ZeRO's shards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float

MOMENTUM = 0.95
"""What Muon's author and torch use."""
NUM_ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Newton-Schulz: singular values end between 0.7 and 1.2 after five iterations (K. Jordan, 2024)."""
SMALLEST_NORM = 1e-7


def orthogonalized(matrix: Float[torch.Tensor, "*batch rows columns"]) -> torch.Tensor:
    """The nearest matrix whose singular values are all about 1, in bf16 (Newton-Schulz, quintic).

    Source: K. Jordan, Muon: an optimizer for hidden layers in neural networks, 2024. Equal to what
    `torch.optim.Muon` computes, which takes no stack of matrices (experts) and no shards.
    """
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16().reshape(-1, *matrix.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the smaller Gram matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).reshape(matrix.shape)


@dataclass(frozen=True)
class Shard:
    """This rank's piece of a matrix, somewhere in a flat tensor of many pieces."""

    shape: tuple[int, ...]
    """Of the whole matrix."""
    begin: int
    """Where in the flattened matrix the piece begins."""
    at: int
    """Where in the flat tensor it begins."""
    size: int
    """Its elements; 0 where the matrix belongs to other ranks."""
    shared: bool
    """Whether other ranks hold the rest of it: then all of them put it together."""

    def whole(self, flat: torch.Tensor) -> torch.Tensor | None:
        """The matrix that `flat` has a piece of; None where it has none. A collective if `shared`."""
        piece = flat.narrow(0, self.at, self.size)
        if self.shared:
            # Exact: every other rank adds zeros to this rank's piece. bf16 is all that is looked at; gloo
            # adds up fp32.
            dtype = torch.float32 if flat.device.type == "cpu" else torch.bfloat16
            gathered = torch.zeros(math.prod(self.shape), dtype=dtype, device=flat.device)
            gathered.narrow(0, self.begin, self.size).copy_(piece)
            torch.distributed.all_reduce(gathered)
            piece = gathered
        return piece.view(self.shape) if self.size else None


@final
class MuonAdamW(torch.optim.Optimizer):
    """Muon for groups that say `orthogonal`, AdamW for the others.

    Gradients arrive clipped: engines measure and clip them before `step`, so Newton-Schulz comes
    after and what is reported is the gradient's norm. (Newton-Schulz makes every update the same
    size; clipped after it, a norm of 1 would shrink every step.)

    An update is `0.2 * sqrt(max(rows, columns))` long per rate, AdamW's usual size, so both kinds take
    the same rate and decay (Liu et al., Muon is Scalable for LLM Training, 2025, equation 4).

    Args:
        groups: With `orthogonal` in each.
        lr: Of groups that have none.
        betas: AdamW's.
        eps: AdamW's.
        fused: Use AdamW's fused kernel.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        fused: bool,
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "orthogonal": False})
        self._shards: Mapping[torch.Tensor, Sequence[Shard]] = {}
        others = self._groups(orthogonal=False)
        # The same group dicts: AdamW adds what it needs to them.
        self._adamw = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, fused=fused) if others else None

    def locate(self, shards: Mapping[torch.Tensor, Sequence[Shard]]) -> None:
        """Say which matrices an engine's flat tensors are made of. Every rank lists the same ones."""
        self._shards = shards

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step, in the order of the groups."""
        for group in self._groups(orthogonal=True):
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._muon(parameter, parameter.grad, group)
        if self._adamw is not None:
            # Engines exchange groups and state for their own; AdamW works on whatever is there now.
            self._adamw.param_groups = self._groups(orthogonal=False)
            self._adamw.state = self.state
            self._adamw.step()
        return None if closure is None else closure()

    def _groups(self, orthogonal: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["orthogonal"] == orthogonal]

    def _muon(self, parameter: torch.Tensor, gradient: torch.Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        direction = gradient.lerp(momentum, MOMENTUM).reshape(-1)  # Nesterov's
        flat = parameter.view(-1)
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        whole = Shard(tuple(parameter.shape), 0, 0, parameter.numel(), shared=False)
        for shard in self._shards.get(parameter, (whole,)):
            matrix = shard.whole(direction)
            if matrix is None:
                continue
            update = orthogonalized(matrix).reshape(-1).narrow(0, shard.begin, shard.size)
            rate = group["lr"] * 0.2 * math.sqrt(max(shard.shape[-2:]))
            flat.narrow(0, shard.at, shard.size).add_(update, alpha=-rate)
