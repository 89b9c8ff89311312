"""The process: ranks, process group, seeds, random state, logging. Imports torch only when asked.

Knows nothing of models or data; everything may import it.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import datetime
import logging
import os
import random
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, cast

import numpy as np

from burnish.errors import MachineError, Problem
from burnish.host_memory import free_memory_bytes
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
    _let_segments_grow(os.environ)
    device = torch.device("cuda", ranks.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _let_segments_grow(environ: MutableMapping[str, str]) -> None:
    """Have torch's allocator on a GPU lengthen its pieces of memory instead of taking new ones.

    Packed micro-batches are each of another length, so that hardly any tensor fits where another one was. Has
    to be said before the first allocation; who has set one of the variables is not overruled.
    """
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in environ:
        environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


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


def leave(code: int) -> NoReturn:
    """End the process; that of a rank without Python taking itself apart.

    When a collective is over, gloo's threads let go of its tensors, for which they need the interpreter.
    Up to Python 3.13 a thread that asks for it too late is ended in the middle of C++ code, and the whole
    process with it (`terminate called without an active exception`, exit code 134): seen in one of six
    processes whose last act was a collective. The launcher would stop ranks that still write results.

    Remove when: the oldest Python is 3.14, where such a thread just waits.

    Args:
        code: For whoever started the process. After 0 the other ranks are waited for as NCCL needs it.
    """
    dist = sys.modules.get("torch.distributed")  # not imported: nothing to leave, and fast verbs stay fast
    if dist is None or not dist.is_available() or not dist.is_initialized():
        sys.exit(code)
    if code == 0:
        stop_process_group()
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue] - as multiprocessing's children end
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (CPU and GPU) alike on every rank."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's random numbers from a seed inside, and afterwards those that would have come without it; on the
    GPU too, which `torch.manual_seed` seeds along."""
    import torch

    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(gpus):
        torch.manual_seed(seed)
        yield


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


def send_array(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array on the device. A GPU gets it by way of pinned memory, so that the host does not wait."""
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # kept by torch's own allocator until the copy is done
    return tensor.to(device, non_blocking=True)


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


def cxx_compiler() -> str | None:
    """Path of the C++ compiler that torch and DeepSpeed build with; `CXX` overrules its usual names."""
    named = os.environ.get("CXX")
    names = (named,) if named else ("c++", "g++", "clang++")
    return next((found for name in names if (found := shutil.which(name))), None)


def available_cores() -> int:
    """The cores this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else (os.cpu_count() or 1)
