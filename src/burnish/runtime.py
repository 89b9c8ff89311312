"""The process: ranks, process group, seeds, random state, logging. Imports torch only when asked.

Knows nothing of models or data; everything may import it.
"""

from __future__ import annotations

import base64
import ctypes
import datetime
import logging
import os
import platform
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from burnish.errors import MachineError, Problem
from burnish.rendezvous import complete_environment, in_slurm_step, slurm_environment

if TYPE_CHECKING:
    import torch

log = logging.getLogger("burnish")

HANG_SECONDS = 600.0
"""The longest silence of a rank that is not taken for a hang, unless the config says otherwise."""
_LONGEST_SECONDS = 1800.0


@dataclass(frozen=True)
class Ranks:
    """This process among the others, from the environment that every launcher sets."""

    rank: int
    local_rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes and prints for all."""
        return self.rank == 0


def ranks_from_environment(environ: Mapping[str, str] = os.environ) -> Ranks:
    """Read the ranks that torchrun, the deepspeed launcher or srun put into the environment.

    `RANK`/`WORLD_SIZE` win over Slurm's variables; with neither this is the only process.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        rank = int(environ["RANK"])
        return Ranks(rank, int(environ.get("LOCAL_RANK", rank)), int(environ["WORLD_SIZE"]))
    if in_slurm_step(environ):
        step = slurm_environment(environ)
        return Ranks(int(step["RANK"]), int(step["LOCAL_RANK"]), int(step["WORLD_SIZE"]))
    return Ranks(0, 0, 1)


def pick_device(ranks: Ranks) -> torch.device:
    """The GPU of this local rank, or the CPU on a machine without GPUs."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", ranks.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def start_process_group(
    ranks: Ranks, device: torch.device, timeout_seconds: float | None = HANG_SECONDS
) -> None:
    """Join the process group (nccl on GPUs, gloo on CPUs). Nothing to do for one process.

    Args:
        ranks: This process among the others.
        device: Where this rank computes.
        timeout_seconds: Longest wait for all ranks to turn up, and (a minute more: where a watchdog
            waits as long, it speaks first) in a collective. None is half an hour.

    Raises:
        MachineError: The other ranks cannot be reached.
    """
    if ranks.world_size == 1:
        return
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if dist.is_initialized():
        return
    complete_environment(os.environ)
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=_LONGEST_SECONDS if timeout_seconds is None else timeout_seconds)
    try:
        # Rank 0 listens and the others come.
        joining = rendezvous("env://", ranks.rank, ranks.world_size, timeout=timeout)
        store, _, _ = next(iter(joining))
        dist.init_process_group(
            backend,
            store=PrefixStore("burnish", store),
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timeout + datetime.timedelta(minutes=1),
        )
    except (dist.DistError, ValueError, RuntimeError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise MachineError(
            Problem(
                "process group",
                f"rank {ranks.rank} of {ranks.world_size} could not join over {backend}: {error}",
                f"Check that all ranks were started and reach MASTER_ADDR:MASTER_PORT ({address}).",
            )
        ) from error


def new_group(members: Sequence[int], timeout_seconds: float | None) -> Any:
    """A process group of some of the ranks. Every rank calls this, members or not, in the same order.

    Args:
        members: The ranks in it.
        timeout_seconds: As for `start_process_group`.
    """
    import torch.distributed as dist

    seconds = _LONGEST_SECONDS if timeout_seconds is None else timeout_seconds + 60
    return dist.new_group(list(members), timeout=datetime.timedelta(seconds=seconds))


def stop_process_group() -> None:
    """Leave the process group, if there is one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (CPU and GPU) alike on every rank."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """This rank's random state as a JSON-able value; `restore_random_state` takes it back."""
    import torch

    kind, keys, position, has_gauss, gauss = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    version, internal, python_gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(internal), python_gauss],
        "numpy": [kind, _to_text(keys.tobytes()), int(position), int(has_gauss), float(gauss)],
        "torch": _to_text(torch.get_rng_state().numpy().tobytes()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _to_text(torch.cuda.get_rng_state().numpy().tobytes())
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Take back what `random_state` gave."""
    import torch

    version, internal, python_gauss = state["python"]
    random.setstate((version, tuple(internal), python_gauss))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.frombuffer(_to_bytes(keys), np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(torch.frombuffer(bytearray(_to_bytes(state["torch"])), dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(_to_bytes(state["cuda"])), dtype=torch.uint8))


def _to_text(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _to_bytes(text: str) -> bytes:
    return base64.b64decode(text)


def setup_logging(ranks: Ranks, verbose: bool = False) -> None:
    """Plain lines on stderr: everything from rank 0, warnings from the others."""
    # "pip install kernels": of no use where nothing is quantised, and slow rather than wrong where it is.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if ranks.world_size == 1 or ranks.is_main else f"[rank {ranks.rank}] "
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel((logging.DEBUG if verbose else logging.INFO) if ranks.is_main else logging.WARNING)


def quieten_libraries() -> None:
    """Keep other packages' chatter out of the output: what they say on loading is not the user's to mend.

    Called by whoever loads a model.
    """
    import torch

    if not torch.cuda.is_available():
        # accelerate imports deepspeed when a model is saved, which then warns that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def gather_objects(value: Any, ranks: Ranks) -> list[Any]:
    """Every rank's value, in rank order, on every rank. For small, rare things only."""
    if ranks.world_size == 1:
        return [value]
    import torch.distributed as dist

    gathered: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(gathered, value)
    return gathered


def sum_over_ranks(value: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The tensor's sum over all ranks, in place."""
    if ranks.world_size > 1:
        import torch.distributed as dist

        dist.all_reduce(value)
    return value


def smallest_over_ranks(value: int | None, ranks: Ranks) -> int | None:
    """The least of every rank's values, on every rank; None where one has none."""
    values = gather_objects(value, ranks)
    return None if None in values else min(values)


def barrier(ranks: Ranks) -> None:
    """Wait until every rank is here."""
    if ranks.world_size > 1:
        import torch.distributed as dist

        dist.barrier()


def peak_memory_bytes(device: torch.device) -> int | None:
    """Peak bytes: allocated on the GPU, or resident in the process on a CPU; None if unknown."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)


def device_memory_bytes(device: torch.device, ranks: Ranks) -> int | None:
    """Memory that this rank may use: all of a GPU's, or on a CPU its share of what is free on this host."""
    if device.type != "cuda":
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size))
        free = free_memory_bytes()
        return None if free is None else free // max(1, local_ranks)
    import torch

    return int(torch.cuda.get_device_properties(device).total_memory)


