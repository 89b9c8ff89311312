"""Several workers on this machine, without another launcher. No torch unless there is a GPU.

The workers get the environment that torchrun sets, so they cannot tell the difference. When one
dies the others are stopped: a worker that waits in a collective for a dead one would wait for the
process group's timeout, half an hour of silence. When this process itself is killed, they are asked
to stop as well: left alone, they would still train when the same command is started again.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from burnish.config.schema import LaunchConfig
from burnish.errors import ConfigError, Problem, counted
from burnish.rendezvous import in_slurm_step
from burnish.runtime import available_cores, log

GRACE_SECONDS = 60.0
"""How long workers may take to save and end, once asked to or once one of them has died."""
POLL_SECONDS = 0.1
FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG = 1
_GPU_DEVICES = ("nvidia[0-9]*", "kfd", "dxg")
"""Files in /dev where torch may find a GPU: NVIDIA's driver, AMD's, Windows' (for Linux below it)."""


def num_workers(launch: LaunchConfig, environ: Mapping[str, str] = os.environ) -> int:
    """How many workers `launch` should start; 1 means that this process does the work itself.

    Under a launcher (torchrun, deepspeed, a Slurm step) it is always 1. `auto` is one per GPU.

    Raises:
        ConfigError: There are fewer GPUs than that, but some: NCCL takes no two ranks on one.
    """
    if "RANK" in environ or in_slurm_step(environ):
        return 1
    if launch.num_processes != "auto":
        _require_gpus(launch.num_processes)
        return launch.num_processes
    return max(1, num_gpus())


def _require_gpus(num_processes: int) -> None:
    gpus = num_gpus() if num_processes > 1 else 0
    if 0 < gpus < num_processes:
        what = f"is {num_processes}, with {counted(gpus, 'GPU')} here: NCCL takes one process on each"
        cure = "Leave it at auto; to train on the CPU: CUDA_VISIBLE_DEVICES= burnish train …"
        raise ConfigError(Problem("launch.num_processes", what, cure))


def num_gpus() -> int:
    """GPUs that torch can use. torch takes seconds to import, so only where a GPU may be."""
    if not any(any(Path("/dev").glob(name)) for name in _GPU_DEVICES):
        return 0
    import torch

    return torch.cuda.device_count()


def launch(num_processes: int, argv: Sequence[str], grace_seconds: float = GRACE_SECONDS) -> int:
    """Run `argv` as `num_processes` workers and wait for all of them.

    SIGTERM and SIGINT are passed on to every worker. When a worker fails, the rest get SIGTERM and,
    after `grace_seconds`, SIGKILL.

    Args:
        num_processes: Workers to start, ranks 0 to num_processes - 1.
        argv: The command of a worker, `[sys.executable, "-m", "burnish", …]`.
        grace_seconds: Time between asking and killing.

    Returns:
        0, or the exit code of the worker that failed first (128 + n if signal n ended it).
    """
    environment = {
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        # Every worker would otherwise start a thread per core.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads_per_worker(num_processes))),
    }
    workers: list[subprocess.Popen[bytes]] = []
    before_start = _asked_when_orphaned()
    with _passing_signals_to(workers):
        for rank in range(num_processes):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # A session of its own, or Ctrl-C would reach a worker twice: from the terminal and
            # from here.
            workers.append(
                subprocess.Popen(
                    list(argv),
                    env={**os.environ, **environment, **ranks},
                    start_new_session=True,
                    preexec_fn=before_start,  # noqa: PLW1509 - one call into libc, looked up before
                )
            )
        try:
            return _wait(workers, grace_seconds)
        finally:
            _kill(workers)


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def threads_per_worker(num_processes: int) -> int:
    """The cores this process may use, divided among the workers."""
    return max(1, available_cores() // num_processes)


def _wait(workers: Sequence[subprocess.Popen[bytes]], grace_seconds: float) -> int:
    """The first failure's exit code, once all workers have ended or their time is up."""
    cause = 0
    deadline = float("inf")
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
        if cause == 0 and (cause := _cause(workers)) != 0:
            deadline = time.monotonic() + grace_seconds
            if any(worker.poll() is None for worker in workers):
                log.warning("A worker ended with exit code %d; stopping the others.", cause)
            _send(workers, signal.SIGTERM)
        time.sleep(POLL_SECONDS)
    if any(worker.poll() is None for worker in workers):
        log.warning("Workers did not end within %.0f s; killing them.", grace_seconds)
    return cause or _cause(workers)


def _cause(workers: Sequence[subprocess.Popen[bytes]]) -> int:
    """The exit code that tells most among the workers that have failed so far; 0 if none has.

    A worker whose partner dies in a collective fails with a traceback, exit code 1, within the
    blink between two looks; so any other code is the likelier cause.
    """
    codes = [_exit_code(code) for worker in workers if (code := worker.poll())]
    return next((code for code in codes if code != 1), codes[0] if codes else 0)


def _exit_code(returncode: int) -> int:
    return returncode if returncode >= 0 else 128 - returncode


def _asked_when_orphaned() -> Callable[[], object] | None:
    """What a worker calls before it starts, so that it gets SIGTERM when this process ends in whatever way.

    Only Linux has that. Looked up here: between fork and exec a process should do little.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _send(workers: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(number)


def _kill(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    _send(workers, signal.SIGKILL)
    for worker in workers:
        worker.wait()


@contextmanager
def _passing_signals_to(workers: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Hand SIGTERM and SIGINT on to the workers instead of dying of them."""

    def pass_on(number: int, _frame: FrameType | None) -> None:
        _send(workers, number)

    before = {number: signal.signal(number, pass_on) for number in FORWARDED_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
