"""Where ZeRO keeps the pieces of each matrix. Reads DeepSpeed's objects, but imports no deepspeed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from burnish.engine.ds_config import ModelSizes
from burnish.engine.muon import Shard
from burnish.runtime import Ranks


def share_of(ranks: Ranks, num_elements: int) -> int:
    """A rank's part of a weight, rounded up as ZeRO-3 does."""
    return -(-num_elements // ranks.world_size)


def gpus_of(ranks: Ranks, device: torch.device) -> int:
    """GPUs of all ranks; none where this one computes on a CPU."""
    return ranks.world_size if device.type == "cuda" else 0


def sizes_of(model: nn.Module, ranks: Ranks) -> ModelSizes:
    """What of a model's sizes matters to DeepSpeed's buffers."""

    def size(parameter: nn.Parameter) -> int:
        # A partitioned weight is empty, and knows of its whole by what DeepSpeed hangs on it.
        return getattr(parameter, "ds_numel", parameter.numel())

    trainable = sum(size(p) for p in model.parameters() if p.requires_grad)
    return ModelSizes(trainable, share_of(ranks, max(size(p) for p in model.parameters())))


def shards_of_zero(
    zero_optimizer: Any, groups: Sequence[Sequence[nn.Parameter]], stage: int, ranks: Ranks
) -> Mapping[torch.Tensor, Sequence[Shard]]:
    """The pieces in each flat fp32 tensor that ZeRO hands to the optimizer on this rank.

        stages 1, 2   a group's matrices end to end, cut into one stretch for each rank
        rank 0        [ A A A A B B ]
        rank 1        [ B B C C C C ]      B is shared, A and C are not

        stage 3       every matrix cut into one piece for each rank
        rank 0        [ A A B B C C ]      all are shared
        rank 1        [ A A B B C C ]

    Every rank lists the same matrices in the same order, those of other ranks with size 0: putting a
    shared one together takes all ranks.

    Args:
        zero_optimizer: What DeepSpeed has made of the optimizer; its `optimizer` is ours.
        groups: Parameters of each of our groups, before DeepSpeed took them.
        stage: 1, 2 or 3.
        ranks: All hold a stretch.
    """
    if stage == 3:
        flats = zip(zero_optimizer.fp16_groups, zero_optimizer.fp32_partitioned_groups_flat, strict=True)
        return {flat: _even_pieces(parameters, ranks) for parameters, flat in flats}
    shards: dict[torch.Tensor, Sequence[Shard]] = {}
    for parameters, group in zip(groups, zero_optimizer.optimizer.param_groups, strict=True):
        (flat,) = group["params"]
        shards[flat] = _stretch(parameters, flat.device, ranks)
    return shards


def _even_pieces(parameters: Sequence[nn.Parameter], ranks: Ranks) -> list[Shard]:
    shards: list[Shard] = []
    at = 0
    for parameter in parameters:
        described: Any = parameter  # DeepSpeed puts its own attributes on it
        piece, total = described.partition_numel(), described.ds_numel
        begin = min(ranks.rank * piece, total)
        size = min(piece, total - begin)  # the last piece is padded
        shards.append(Shard(tuple(described.ds_shape), begin, at, size, shared=ranks.world_size > 1))
        at += piece
    return shards


def _stretch(parameters: Sequence[nn.Parameter], device: torch.device, ranks: Ranks) -> list[Shard]:
    found: list[tuple[tuple[int, ...], int, int, int]] = []
    for parameter in parameters:
        described: Any = parameter
        mapping = described._hp_mapping  # None where this rank has nothing of it
        shape = tuple(parameter.shape)
        if mapping is None:
            found.append((shape, 0, 0, 0))
        else:
            piece, place = mapping.lp_fragment_address, mapping.hp_fragment_address
            found.append((shape, piece.start, place.start, piece.numel))
    sizes = torch.tensor([size for *_, size in found], device=device)
    own = sizes == torch.tensor([p.numel() for p in parameters], device=device)
    somewhere_whole = own.float()
    if ranks.world_size > 1:
        torch.distributed.all_reduce(somewhere_whole)
    shared = (somewhere_whole == 0).tolist()
    return [Shard(*piece, shared=is_shared) for piece, is_shared in zip(found, shared, strict=True)]
