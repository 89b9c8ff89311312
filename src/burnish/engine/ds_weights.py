"""A model's weights on their way into DeepSpeed: alike on all ranks, rounded, with masters that are not.

DeepSpeed 0.19 makes its fp32 masters from the weights of the forward, which are in 16 bits. Where a model
comes in fp32 (fresh weights and adapters, a checkpoint kept in fp32) its masters would be rounded ones, and
with rates such as 5e-6 such a run learns later at first than one without ZeRO: a rounded weight has to move
half a bf16 step before a forward sees it. So the weights are rounded here, and the masters set from what they
were before.

    loaded, fp32 ──round──> forward's weights, 16 bits ──DeepSpeed──> masters, fp32 but rounded
          └──────────────────────── set_masters ────────────────────────┘

Remove when: DeepSpeed makes its masters before it rounds. Imports no deepspeed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from burnish.engine.ds_nvme import swapped_in
from burnish.runtime import Ranks

Precise = Mapping[nn.Parameter, torch.Tensor]
"""Trained weights as they were before rounding, on one axis: whole, or this rank's part of them."""


@torch.no_grad()
def share_whole_weights(model: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Give every rank rank 0's fresh weights; partitioned ones are shared already.

    DeepSpeed does this itself, except where some of the model was loaded partitioned: then a fresh
    adapter would be put together from pieces of different ranks' random numbers.
    """
    if ranks.world_size == 1:
        return
    for parameter in model.parameters():
        if parameter.requires_grad and not _parts(parameter):
            shared = parameter.data.to(device)  # NCCL knows no CPU, where the model still is
            torch.distributed.broadcast(shared, src=0)
            parameter.data.copy_(shared)


def _parts(parameter: Any) -> list[torch.Tensor]:
    """This rank's parts of a weight that ZeRO-3 has partitioned, hpZ's as second; none for a whole weight.

    The parameter itself is empty then; DeepSpeed hangs its parts on it.
    """
    parts = (getattr(parameter, name, None) for name in ("ds_tensor", "ds_secondary_tensor"))
    return [part for part in parts if part is not None]


@torch.no_grad()
def round_weights(model: nn.Module, dtype: torch.dtype) -> Precise:
    """Round a model's weights to the forward's dtype, in place.

    Args:
        model: Whole, or partitioned by ZeRO-3 while it was loaded.
        dtype: What the forward runs in.

    Returns:
        Those fp32 weights that are trained, as they were; empty where nothing is rounded. Not copied: they
        are the memory that the model had.
    """
    precise: dict[nn.Parameter, torch.Tensor] = {}
    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.dtype == dtype:
            continue
        parts = _parts(parameter)
        if parameter.requires_grad and parameter.dtype == torch.float32:
            precise[parameter] = (parts or [parameter])[0].data.flatten()
        for tensor in (parameter, *parts):
            tensor.data = tensor.data.to(dtype)
    return precise


@torch.no_grad()
def set_masters(zero: Any, stage: int, precise: Precise, rank: int) -> None:
    """Give ZeRO's masters the numbers from before rounding.

    Args:
        zero: What DeepSpeed has made of the optimizer, of the model that was rounded.
        stage: 1, 2 or 3.
        precise: From `round_weights`.
        rank: Of this process.
    """
    if stage == 3:
        for number, parameters in enumerate(zero.fp16_groups):
            if any(parameter in precise for parameter in parameters):
                # Swapped to NVMe, a group's masters are in memory only while somebody asks for them.
                with swapped_in(zero, number, back=True):
                    _set_parts(zero.fp32_partitioned_groups_flat[number].data, parameters, precise, rank)
        return
    for parameter, whole in precise.items():
        described: Any = parameter
        mapping = described._hp_mapping  # None where this rank has nothing of it
        if mapping is not None:
            piece = mapping.lp_fragment_address
            mapping.get_hp_fragment().data.copy_(whole.narrow(0, piece.start, piece.numel))


def _set_parts(flat: torch.Tensor, parameters: Iterable[Any], precise: Precise, rank: int) -> None:
    """Stage 3: in a group's flat masters this rank's parts stand one after the other."""
    at = 0
    for parameter in parameters:
        size = parameter.partition_numel()
        known = precise.get(parameter)
        if known is not None:
            is_whole = known.numel() == parameter.ds_numel
            part = known[rank * size : (rank + 1) * size] if is_whole else known
            flat.narrow(0, at, part.numel()).copy_(part)  # what is left of the last part is padding
        at += size
