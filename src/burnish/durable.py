"""Files that are there when they are needed: folders that can be written, modes that let others read, and
fsync, so that files and the folders that name them survive a crash."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

_MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")


def fsync_path(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folders(root: Path) -> None:
    """`fsync_path` for a folder and every folder in it, the innermost first."""
    for folder, _, _ in os.walk(root, topdown=False):
        fsync_path(Path(folder))


def replace_text(path: Path, text: str) -> None:
    """Write a file whole, or leave the one that is there: a disk may be full, a run be killed.

    Raises:
        OSError: It cannot be written.
    """
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staged.write_text(text, encoding="utf-8")
        fsync_path(staged)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def try_writing(folder: Path) -> None:
    """Make a folder and a file in it, and take away again what was not there.

    Only trying tells: of a folder in `/proc`, on a full disk or under another user's, permissions do not.

    Raises:
        OSError: It cannot be made, or not be written.
    """
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    finally:
        for path in missing:  # the innermost first
            with contextlib.suppress(OSError):  # never made, or somebody has put something in it by now
                path.rmdir()


def give_usual_mode(files: Iterable[Path]) -> None:
    """Give files the mode that `open` gives under the umask (and the folder's default ACL).

    safetensors 0.8 writes a temporary file, which only its owner may read, and renames it: results that
    others were to load could not be. To be removed when it keeps to the umask.
    """
    for path in list(files):
        probe = path.with_name(f".{path.name}.mode")
        probe.touch()
        mode = stat.S_IMODE(probe.stat().st_mode)
        probe.unlink()
        if stat.S_IMODE(path.stat().st_mode) != mode:  # not every file system takes a chmod
            path.chmod(mode)


def unreadable_files(folder: Path) -> list[Path]:
    """Files of a model's folder that this user may not read.

    Whoever opens one with safetensors is told that there is no such file.

    Raises:
        PermissionError: The folder itself cannot be looked into.
    """
    found = (path for path in sorted(folder.iterdir()) if path.suffix in _MODEL_SUFFIXES)
    return [path for path in found if path.is_file() and not os.access(path, os.R_OK)]
