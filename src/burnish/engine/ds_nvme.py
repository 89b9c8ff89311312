"""What ZeRO-3 keeps on NVMe. Optimizer state is saved and taken back by ourselves. Imports no deepspeed.

DeepSpeed 0.19 saves it by copying the swap files, and cannot go on from them: in a fresh engine no
file is known to hold a moment before the first step makes new moments of zeros; what is too small to be
swapped (under 1 MiB) and Adam's step counts are not in files at all.

So a rank writes one safetensors file for each of ZeRO's sub-groups: its stretch of the fp32 weights and
every state of the optimizer for it. One sub-group is in memory at a time, as in DeepSpeed's own step.

    swapped_pp_rank_0_group_00000.safetensors     fp32, exp_avg, exp_avg_sq, step

Remove when: DeepSpeed's load_checkpoint restores all of it.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from burnish.engine.state_files import copy_exactly, read_tensors, write_tensors
from burnish.errors import CheckpointError, Problem

_MASTERS = "fp32"


def has_swapped_state(folder: Path) -> bool:
    """Whether a checkpoint's folder holds state as it is written here."""
    return any(folder.glob("swapped_pp_rank_*.safetensors"))


def write_swapped_state(zero: Any, folder: Path, rank: int) -> None:
    """Write this rank's masters and optimizer state, a file for each sub-group.

    Args:
        zero: DeepSpeed's ZeRO-3 optimizer, between two steps.
        folder: Where; it exists.
        rank: Of this process.
    """
    for number in range(len(zero.fp16_groups)):
        with swapped_in(zero, number):
            write_tensors(_path(folder, rank, number), _tensors(zero, number))


@torch.no_grad()
def read_swapped_state(zero: Any, folder: Path, rank: int) -> None:
    """Take back what `write_swapped_state` wrote, and set the weights of the forward from it.

    Raises:
        CheckpointError: The checkpoint was cut into other pieces: other ranks, or another sub_group_size.
    """
    num_groups = len(zero.fp16_groups)
    num_saved = len(list(folder.glob(f"swapped_pp_rank_{rank}_group_*.safetensors")))
    if num_saved != num_groups:
        what = f"holds rank {rank}'s state in {num_saved} pieces, this run in {num_groups}"
        cure = "Resume on as many ranks, with the engine settings that it was saved with."
        raise CheckpointError(Problem("checkpoint.resume", what, cure))
    for number in range(num_groups):
        saved = read_tensors(_path(folder, rank, number))
        # On leaving, DeepSpeed swaps out what stands in the group's tensors, moments too.
        with swapped_in(zero, number, back=True):
            flat = zero.fp32_partitioned_groups_flat[number]
            copy_exactly({_MASTERS: flat.data}, {_MASTERS: saved.pop(_MASTERS)}, f"group {number}")
            zero.optimizer.state[flat] = {
                key: value.to(flat.device) if value.dim() else value for key, value in saved.items()
            }
            # The forward's weights follow from the masters.
            zero._reassign_or_swap_out_partitioned_parameters(number)


def _tensors(zero: Any, number: int) -> dict[str, torch.Tensor]:
    flat = zero.fp32_partitioned_groups_flat[number]
    state = zero.optimizer.state.get(flat, {})  # empty before the first step
    return {_MASTERS: flat.data, **{key: torch.as_tensor(value) for key, value in state.items()}}


def _path(folder: Path, rank: int, number: int) -> Path:
    return folder / f"swapped_pp_rank_{rank}_group_{number:05d}.safetensors"


@contextlib.contextmanager
def swapped_in(zero: Any, number: int, back: bool = False) -> Iterator[None]:
    """While entered, a sub-group's state is in memory; `back` writes it to NVMe again afterwards."""
    swapped = zero._swappable_optimizer_subgroup(number)
    if swapped:
        zero._optimizer_states_and_gradient_swap_in(number)
    yield
    if swapped and back:
        zero._optimizer_states_and_gradient_swap_out(number)
    elif swapped:
        zero._release_swap_buffers(number)


def swappers_of_weights(model: nn.Module) -> set[Any]:
    """What brings the weights of a partitioned model from NVMe."""
    partitioned: Iterator[Any] = iter(model.parameters())
    return {p.nvme_swapper for p in partitioned}


def remove_swap_files(folder: Path, rank: int) -> None:
    """Delete a rank's swap files: they are worth nothing once the process ends."""
    for kind in folder.glob(f"zero_stage_3/*/rank{rank}"):
        shutil.rmtree(kind, ignore_errors=True)
