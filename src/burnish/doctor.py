"""What this machine has and what it lacks: devices, driver, compiler, packages, disk, collectives.

Every finding is a value; nothing here prints. `examine` looks at one machine, `examine_ranks` lets
ranks talk to each other.
"""

from __future__ import annotations

import importlib.metadata
import ipaddress
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from burnish.collectives import collective_test, run_collectives
from burnish.errors import ConfigError, MachineError, Problem
from burnish.launch import threads_per_worker
from burnish.runtime import Ranks, cxx_compiler

GIB = 2**30
MIN_DISK_BYTES = 20 * GIB
"""Less free disk than this is worth a word: a 7B model in bf16 alone takes 13 GiB."""
MIN_SHM_BYTES = GIB
"""NCCL and data workers share memory through /dev/shm; containers come with 64 MiB of it."""
MIN_OPEN_FILES = 4096
_OFTEN_WANTED = {
    "deepspeed": "several processes (engine.kind: deepspeed)",
    "bitsandbytes": "adapter.quantize and optim.name: adamw_8bit",
}
_TRACKERS = ("wandb", "mlflow", "trackio")
_COMMAND_SECONDS = 20.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    value: str
    """What is there, in words."""
    state: Literal["good", "note", "bad"] = "good"
    """bad: training will not work; note: something may be missed."""
    cure: str = ""

    def __str__(self) -> str:
        mark = {"good": "ok  ", "note": "note", "bad": "BAD "}[self.state]
        line = f"{mark}  {self.name:<12} {self.value}"
        return f"{line}\n{'':<19}{self.cure}" if self.cure else line


def examine(folder: Path) -> list[Finding]:
    """Everything about this machine that matters for a run that writes to `folder`."""
    return [
        *_look_at_system(),
        *_look_at_packages(),
        *_look_at_devices(),
        *_look_at_compiler(),
        *_look_at_disk(folder),
        *_look_at_network(),
    ]


def examine_ranks(ranks: Ranks, num_processes: int | None = None) -> Finding:
    """Let ranks talk: those that a launcher started, or else ones started here.

    Args:
        ranks: This process among those that a launcher started; every one of them calls this.
        num_processes: How many to start without a launcher; None is one per GPU, or two on a CPU.

    Raises:
        ConfigError: That is no number of processes.
    """
    if num_processes is not None and num_processes < 1:
        raise ConfigError(Problem("--ranks", f"is {num_processes}", "Give at least 1, or leave it out."))
    try:
        if ranks.world_size > 1:
            return Finding("collectives", str(run_collectives(ranks)))
        count = _num_devices() if num_processes is None else num_processes
        if count < 2:
            what = "one device: there is nobody to talk to"
            return Finding("collectives", what, "note", "Under srun or torchrun all ranks are tried.")
        return Finding("collectives", str(collective_test(count)))
    except MachineError as error:
        problem = error.problems[0]
        return Finding("collectives", problem.what, "bad", problem.cure)


