"""What `plan` is asked for besides the config: on what machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PlanOptions:
    """The machine to plan for; this one, unless given."""

    gpus: int | None = None
    """How many GPUs to plan for; as many as `train` would use here unless given."""
    gpu_memory: str | None = None
    """Memory of each with its unit (GB, GiB, MB or MiB), `80GB` or `24GiB`; or a name, `H100`."""
    mfu: float = 0.4
    """Share of a GPU's peak that useful FLOPs reach, for the time."""
