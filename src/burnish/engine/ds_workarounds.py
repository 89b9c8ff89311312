"""What DeepSpeed 0.19 needs to be told before it runs as we want it. Named, called explicitly by
`engine/deepspeed.py`, and each with the condition for removing it. Imports no deepspeed: what is
to be changed is handed in.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch

from burnish.engine.gloo import all_gather, sum_at_owners
from burnish.engine.gradients import row_norms
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


def announce_ranks(ranks: Ranks, device: torch.device) -> None:
    """Put the ranks into the environment, where DeepSpeed reads them.

    `runtime/engine.py` and `zero/partition_parameters.py` read `LOCAL_RANK` and `comm.py` looks
    for `RANK`; started as one process, or by srun, there is none. Without them DeepSpeed goes
    looking for MPI. It takes the local rank for the number of the GPU, which it is not where a launcher
    shows every process a GPU of its own (Slurm's `--gpus-per-task`).

    Remove when: DeepSpeed takes ranks and the device as arguments.
    """
    os.environ.setdefault("RANK", str(ranks.rank))
    os.environ["LOCAL_RANK"] = str(ranks.local_rank if device.index is None else device.index)
    os.environ.setdefault("WORLD_SIZE", str(ranks.world_size))


def join_alone(ranks: Ranks, device: torch.device) -> None:
    """Make a process group of one: DeepSpeed runs no step without a group, not even on one rank.

    Remove when: DeepSpeed runs without torch.distributed on one process.
    """
    if ranks.world_size > 1 or torch.distributed.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage] - documented
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)


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


@contextlib.contextmanager
def without_prints() -> Iterator[None]:
    """Keep off stdout what DeepSpeed prints as it starts, past its logger: `runtime/bf16_optimizer.py` tells
    memory at every stage of its own.

    Remove when: `see_memory_usage` in `runtime/utils.py` logs again instead of printing.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def convert_to_universal(shards: Path, target: Path) -> str | None:
    """Convert ZeRO shards into a universal checkpoint, which any number of ranks can load.

    DeepSpeed offers that as a script; in a process of its own its printing, its worker processes
    and its memory stay out of ours.

    Remove when: DeepSpeed loads shards of another world size itself.

    Returns:
        What went wrong, or None.
    """
    shutil.rmtree(target.parent, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(shards)]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run(
        [*command, "--output_folder", str(target), *workers], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return None
    # Killed for the memory it takes, it says nothing.
    return next(reversed(done.stderr.strip().splitlines()), f"it ended with exit code {done.returncode}")


def forget_sums(zero: Any) -> None:
    """Let a step that was not applied leave nothing behind in the gradients of the next one.

    With the optimizer offloaded to the CPU, ZeRO 1 and 2 (`zero/stage_1_and_2.py`, `step`) keep what they
    added up in fp32 after gradients that are not finite: every later step is not finite either.

    Remove when: `averaged_gradients` is emptied there as it is without offload.

    Args:
        zero: DeepSpeed's optimizer of stage 1 or 2.
    """
    # DeepSpeed's class for stage 1 in bf16 without offload has no such sums.
    sums = getattr(zero, "averaged_gradients", {})
    for group in sums:
        sums[group] = None


def measure_by_rows(zero: Any) -> None:
    """Let ZeRO measure gradients without a copy of them in fp64.

    `get_grad_norm_direct` (`zero/stage_1_and_2.py`, `zero/stage3.py`) turns each rank's share of a gradient
    into fp64 first: up to 7 % of a step on a CPU, and on any device memory that a step has no other use for.
    It is handed the norms of the gradients' rows instead, whose norm is the same (`row_norms`).

    Remove when: it measures in fp64 without a copy.

    Args:
        zero: `DeepSpeedZeroOptimizer` or `DeepSpeedZeroOptimizer_Stage3`.
    """
    measure = zero.get_grad_norm_direct

    def measure_rows(gradients: Iterable[torch.Tensor], params: Any, norm_type: int = 2) -> torch.Tensor:
        # Padding at the end of a share is no parameter's; the original leaves it out too.
        own = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        return measure([row_norms(gradient) for gradient in own], params, norm_type)

    zero.get_grad_norm_direct = measure_rows


def add_without_copy(zero: Any) -> None:
    """Let stages 1 and 2 add a reduced bf16 gradient to the fp32 sum as it is.

    `_add_to_grad_partition_buffer` (`zero/stage_1_and_2.py`) makes an fp32 copy of it first: 2 to 4 % of a
    step on a CPU, and as much memory as the largest gradient.

    Remove when: it leaves the cast to `add_`.

    Args:
        zero: `DeepSpeedZeroOptimizer`.
    """

    def add(total: torch.Tensor | None, part: torch.Tensor) -> None:
        if total is not None:
            total.add_(part)

    zero._add_to_grad_partition_buffer = add


def gather_by_sends(backend: Any) -> None:
    """Let DeepSpeed gather weights over gloo in a third of the time (`engine/gloo.py`).

    Remove when: gloo's own gathering is as fast.

    Args:
        backend: `deepspeed.comm.comm.cdb`.
    """
    backend.all_gather_function = all_gather


def sum_by_sends(zero: Any) -> None:
    """Let stages 1 and 2 sum a bucket's gradients over gloo at the ranks that own them.

    Otherwise `allreduce_and_scatter` (`zero/stage_1_and_2.py`) copies the bucket, sums all of it for every
    rank, and copies each rank's part back.

    Remove when: it sends each rank its part.

    Args:
        zero: `DeepSpeedZeroOptimizer`, with `reduce_scatter`.
    """
    whole_sum = zero.allreduce_and_scatter

    def scatter(
        bucket: Sequence[tuple[frozenset[int], torch.Tensor, torch.Tensor | None]],
        communication_data_type: torch.dtype,
        *args: Any,
        divide: bool,
        process_group: Any,
        **kwargs: Any,
    ) -> None:
        own_dtype = all(part.dtype == communication_data_type for _, part, _ in bucket)
        if divide or not own_dtype or any(len(owners) > 1 for owners, _, _ in bucket):
            settings = {"divide": divide, "process_group": process_group, **kwargs}
            whole_sum(bucket, communication_data_type, *args, **settings)
            return
        owned = [(next(iter(owners)), part, total) for owners, part, total in bucket]
        sum_at_owners([(owner, part) for owner, part, _ in owned], process_group)
        rank = torch.distributed.get_rank(process_group)
        for owner, part, total in owned:
            if owner == rank:
                zero._add_to_grad_partition_buffer(total, part)

    zero.allreduce_and_scatter = scatter


@contextlib.contextmanager
def groups_kept_apart(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """While entered, a checkpoint may be loaded; afterwards each group is itself again.

    Loading a universal checkpoint under ZeRO-3 (`zero/stage3.py`,
    `load_hp_checkpoint_state_from_checkpoint_dir_stage3`) gives every group the first one's
    settings, so that norms and biases would decay like matrices; and all groups one tensor as
    their step counter, so that every group's step counts for all and Adam corrects its bias for
    too many. What decays is the config's to say, not the checkpoint's. And stages 1 to 3 leave the counter
    on the CPU, where the file was read; fused AdamW wants it beside its parameter.

    Remove when: each group gets its own settings and its own counter back, on the device.
    """
    kept = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in optimizer.param_groups]
    yield
    for group, settings in zip(optimizer.param_groups, kept, strict=True):
        group.update(settings)
    for parameter, entries in optimizer.state.items():
        if isinstance(entries.get("step"), torch.Tensor):
            entries["step"] = entries["step"].to(parameter.device, copy=True)


@contextlib.contextmanager
def swap_files_left_alone(engine: Any) -> Iterator[None]:
    """While entered, DeepSpeed saves and loads a checkpoint without copying its NVMe swap files.

    It cannot go on from the copies (see `engine/ds_nvme.py`), which are as large as the whole state.

    Remove when: it can, or copying them is a choice.

    Args:
        engine: DeepSpeed's.
    """
    engine.zero_nvme_offload_optimizer = lambda: False
    try:
        yield
    finally:
        del engine.zero_nvme_offload_optimizer


def ask_once(swapper: Any) -> None:
    """Let a weight on NVMe that is asked for twice at a time be read once.

    Fetching ahead (`zero/partitioned_param_coordinator.py`, `__prefetch_nvme_param_partitions`) goes through
    the weights in the order of their use, where one that two modules use stands twice (the head's matrix,
    which our loss uses too); the swapper then stops at an assertion, "already assigned swap buffer".

    Remove when: it leaves out what it has asked for.

    Args:
        swapper: What the parameters have as `nvme_swapper`.
    """
    swap_in = swapper.swap_in

    def swap_in_once(params: Sequence[Any], *args: Any, **kwargs: Any) -> None:
        swap_in(list(dict.fromkeys(params)), *args, **kwargs)

    swapper.swap_in = swap_in_once


def keep_gradients_in_memory(swapper: Any) -> None:
    """Let what is swapped to NVMe be the optimizer's state, and not the gradients too.

    DeepSpeed's `swap_tensor/partitioned_optimizer_swapper.py` (`_swap_in_pinned_gradients`) reads a
    swapped gradient straight into its place in the group's buffer. Where that place is no multiple of
    512 bytes (after a vocabulary of 61 x 32, for one) the optimizer then sees other numbers, in silence:
    the loss of the second step was off by 1 %. The gradients' own memory exists anyway, so a step that
    refers to it takes no more, and spares the disk a write and a read.

    Remove when: a gradient at any place is read right.

    Args:
        swapper: The ZeRO-3 optimizer's `optimizer_swapper`.
    """

    def refer_to(parameter: Any, gradient_offsets: list[int], gradient_tensors: list[torch.Tensor]) -> None:
        group = swapper.swap_params_info.get(swapper.parameter_id(parameter))
        if group is not None:
            group.unswapped_gradients.update(zip(gradient_offsets, gradient_tensors, strict=True))

    swapper.swap_out_gradients = refer_to