def _num_devices() -> int:
    """Ranks that this machine is for: one per GPU; on a CPU two, to have something to try."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 2


def _look_at_system() -> Iterator[Finding]:
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("system", f"{platform.platform()}, host {socket.gethostname()}")
    yield Finding("python", f"{platform.python_version()}, {sys.executable}")
    yield Finding("cpu", f"{threads_per_worker(1)} cores, {memory_bytes / GIB:.0f} GiB memory")
    import resource

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < MIN_OPEN_FILES:
        yield Finding("open files", f"at most {files}", "note", f"Raise it: ulimit -n {16 * MIN_OPEN_FILES}")


def _look_at_packages() -> Iterator[Finding]:
    if _version("burnish") is None:
        cure = "pip install burnish (or -e . in a checkout), to have its packages checked."
        yield Finding("packages", "burnish runs from its source, without being installed", "note", cure)
        return
    requirements = importlib.metadata.requires("burnish") or []
    needed = [re.split(r"[^\w.-]", r, maxsplit=1)[0] for r in requirements if "extra ==" not in r]
    versions = {name: _version(name) for name in needed}
    missing = sorted(name for name, version in versions.items() if version is None)
    if missing:
        yield Finding("packages", f"missing: {', '.join(missing)}", "bad", "pip install burnish")
    yield Finding("packages", ", ".join(f"{name} {v}" for name, v in versions.items() if v is not None))
    for name in (*_OFTEN_WANTED, *_TRACKERS):
        version = _version(name)
        if version is not None:
            yield Finding(name, version)
        elif name in _OFTEN_WANTED:
            what = f"not installed; needed for {_OFTEN_WANTED[name]}"
            yield Finding(name, what, "note", f"pip install {name}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _look_at_devices() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("torch", f"cannot be imported: {error}", "bad", "pip install torch")
        return
    driver = _nvidia_driver()
    if not torch.cuda.is_available():
        yield from _explain_no_gpu(driver, torch.version.cuda)
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    yield Finding("driver", f"{driver or 'unknown'}, torch built for {build}")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        bf16 = device.major >= 8 or torch.version.hip is not None
        yield Finding(
            f"gpu {index}",
            f"{device.name}, {device.total_memory / GIB:.0f} GiB, capability {device.major}.{device.minor}",
            "good" if bf16 else "note",
            "" if bf16 else "No bf16 in hardware: set model.dtype: fp16.",
        )


def _explain_no_gpu(driver: str | None, cuda_build: str | None) -> Iterator[Finding]:
    if driver is None:
        yield Finding("device", "no GPU; training runs on the CPU", "note")
    elif cuda_build is None:
        cure = "Install a CUDA build of torch: see https://pytorch.org/get-started."
        yield Finding("device", f"driver {driver}, but this torch is built for CPUs only", "bad", cure)
    else:
        cure = "Check CUDA_VISIBLE_DEVICES, and that the driver is new enough for this CUDA."
        what = f"driver {driver} and a torch for CUDA {cuda_build}, but no GPU can be used"
        yield Finding("device", what, "bad", cure)


def _nvidia_driver() -> str | None:
    """The driver's version, None where there is none."""
    answer = _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return answer if answer and re.match(r"\d", answer) else None


def _look_at_compiler() -> Iterator[Finding]:
    """DeepSpeed and Triton compile what they need on first use."""
    compiler = cxx_compiler()
    if compiler is None:
        cure = "Only optimizer offload, model.compile and custom kernels need one: apt install g++."
        yield Finding("compiler", "no C++ compiler", "note", cure)
    else:
        yield Finding("compiler", _first_line([compiler, "--version"]) or compiler)
    yield from _look_at_kernels()
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        yield Finding("nvcc", nvcc)


def _look_at_kernels() -> Iterator[Finding]:
    """Those that training on a CPU compiles for itself."""
    try:
        from burnish.model.native.build import kernels, why_not
    except ImportError:  # without torch, of which there is a finding already
        return
    if kernels() is not None:
        yield Finding("cpu kernels", "compiled for this processor")
    else:
        reason = why_not() or "they could not be compiled here"
        yield Finding("cpu kernels", f"none: {reason}; training on the CPU is slower in bf16", "note")


def _first_line(command: list[str]) -> str | None:
    """The first line that a command prints; None if it is not there, fails or does not end."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def _look_at_disk(folder: Path) -> Iterator[Finding]:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free_bytes = shutil.disk_usage(place).free
    if not os.access(place, os.W_OK):
        yield Finding("disk", f"{place} cannot be written to", "bad", "Set output_dir to a folder of yours.")
    elif free_bytes < MIN_DISK_BYTES:
        cure = "burnish plan says how much the checkpoints of a run take."
        yield Finding("disk", f"{free_bytes / GIB:.1f} GiB free at {place}", "note", cure)
    else:
        yield Finding("disk", f"{free_bytes / GIB:.0f} GiB free at {place}")
    shared = Path("/dev/shm")
    if shared.is_dir():
        shared_bytes = shutil.disk_usage(shared).total
        if shared_bytes < MIN_SHM_BYTES:
            cure = "Give the container more: docker run --shm-size 16g, or --ipc host."
            yield Finding("/dev/shm", f"{shared_bytes / 2**20:.0f} MiB", "note", cure)


def _look_at_network() -> Iterator[Finding]:
    """What several hosts need to find each other."""
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        cure = "Several hosts need it: put the name into /etc/hosts, or set GLOO_SOCKET_IFNAME."
        yield Finding("network", f"this host's name {host} has no address", "note", cure)
    else:
        if ipaddress.ip_address(address).is_loopback:
            cure = "For several hosts set GLOO_SOCKET_IFNAME to the interface that reaches the others."
            yield Finding("network", f"{host} is {address}, which other hosts cannot reach", "note", cure)
        else:
            yield Finding("network", f"{host} is {address}")
    names = ("NCCL_", "GLOO_", "MASTER_", "SLURM_JOB_NODELIST", "CUDA_VISIBLE_DEVICES")
    shown = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(names)]
    if shown:
        yield Finding("environment", " ".join(shown))
