"""Errors that are the user's to mend: one clear message, a documented exit code, no traceback.

Everything in Burnish may import this module; it imports nothing of it, and nothing heavy.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

EXIT_DONE = 0
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_ENVIRONMENT = 4
EXIT_STOPPED_ITSELF = 5
EXIT_TRY_AGAIN = 75
EXIT_SIGNAL = 143

_DISK_FAILS = (errno.EIO, errno.ESTALE)
_LOST_RANK = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection was likely closed",  # the store that ranks meet in; rank 0 keeps it
    "remote process exited",  # NCCL
)


def counted(num: int, noun: str) -> str:
    """A number and what it counts: `1 row`, `1,024 rows`."""
    return f"{num:,} {noun}" if num == 1 else f"{num:,} {noun}s"


def first_few(names: Sequence[object], limit: int = 6) -> str:
    """Names as a message lists them, the first `limit` of them: `a, b, ...`."""
    return ", ".join(map(str, names[:limit])) + (", ..." if len(names) > limit else "")


class BurnishError(Exception):
    """Base of every error that ends the program with a message instead of a traceback."""

    exit_code: int = 1
    heading: str = ""
    """What stands before a message of several parts: how many there are, of what."""
    everywhere: bool = False
    """Whether every rank raises this same error, so that one of them may tell it for all."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it is, what was found there, and what to do about it."""

    where: str
    """A config key (`optim.lr`) or a place in a file (`train.jsonl:12`)."""
    what: str
    """What is wrong, the offending value included."""
    cure: str = ""
    """What to do about it; empty only where `what` already says it."""

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n    {self.cure}" if self.cure else head


class ProblemsError(BurnishError):
    """An error made of one or more problems, all reported at once.

    Args:
        problems: What is wrong; a plain string is a problem without a place.
        heading: Where the number of `problems` is not the number of things to mend.
        everywhere: Every rank raises this same error, so that one of them may tell it for all.
    """

    def __init__(
        self, *problems: Problem | str, heading: str | None = None, everywhere: bool = False
    ) -> None:
        self.everywhere = everywhere
        self.problems = tuple(p if isinstance(p, Problem) else Problem("", p) for p in problems)
        several = counted(len(problems), "problem") if len(problems) > 1 else ""
        self.heading = several if heading is None else heading
        super().__init__("\n".join(str(p) for p in self.problems))


class ConfigError(ProblemsError):
    """The config cannot be what the user means: an unknown key, a wrong type, a contradiction."""

    exit_code = EXIT_CONFIG


class DataError(ProblemsError):
    """The data, the template or the tokenizer cannot be trained on as they are."""

    exit_code = EXIT_DATA


class MachineError(ProblemsError):
    """The machine lacks something: a device, a package, disk space, a working collective."""

    exit_code = EXIT_ENVIRONMENT


class CheckpointError(ProblemsError):
    """A checkpoint is missing, damaged, or belongs to another run."""

    exit_code = EXIT_ENVIRONMENT


class TrainingStoppedError(ProblemsError):
    """Training stopped itself, for example because losses were not finite too often."""

    exit_code = EXIT_STOPPED_ITSELF


class InterruptedRunError(ProblemsError):
    """A signal asked the run to stop; it saved a checkpoint and stopped."""

    exit_code = EXIT_SIGNAL


class BusyError(ProblemsError):
    """Somebody else has what this run needs; once they are done, the same command works."""

    exit_code = EXIT_TRY_AGAIN


class LostRankError(ProblemsError):
    """Another rank is gone. Why is in that rank's own message, and in its exit code."""

    exit_code = 1  # tells least: whoever started the ranks reports the other one's


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What fails in the block is that `path`, which the user has named, cannot be written.

    Raises:
        MachineError: With the path and the system's reason.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        cure = "Choose another place, or free disk space."
        raise MachineError(Problem(str(path), f"cannot be written: {reason}", cure)) from error


@contextmanager
def machine_limits(verb: str) -> Iterator[None]:
    """Memory or disk that runs out anywhere in the block is no bug: an error of the machine, with a cure.
    Nor is it one of this rank that another one has gone.

    Nor is a name that no file can have: what somebody gave for a path is something else.

    Imports nothing: torch's own errors are only looked for where torch has been loaded.

    Args:
        verb: What was running; the keys that save memory are those of `train`.

    Raises:
        MachineError: No memory on the GPU or the host, or no disk space, or a disk that fails.
        ConfigError: A name is longer than a file's may be.
        LostRankError: A collective ended because another rank did.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if (signs := _signs_of_a_lost_rank(error)) is not None:
            what = f"another rank ended, so this one does too ({signs})"
            cure = "Its own message says why, where it had time for one. Then run the same command again."
            raise LostRankError(Problem("", what, cure)) from error
        if not _is_out_of_memory(error):
            raise
        what = str(error).strip().splitlines()[0] if str(error).strip() else "the host has no more"
        raise MachineError(Problem("out of memory", what, _more_memory(verb))) from error
    except OSError as error:
        where = str(error.filename or "disk")
        if error.errno == errno.ENAMETOOLONG:
            cure = "A path is wanted here. Look at what was given for one."
            raise ConfigError(
                Problem(f"{where[:80]}…", "is longer than a file's name may be", cure)
            ) from error
        if error.errno in _DISK_FAILS:
            what = f"cannot be read or written: {error.strerror}"
            raise MachineError(Problem(where, what, "The disk or its server fails: mend that.")) from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        cure = "Free disk space, or choose another place."
        raise MachineError(Problem(where, f"cannot be written: {error.strerror}", cure)) from error


def _signs_of_a_lost_rank(error: BaseException) -> str | None:
    """What torch says in a collective whose other end has gone; None of any other error."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return next((sign for sign in _LOST_RANK if sign in str(error)), None)


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    # torch's CPU allocator has no error class of its own.
    return "DefaultCPUAllocator" in str(error) and "memory" in str(error)


def _more_memory(verb: str) -> str:
    if verb in ("chat", "merge", "view", "check"):
        return "Free memory, or use a machine or GPU with more of it."
    return (
        "Set batch.micro_tokens lower, or model.activation_checkpointing: full. "
        "`burnish plan CONFIG --gpu-memory 80GB` tells what fits."
    )
