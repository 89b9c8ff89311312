"""Optional packages that a config asks for: missed before hours of work, not after. None is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from types import MappingProxyType

from burnish.config.schema import Config
from burnish.errors import MachineError, Problem

_NEEDS = MappingProxyType(
    {
        # for what: (the package, the key that asks, what does without)
        "deepspeed": ("deepspeed", "engine.kind", "use engine.kind: local"),
        "nf4": ("bitsandbytes", "adapter.quantize", "leave adapter.quantize out"),
        "adamw_8bit": ("bitsandbytes", "optim.name", "use optim.name: adamw"),
        "wandb": ("wandb", "log.trackers", "leave it out of log.trackers"),
        "mlflow": ("mlflow", "log.trackers", "leave it out of log.trackers"),
        "trackio": ("trackio", "log.trackers", "leave it out of log.trackers"),
    }
)


def require_packages(config: Config, num_ranks: int) -> None:
    """Nothing, if every optional package is installed that training on `num_ranks` ranks will import.

    Raises:
        MachineError: With a problem for each that is not.
    """
    problems = [problem for need in _asked(config, num_ranks) if (problem := _missing(need)) is not None]
    if problems:
        raise MachineError(*problems, everywhere=True)


def require_package(need: str) -> None:
    """Nothing, if the package for one need (`deepspeed`, `nf4`, `adamw_8bit`, or a tracker) is installed.

    Raises:
        MachineError: It is not.
    """
    problem = _missing(need)
    if problem is not None:
        raise MachineError(problem)


def _asked(config: Config, num_ranks: int) -> Iterator[str]:
    if config.engine.uses_deepspeed(num_ranks):
        yield "deepspeed"
    if config.adapter is not None and config.adapter.quantize is not None:
        yield config.adapter.quantize
    yield from (name for name in (config.optim.name, *config.log.trackers) if name in _NEEDS)


def _missing(need: str) -> Problem | None:
    package, key, otherwise = _NEEDS[need]
    if importlib.util.find_spec(package) is not None:
        return None
    what = (
        f"{package} is not installed"
        if need == package
        else f"{need} needs {package}, which is not installed"
    )
    return Problem(key, what, f"Install it with pip install 'burnish[{package}]', or {otherwise}.")