def free_memory_bytes(root: Path = Path("/")) -> int | None:
    """Host memory that processes may still take: the machine's, or less in a container (cgroups, version 2
    and 1). None where the system does not say (not Linux).

    Args:
        root: Where `proc` and `sys` are.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kib = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    if kib is None:
        return None
    free = kib * 1024
    groups = root / "sys/fs/cgroup"
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, taken = (groups / limit).read_text().strip(), int((groups / used).read_text())
        except OSError:
            continue
        if most != "max":
            free = min(free, max(0, int(most) - taken))
    return free


_KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Variables that bound oneDNN's cache of compiled products, and that of torch's layer above it (ideep)."""
_KEPT_KERNELS = 128
"""A step has some dozen shapes; what is kept for the next one is seldom met again."""


def bound_kernel_caches(device: torch.device) -> None:
    """Have products of few shapes kept compiled on a CPU, instead of torch's 1,024.

    oneDNN compiles a bf16 product for each shape, half a megabyte each, and packed rows are of another length
    in every step: a process grew by 10 MiB a step, up to 600. Called before the first product; who has set
    the variables is not overruled.

    Args:
        device: What is computed on; nothing is done unless that is a CPU.
    """
    if device.type == "cpu":
        for name in _KERNEL_CACHES:
            os.environ.setdefault(name, str(_KEPT_KERNELS))


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""From glibc's malloc.h; mallopt takes C ints and gives 1 for yes."""
_KEPT_FACTOR = 3
"""Freed memory that is kept lies in pieces: a process has been seen to hold more than twice what it uses."""


def suit_allocator(
    device: torch.device, needed_bytes: int, free_bytes: int | None, largest_bytes: int
) -> bool:
    """Choose, on a CPU, between speed and the least memory.

    A step frees and takes the same tensors of tens of megabytes again and again. Where there is room for it,
    the C library keeps what was freed (`keep_freed_memory`); else it is told to give every larger tensor
    pages of its own and to return them at once, so that the process holds what the plan says.

    Called by a process that trains, before its first step. Not undone.

    Args:
        device: What it trains on; nothing is done unless that is a CPU.
        needed_bytes: What this process needs by plan.
        free_bytes: What it may take; None where that is not known.
        largest_bytes: Size of the largest tensor that every layer makes; larger ones come once a step.

    Returns:
        Whether freed memory is kept.
    """
    if free_bytes is None or free_bytes >= _KEPT_FACTOR * needed_bytes:
        return keep_freed_memory(device, largest_bytes)
    if _glibc_allocates(device):
        # A threshold that was set stays; otherwise it grows with what is freed, up to 32 MiB.
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**18)
    return False


_LEAST_MAPPED, _MOST_MAPPED = 2**22, 2**30
"""Bytes from which on a tensor gets pages of its own."""


def keep_freed_memory(device: torch.device, largest_bytes: int = _MOST_MAPPED) -> bool:
    """Have the C library keep memory that was freed, for the next step, instead of returning it.

    glibc maps tensors of tens of megabytes anew each time (`M_MMAP_THRESHOLD`, at most 32 MiB by itself) and
    gives back what is free at the end of the heap (`M_TRIM_THRESHOLD`), so that the kernel clears every page
    once a step: up to a fifth of the time.

    Logits and gradients of the head are larger than what layers make and come once a step. Keeping them too
    gains nothing that could be measured, and their holes take a fifth more memory.

    Args:
        device: What is trained on; nothing is done unless that is a CPU.
        largest_bytes: Tensors up to this size are kept.

    Returns:
        Whether it was done: only glibc knows these settings (not musl, macOS or Windows), and memory given
        out by another allocator (jemalloc, tcmalloc, preloaded) is not touched by them.
    """
    if not _glibc_allocates(device):
        return False
    libc = ctypes.CDLL(None)
    kept_bytes = 2**31 - 1
    mapped_bytes = min(max(largest_bytes + 2**16, _LEAST_MAPPED), _MOST_MAPPED)  # with room for malloc's own
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, mapped_bytes) and libc.mallopt(_M_TRIM_THRESHOLD, kept_bytes))


def _glibc_allocates(device: torch.device) -> bool:
    return device.type == "cpu" and platform.libc_ver()[0] == "glibc"


def available_cores() -> int:
    """The cores this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else (os.cpu_count() or 1)
