"""A virtual environment for OpenRLHF, from the package index.

torch and what OpenRLHF does not pin are taken from the environment of this interpreter (a `.pth` file names
it), so both sides compute with the same torch; what it pins (transformers, deepspeed) is installed in the
versions that it asks for. flash-attn, ray, vllm and the other packages that its SFT never calls are left out.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import sysconfig
from pathlib import Path

OPENRLHF = "openrlhf==0.11.2"
PINNED = ("deepspeed==0.19.6", "transformers==5.15.0", "torchdata", "sympy", "pylatexenc")
"""What its SFT imports, as its metadata pins it."""
_READY = ".ready"


def default_folder() -> Path:
    """In the user's cache."""
    return Path.home() / ".cache" / "burnish" / "parity" / OPENRLHF.replace("==", "-")


def make_environment(folder: Path) -> Path:
    """Make it unless it stands already, and return its interpreter.

    Raises:
        subprocess.CalledProcessError: A package could not be installed; pip says why on stderr.
    """
    python = folder / "bin" / "python"
    shared = sysconfig.get_paths()["purelib"]
    recipe = hashlib.sha256("\n".join([OPENRLHF, *PINNED, shared]).encode()).hexdigest()
    ready = folder / _READY
    if ready.is_file() and ready.read_text("utf-8") == recipe:
        return python
    print(f"Making {folder} ({OPENRLHF}, {', '.join(PINNED)}) ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    site = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    (Path(site) / "shared.pth").write_text(shared + "\n", "utf-8")
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # deepspeed is built from source and looks for torch while it is: hence no build environment of its own.
    subprocess.run([*install, "wheel", "setuptools"], check=True)
    subprocess.run([*install, "--no-build-isolation", *PINNED], check=True)
    subprocess.run([*install, "--no-deps", OPENRLHF], check=True)
    ready.write_text(recipe, "utf-8")
    return python
