"""What numbers were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import date
from typing import Any


def machine() -> dict[str, Any]:
    """What the numbers were measured on, without naming it."""
    packages = ("burnish", "tokenizers", "transformers", "trl", "datasets", "numpy", "pyarrow")
    return {
        "date": date.today().isoformat(),
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "packages": {name: _version(name) for name in packages},
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "source"
