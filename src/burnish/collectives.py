"""Whether the ranks reach each other: small collectives with known results, checked and timed.

`collective_test` starts its own processes; under a launcher `run_collectives` takes the ranks that
are there, which is how a cluster is tried: `srun burnish doctor`.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from burnish.errors import MachineError, Problem, counted
from burnish.launch import launch
from burnish.runtime import (
    Ranks,
    barrier,
    gather_objects,
    pick_device,
    ranks_from_environment,
    start_process_group,
    stop_process_group,
)
from burnish.watchdog import Watchdog

if TYPE_CHECKING:
    import torch

TIMEOUT_SECONDS = 60.0
"""Longest wait for the ranks to meet, and then for each collective."""
CPU_BYTES = 4 * 2**20
GPU_BYTES = 256 * 2**20
"""Size of the tensor that the bandwidth is measured with."""
_NUM_ROUNDS = 5


@dataclass(frozen=True)
class CollectiveReport:
    """What a trial of the collectives found. All of them gave the right results."""

    world_size: int
    backend: str
    hosts: tuple[str, ...]
    """Each rank's host, in rank order."""
    joining_seconds: float
    """From the call until all ranks had met, without starting Python and importing torch."""
    barrier_seconds: float
    bandwidth_bytes_per_second: float
    """All-reduce bus bandwidth: 2 (n - 1) / n times the tensor's bytes, per second; what one link
    carries, comparable over any number of ranks (the definition of NVIDIA's nccl-tests)."""

    def __str__(self) -> str:
        hosts = counted(len(set(self.hosts)), "host")
        return (
            f"{self.world_size} ranks on {hosts} over {self.backend}: joined in "
            f"{self.joining_seconds:.1f} s, barrier {self.barrier_seconds * 1e3:.2f} ms, "
            f"all-reduce {self.bandwidth_bytes_per_second / 1e9:.2f} GB/s"
        )


def collective_test(num_processes: int) -> CollectiveReport:
    """Start `num_processes` ranks on this machine and try the collectives among them.

    Raises:
        MachineError: A rank failed or the ranks did not meet; where each of them stood is in the
            message.
    """
    with tempfile.TemporaryDirectory(prefix="burnish-doctor-") as folder:
        argv = [sys.executable, "-m", "burnish.collectives", folder]
        code = launch(num_processes, argv, grace_seconds=10.0)
        written = Path(folder) / "report.json"
        if code == 0 and written.is_file():
            values = json.loads(written.read_text())
            return CollectiveReport(**{**values, "hosts": tuple(values["hosts"])})
        stacks = "".join(path.read_text() for path in sorted(Path(folder).glob("stacks/*.txt")))
        raise MachineError(
            Problem(
                "collectives",
                f"{num_processes} ranks on this machine could not work together (exit code {code})\n{stacks}",
                "Look at what the ranks printed above. GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the "
                "network interface to use.",
            )
        )


def run_collectives(ranks: Ranks) -> CollectiveReport:
    """Try the collectives among the ranks that a launcher started; every rank calls this.

    Joins the process group if that has not been done, and stays in it.

    Raises:
        MachineError: The ranks do not meet, or a collective gave a wrong result.
    """
    device = pick_device(ranks)
    started = time.perf_counter()
    start_process_group(ranks, device, TIMEOUT_SECONDS)
    barrier(ranks)
    joining_seconds = time.perf_counter() - started
    _check_results(ranks, device)
    num_bytes = GPU_BYTES if device.type == "cuda" else CPU_BYTES
    return CollectiveReport(
        world_size=ranks.world_size,
        backend="nccl" if device.type == "cuda" else "gloo",
        hosts=tuple(gather_objects(socket.gethostname(), ranks)),
        joining_seconds=joining_seconds,
        barrier_seconds=_seconds(lambda: barrier(ranks), device),
        bandwidth_bytes_per_second=_bandwidth(ranks, device, num_bytes),
    )


def _check_results(ranks: Ranks, device: torch.device) -> None:
    """All-reduce, broadcast and all-gather of numbers whose results are known."""
    import torch
    import torch.distributed as dist

    n = ranks.world_size
    mine = torch.arange(1000, dtype=torch.float32, device=device) + ranks.rank
    total, first = mine.clone(), mine.clone()
    everything = [torch.empty_like(mine) for _ in range(n)]
    dist.all_reduce(total)
    dist.broadcast(first, src=0)
    dist.all_gather(everything, mine)
    base = torch.arange(1000, dtype=torch.float32, device=device)
    wrong = [
        name
        for name, right in {
            "all_reduce": torch.equal(total, base * n + n * (n - 1) / 2),
            "broadcast": torch.equal(first, base),
            "all_gather": all(torch.equal(part, base + rank) for rank, part in enumerate(everything)),
        }.items()
        if not right
    ]
    if wrong:
        raise MachineError(
            Problem(
                "collectives",
                f"rank {ranks.rank} on {socket.gethostname()} got wrong numbers from {', '.join(wrong)}",
                "Take this machine out, and try NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1 to find the link.",
            )
        )


def _bandwidth(ranks: Ranks, device: torch.device, num_bytes: int) -> float:
    import torch
    import torch.distributed as dist

    tensor = torch.zeros(num_bytes // 4, dtype=torch.float32, device=device)
    seconds = _seconds(lambda: dist.all_reduce(tensor), device)
    return 2 * (ranks.world_size - 1) / ranks.world_size * num_bytes / seconds


def _seconds(collective: Callable[[], object], device: torch.device) -> float:
    """Seconds per call, without the first, which connects."""
    import torch

    def run() -> None:
        collective()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    started = time.perf_counter()
    for _ in range(_NUM_ROUNDS):
        run()
    return (time.perf_counter() - started) / _NUM_ROUNDS


def main() -> None:
    """One rank of `collective_test`: `python -m burnish.collectives FOLDER`."""
    folder = Path(sys.argv[1])
    ranks = ranks_from_environment()
    try:
        with Watchdog(folder, ranks, 2 * TIMEOUT_SECONDS):
            report = run_collectives(ranks)
            stop_process_group()
    except MachineError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
    if ranks.is_main:
        (folder / "report.json").write_text(json.dumps(dataclasses.asdict(report)))


if __name__ == "__main__":
    main()
