"""What each launcher tells a process about the others, in one language: torchrun's.

torchrun and the deepspeed launcher set `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and kin. srun sets
variables of its own and names no address; here it is worked out, without asking scontrol (which
containers often lack).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping, Sequence

from burnish.errors import MachineError, Problem

FIRST_PORT = 15_000
"""Ports derived from a job's number start here and end below 32768, where Linux starts to hand
out ports by itself."""
NUM_PORTS = 15_000
_BRACKET = re.compile(r"\[(\d+)[^\]]*\]")


def in_slurm_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of several.

    Slurm's variables are believed only inside a job step, so that a plain `burnish train` typed
    inside an allocation stays one process.
    """
    return "SLURM_STEP_ID" in environ and num_slurm_tasks(environ) > 1


def num_slurm_tasks(environ: Mapping[str, str]) -> int:
    """Tasks of this job step. `SLURM_NTASKS` alone may speak of the allocation: in a shell that
    `srun --pty` opened, the step has one task and the allocation many."""
    return int(environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1")))


def first_host(node_list: str) -> str:
    """The first host of a Slurm node list.

    The list is compressed: `gpu[03-05,09],login1` is gpu03, gpu04, gpu05, gpu09, login1, and
    `rack[1-2]node[7-8]` starts with rack1node7.

    Raises:
        ValueError: No host can be read from it.
    """
    filled = _BRACKET.sub(lambda match: match[1], node_list.strip())
    host = filled.split(",", 1)[0]
    if not re.fullmatch(r"[\w.:-]+", host):
        raise ValueError(f"no host name can be read from the node list {node_list!r}")
    return host


def slurm_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set, from what srun did set.

    Rank 0 runs on the step's first node (srun's block and cyclic distributions both start there).
    The port follows from the job's and step's numbers, so that every task derives the same one and
    two jobs that share a node rarely do.

    Args:
        environ: The environment of a process for which `in_slurm_step` holds.

    Raises:
        MachineError: A variable that srun always sets is missing or makes no sense.
    """
    try:
        node_list = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
        number = int(environ["SLURM_JOB_ID"]) * 7 + int(environ["SLURM_STEP_ID"])
        return {
            "RANK": str(int(environ["SLURM_PROCID"])),
            "LOCAL_RANK": str(int(environ["SLURM_LOCALID"])),
            "WORLD_SIZE": str(num_slurm_tasks(environ)),
            "MASTER_ADDR": first_host(node_list),
            "MASTER_PORT": str(FIRST_PORT + number % NUM_PORTS),
        }
    except (KeyError, ValueError) as error:
        raise MachineError(
            Problem(
                "srun",
                f"this looks like a Slurm job step, but its variables cannot be read: {error}",
                "Set MASTER_ADDR, MASTER_PORT, RANK, LOCAL_RANK and WORLD_SIZE yourself.",
            )
        ) from error


def complete_environment(environ: MutableMapping[str, str]) -> None:
    """Under srun, add what torchrun would have set; what is already there wins.

    torch and DeepSpeed read these variables themselves, so they have to stand in the environment.
    """
    if "RANK" in environ or not in_slurm_step(environ):
        return
    for name, value in slurm_environment(environ).items():
        environ.setdefault(name, value)


def without_launcher_flags(argv: Sequence[str]) -> list[str]:
    """The arguments without the `--local_rank=N` that the deepspeed launcher puts in front of a
    program's own. `LOCAL_RANK` in the environment says the same."""
    return [arg for arg in argv if not re.fullmatch(r"--local[_-]rank=\d+", arg)]
