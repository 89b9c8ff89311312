"""What DeepSpeed 0.19 needs to be told before it runs as we want it. Named, called explicitly by
`engine/deepspeed.py`, and each with the condition for removing it. Imports no deepspeed: what is
to be changed is handed in.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import MutableMapping

import torch

from burnish.runtime import Ranks


def skip_shm_compile(compatible_ops: MutableMapping[str, bool]) -> None:
    """Keep DeepSpeed from compiling a C++ extension when it joins the process group on a CPU.

    `deepspeed/comm/torch.py` (`build_shm_op`) compiles `deepspeed_shm_comm` on first use: 46 to
    137 s, and an error where there is no compiler. Plain gloo gives the same numbers.

    Remove when: DeepSpeed builds it ahead of time or has a setting for it.

    Args:
        compatible_ops: `deepspeed.ops.__compatible_ops__`.
    """
    compatible_ops["deepspeed_shm_comm"] = False


def announce_ranks(ranks: Ranks) -> None:
    """Put the ranks into the environment, where DeepSpeed reads them.

    `runtime/engine.py` and `zero/partition_parameters.py` read `LOCAL_RANK` and `comm.py` looks
    for `RANK`; started as one process, or by srun, there is none. Without them DeepSpeed goes
    looking for MPI.

    Remove when: DeepSpeed takes ranks as arguments.
    """
    os.environ.setdefault("RANK", str(ranks.rank))
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))
    os.environ.setdefault("WORLD_SIZE", str(ranks.world_size))


def join_alone(ranks: Ranks, device: torch.device) -> None:
    """Make a process group of one: DeepSpeed runs no step without a group, not even on one rank.

    Remove when: DeepSpeed runs without torch.distributed on one process.
    """
    if ranks.world_size > 1 or torch.distributed.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)


def name_accelerator(device: torch.device) -> None:
    """Tell DeepSpeed, before it is imported, what it computes on.

    `accelerator/real_accelerator.py` otherwise guesses at import, and warns on stdout about a CPU.

    Remove when: it takes the accelerator as an argument, or guesses in silence.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)


def quieten(logger: logging.Logger) -> None:
    """Let DeepSpeed's logger, which writes to stdout, report errors only, and hide its use of
    collectives that torch 2.13 calls by new names (a warning per call).

    Its warnings speak to people who call it by hand; stdout belongs to what a verb prints.

    Remove when: DeepSpeed logs through the root logger, and calls the collectives' new names.
    """
    logger.setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore",
        r"`torch.distributed.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
        FutureWarning,
    )
