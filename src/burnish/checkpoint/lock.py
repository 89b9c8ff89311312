"""One run at a time in a folder: two would write into each other's checkpoints.

The lock is the kernel's, on the open file `.lock` in the run's folder. It ends with the process that holds
it, however that ends: a file that is left locks nobody out.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from burnish.errors import BusyError, Problem, writing
from burnish.runtime import Ranks, gather_objects, log

LOCK_NAME = ".lock"


@contextmanager
def only_run(run_dir: Path, ranks: Ranks) -> Iterator[None]:
    """Keep the folder to this run while the block runs; rank 0 holds the lock, all ranks know of it.

    Raises:
        BusyError: Another process writes there; every rank raises it.
        MachineError: The lock's file cannot be written.
    """
    with ExitStack() as held:
        holder = None
        if ranks.is_main:
            try:
                held.enter_context(locked(run_dir))
            except BusyError as error:
                holder = error.problems[0].what
        holder = gather_objects(holder, ranks)[0]
        if holder is not None:
            raise _busy(run_dir, holder)
        yield


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the folder's lock while the block runs; a folder that was not there and is left empty goes again.

    Where a file system has no locks, nothing is held.

    Raises:
        BusyError: Another process holds it.
        MachineError: The lock's file cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    path = run_dir / LOCK_NAME
    is_new = not run_dir.exists()
    with writing(path):
        run_dir.mkdir(parents=True, exist_ok=True)
        file = _open(path)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise _busy(run_dir, f"another run is at work there ({_holder(file)})") from error
            log.debug("No lock on %s: %s", path, error)
        if not _is_in_place(file, path):
            raise _busy(run_dir, "another run is at work there (it is just ending)")
        with writing(path):
            _name_holder(file)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if is_new:
                with suppress(OSError):  # it holds something: more than a run that was refused
                    run_dir.rmdir()


def _open(path: Path) -> TextIO:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8")


def _is_in_place(file: TextIO, path: Path) -> bool:
    """Whether the file that was locked is the one that others will find: its last holder removes it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(file: TextIO) -> str:
    try:
        return file.read().strip() or "it has just begun"
    except (OSError, UnicodeDecodeError):
        return "unknown"


def _name_holder(file: TextIO) -> None:
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()


def _busy(run_dir: Path, what: str) -> BusyError:
    cure = "Wait until it has ended, or choose another output_dir."
    return BusyError(Problem(str(run_dir), what, cure), everywhere=True)
