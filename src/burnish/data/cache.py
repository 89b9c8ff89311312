"""Prepared parts on disk: found by what they are made of, written whole or not at all.

A part's folder is named by a hash of everything that decides its content, so it never has to be
changed: another content of a file, another tokenizer, template or key is another folder. It is
written under a name of its own and renamed into place, so an interrupted run leaves nothing that a
later one could take for whole, and of two runs that race the first one's folder stays.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from burnish.durable import fsync_path
from burnish.errors import MachineError, Problem

log = logging.getLogger("burnish")

FORMAT_VERSION = 7
"""Part of every key. Raise it when the same input is to give other examples, counts or another layout."""
SUMMARY_FILE = "summary.json"
UNUSED_SECONDS = 30 * 24 * 3600
"""A part that no run has looked at for so long is cleared away: it can be prepared again."""
STALE_SECONDS = 24 * 3600
"""After this time a folder that another machine's run never finished is cleared away."""


def digest_of(value: Any) -> str:
    """xxh3-128 of a JSON value, in hex; the order of keys does not count."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return xxhash.xxh3_128_hexdigest(text.encode("ascii"))


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a part that is whole: its files have the sizes that were written; else None."""
    try:
        summary = json.loads((folder / SUMMARY_FILE).read_text("utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in summary["files_bytes"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return summary if sizes == summary["files_bytes"] else None


def mark_used(folder: Path) -> None:
    """Note that a run uses the part today, so that it is not cleared away."""
    with contextlib.suppress(OSError):  # somebody else's cache may be read-only
        os.utime(folder / SUMMARY_FILE)


def commit(staged: Path, folder: Path, summary: Mapping[str, Any]) -> None:
    """Write the summary, make everything durable, and rename the folder into place."""
    sizes = {file.name: file.stat().st_size for file in sorted(staged.iterdir())}
    text = json.dumps({**summary, "files_bytes": sizes}, ensure_ascii=True, indent=1)
    (staged / SUMMARY_FILE).write_text(text, "utf-8")
    for file in (*staged.iterdir(), staged):
        fsync_path(file)
    if folder.exists() and read_summary(folder) is None:
        shutil.rmtree(folder, ignore_errors=True)  # damaged: whoever reads it prepares anew too
    try:
        staged.rename(folder)
    except OSError:
        if read_summary(folder) is None:
            raise
        shutil.rmtree(staged, ignore_errors=True)  # another run was first, with the same content
    fsync_path(folder.parent)


def open_cache(cache: Path) -> None:
    """Make the cache's folder, and clear away what interrupted runs left in it.

    Raises:
        MachineError: The cache cannot be written.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _clear_stale(cache)
        _clear_unused(cache)
        probe = cache / f".staging-{_owner()}"
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise MachineError(
            Problem("data.cache_dir", f"{cache} cannot be written: {error}", "Set data.cache_dir.")
        ) from error


def _owner() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


@contextlib.contextmanager
def staging(cache: Path) -> Iterator[Path]:
    """A new folder in the cache to write into; gone at the end unless it was renamed."""
    staged = cache / f".staging-{_owner()}"
    staged.mkdir()
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _clear_stale(cache: Path) -> None:
    """Clear away what interrupted runs left: those of dead processes here, old ones elsewhere."""
    here = socket.gethostname()
    for folder in cache.glob(".staging-*"):
        host, _, rest = folder.name.removeprefix(".staging-").rpartition("-")[0].rpartition("-")
        with contextlib.suppress(OSError):
            if host == here and rest.isdigit():
                stale = not _is_alive(int(rest))
            else:
                stale = time.time() - folder.stat().st_mtime > STALE_SECONDS
            if stale:
                shutil.rmtree(folder, ignore_errors=True)


def _clear_unused(cache: Path) -> None:
    """Clear away parts that no run has used for `UNUSED_SECONDS`, and lock files as old.

    A run that still maps a part's files keeps them: they go from the disk when it ends.
    """
    before = time.time() - UNUSED_SECONDS
    for summary in cache.glob(f"*/{SUMMARY_FILE}"):
        with contextlib.suppress(OSError):
            if summary.stat().st_mtime < before:
                log.info("%s: prepared data, unused for 30 days, is cleared away", summary.parent)
                summary.unlink()  # first, so that a half-deleted part is never taken for whole
                shutil.rmtree(summary.parent, ignore_errors=True)
    for lock in cache.glob(".lock-*"):
        with contextlib.suppress(OSError):
            if lock.stat().st_mtime < before:
                lock.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def one_at_a_time(cache: Path, key: str) -> Iterator[None]:
    """Let one process at a time prepare a part; the others wait, and then find it prepared.

    Only saves work: where the file system has no locks, all prepare it, and one folder stays. A
    lock ends with its process; its empty file is removed by whoever held it last.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    file = cache / f".lock-{key}"
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("Another process is preparing this data; waiting for it.")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            log.debug("No lock on %s: %s", cache, error)
        try:
            yield
        finally:
            # Removed while it is held. Who waited for it finds the part prepared; who comes now makes a
            # lock of its own, and finds it prepared as well.
            file.unlink(missing_ok=True)
