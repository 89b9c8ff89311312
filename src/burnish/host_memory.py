"""The memory of the host: what is free, what this process holds, and what becomes of what tensors leave.

Tensors on a CPU come from the C library, which either keeps freed memory for the next tensor or gives it back
to the system. What follows is about glibc, the only one that can be told.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    import torch


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


def resident_bytes() -> int | None:
    """Memory that this process holds now; None where the system does not say (not Linux)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


_KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Variables that bound oneDNN's cache of compiled products, and that of torch's layer above it (ideep)."""
_KEPT_KERNELS = 96
"""For each number of rows a layer's forward and backward have nine, up to 30 with adapters: room for those
of the last few steps. 160 were 2 % faster on one model, and take 64 MiB more."""


def bound_kernel_caches(device: torch.device) -> None:
    """Have products of few shapes kept compiled on a CPU, instead of torch's 1,024.

    oneDNN compiles a bf16 product for each shape, a megabyte each in pieces of 252 KiB. Where rows are of
    another length in every step, a process grew by 10 MiB a step, up to 600, and more by the holes between
    such pieces, which no tensor fits into; filled up to few sizes, most products are met again. Called
    before the first product; who has set the variables is not overruled.

    Args:
        device: What is computed on; nothing is done unless that is a CPU.
    """
    if device.type == "cpu":
        for name in _KERNEL_CACHES:
            os.environ.setdefault(name, str(_KEPT_KERNELS))


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""From glibc's malloc.h; mallopt takes C ints and gives 1 for yes."""
_MAPPED_BYTES = 2**30
"""From which size on a tensor gets pages of its own all the same."""


@final
class FreedMemory:
    """Choose, on a CPU, between speed and the least memory, and hold a run to what was planned.

    A step frees and takes the same tensors of tens of megabytes again and again. Where the plan has room for
    it, the C library keeps what was freed (`keep_freed_memory`); else it is told to give every larger tensor
    pages of its own and to return them at once, so that the process holds what tensors hold.

    What is kept lies in pieces that later tensors do not always fit, and grows for a while. It is returned
    when the process holds more than planned.

    Args:
        device: What is trained on; nothing is done unless that is a CPU. What the process holds when this is
            made is not counted.
    """

    def __init__(self, device: torch.device) -> None:
        self._libc = ctypes.CDLL(None) if _glibc_allocates(device) else None
        self._device = device
        self._before = resident_bytes() or 0
        self._most: int | None = None

    def settle(self, keep: bool, most_bytes: int) -> None:
        """Choose, before the first step. Not undone.

        Args:
            keep: Keep what is freed.
            most_bytes: What the process may hold in all, over what it held in the beginning.
        """
        if keep and keep_freed_memory(self._device):
            self._most = self._before + most_bytes
        elif self._libc is not None:
            # A threshold that was set stays; otherwise it grows with what is freed, up to 32 MiB.
            self._libc.mallopt(_M_MMAP_THRESHOLD, 2**18)

    def give_back(self) -> bool:
        """Return what is free to the system if the process holds more than it may; says whether it did.

        Called between micro-batches, when activations are gone. Returning a gigabyte and clearing its pages
        for the next micro-batch takes a tenth of a second or two, so it is done when needed only.
        """
        if self._libc is None or self._most is None or (resident_bytes() or 0) <= self._most:
            return False
        self._libc.malloc_trim(0)
        return True


def keep_freed_memory(device: torch.device) -> bool:
    """Have the C library keep memory that was freed, for the next step, instead of returning it.

    glibc maps tensors of tens of megabytes anew each time (`M_MMAP_THRESHOLD`, at most 32 MiB by itself) and
    gives back what is free at the end of the heap (`M_TRIM_THRESHOLD`), so that the kernel clears every page
    once a step: up to a fifth of the time.

    That holds for the head's logits and gradients more than for anything else: mapped anew, they cost a model
    with 152,000 words a quarter of its step.

    Args:
        device: What is trained on; nothing is done unless that is a CPU.

    Returns:
        Whether it was done: only glibc knows these settings (not musl, macOS or Windows), and memory given
        out by another allocator (jemalloc, tcmalloc, preloaded) is not touched by them.
    """
    if not _glibc_allocates(device):
        return False
    libc = ctypes.CDLL(None)
    kept_bytes = 2**31 - 1
    return bool(
        libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES) and libc.mallopt(_M_TRIM_THRESHOLD, kept_bytes)
    )


def _glibc_allocates(device: torch.device) -> bool:
    return device.type == "cpu" and platform.libc_ver()[0] == "glibc"
