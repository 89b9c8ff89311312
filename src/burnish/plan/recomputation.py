"""How much the backward computes again where the config leaves it to the plan. Pure arithmetic."""

from __future__ import annotations

from typing import Literal

from burnish.config.schema import Config
from burnish.plan.counts import DEFAULT_MICRO_TOKENS
from burnish.plan.memory import estimate_memory
from burnish.plan.shapes import ModelShape

Level = Literal["none", "light", "full"]

LEVELS: tuple[Level, ...] = ("none", "light", "full")
"""From the fastest to the smallest. `offload` is not among them: whether the host has room for a model's
inputs and how fast they travel there, the plan does not know."""
COMPILED_LEVELS: tuple[Level, ...] = ("none", "full")
"""Of compiled layers: what `light` computes again, the compiler does with `none`."""


def with_recomputation(config: Config, level: Level) -> Config:
    """The config with `model.activation_checkpointing` set."""
    model = config.model.model_copy(update={"activation_checkpointing": level})
    return config.model_copy(update={"model": model})


def choose_recomputation(
    config: Config,
    shape: ModelShape,
    world_size: int,
    usable_bytes: float | None,
    device_type: str = "cuda",
) -> Level:
    """The fastest level with which a run fits, or the smallest where none does.

    Args:
        config: As resolved otherwise; a forward of `data.max_tokens` and of `batch.micro_tokens` has to fit
            (of its default, where that is left to the plan).
        shape: The model.
        world_size: All ranks.
        usable_bytes: Of each rank's device; None where that is not known: then nothing is computed again.
        device_type: `cuda` or `cpu`.
    """
    if usable_bytes is None:
        return "none"
    asked = config.batch.micro_tokens
    tokens = max(config.data.max_tokens, asked if isinstance(asked, int) else DEFAULT_MICRO_TOKENS)
    levels = COMPILED_LEVELS if config.model.compile is True else LEVELS
    for level in levels:
        trial = with_recomputation(config, level)
        needed = estimate_memory(trial, shape, world_size, tokens, device_type=device_type).device.total
        if needed <= usable_bytes:
            return level
    return levels[-1]
