"""Making files and names survive a crash: fsync of files and of the folders that name them."""

from __future__ import annotations

import os
from pathlib import Path


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
