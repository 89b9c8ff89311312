"""The kernels compiled, once for each machine and version of theirs, and loaded.

A second or two of `cc`, as DeepSpeed and torch.compile do with far larger programs. What was compiled is kept
in the user's cache under a name that holds everything it was made from.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import xxhash

log = logging.getLogger("burnish")

_SOURCES = Path(__file__).parent
_FLAGS = (
    "-std=gnu11", "-O3", "-fPIC", "-shared", "-fopenmp",
    "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16",
)  # fmt: skip
_AMX_FLAGS = ("-mamx-tile", "-mamx-bf16", "-DBURNISH_AMX")
_COMPILE_SECONDS = 120


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The library of kernels; None where this machine cannot run or compile them (`why_not` says which).

    The first call compiles them if nobody has; later ones and other processes take what is there.
    """
    reason = why_not()
    if reason is not None:
        log.debug("No CPU kernels: %s.", reason)
        return None
    try:
        # A container may keep AMX from its processes although the processor has it.
        with_amx = _load(amx=True) if torch.cpu._is_amx_tile_supported() else None
        return with_amx or _load(amx=False)
    except (OSError, subprocess.SubprocessError) as error:
        # A compiler that is too old, say, or a disk that is full.
        said = (getattr(error, "stderr", None) or str(error)).strip()[-500:]
        log.warning("CPU kernels could not be compiled; training is slower without them: %s", said)
        return None


def why_not() -> str | None:
    """What this machine lacks for the kernels; None if it has everything."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "they are for Linux on x86-64"
    if not torch.cpu._is_avx512_bf16_supported():
        return "this processor does not multiply bf16 in hardware"
    if _compiler() is None:
        return "there is no C compiler"
    return None if _threads_library() is not None else "torch does not compute with OpenMP"


def _compiler() -> str | None:
    named = os.environ.get("CC")
    names = (named,) if named else ("cc", "gcc", "clang")
    return next((found for name in names if (found := shutil.which(name))), None)


def _threads_library() -> str | None:
    """The OpenMP library that torch has loaded. With another one, each would keep threads of its own on the
    same cores, waiting for work at full speed."""
    with contextlib.suppress(OSError):
        mapped = (line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines())
        names = ("libgomp", "libiomp", "libomp")
        return next((path for path in mapped if Path(path).name.startswith(names)), None)
    return None


def _compiled(folder: Path, amx: bool) -> Path:
    """The compiled library in a folder, made now if it is not there.

    Raises:
        OSError: It cannot be written.
        subprocess.SubprocessError: The compiler failed.
    """
    compiler, threads = _compiler(), _threads_library()
    assert compiler is not None and threads is not None  # `why_not` has looked
    flags = (*_FLAGS, *(_AMX_FLAGS if amx else ()))
    sources = sorted(_SOURCES.glob("*.[ch]"))
    made_from = [*flags, compiler, threads, *(path.read_text("utf-8") for path in sources)]
    library = folder / f"{xxhash.xxh3_128_hexdigest(chr(0).join(made_from).encode())}.so"
    if library.is_file():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    programs = [str(path) for path in sources if path.suffix == ".c"]
    # In a name of its own until it is whole: other ranks may compile, or load, at the same time.
    with tempfile.NamedTemporaryFile(dir=library.parent, prefix=".", suffix=".so", delete=False) as staged:
        command = [compiler, *flags, *programs, threads, "-lm", "-o", staged.name]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
        Path(staged.name).replace(library)
    finally:
        Path(staged.name).unlink(missing_ok=True)
    return library


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "burnish" / "kernels"


def _load(amx: bool) -> ctypes.CDLL | None:
    """The library, compiled if need be; None where the system does not let this process multiply so."""
    try:
        loaded = ctypes.CDLL(str(_compiled(_cache(), amx)))
    except OSError:  # no home, or none that may be written to or executed from: for this process alone then
        with tempfile.TemporaryDirectory(prefix="burnish-kernels-") as folder:
            loaded = ctypes.CDLL(str(_compiled(Path(folder), amx)))
    return loaded if loaded.burnish_prepare() == 0 else None
