"""What the config leaves to the memory plan: level of recomputation and tokens of a forward. Pure."""

from __future__ import annotations

from burnish.config.schema import Config
from burnish.plan.counts import DEFAULT_MICRO_TOKENS
from burnish.plan.describe import bytes_text
from burnish.plan.memory import USABLE_MEMORY, estimate_memory
from burnish.plan.recomputation import choose_recomputation, with_recomputation
from burnish.plan.shapes import ModelShape

_MOST_TOKENS = {"cuda": 65_536, "cpu": DEFAULT_MICRO_TOKENS}
"""Tokens of a forward beyond which nothing is gained: a CPU is busy with the default already."""


def fit_micro_tokens(
    config: Config, shape: ModelShape, world_size: int, memory_bytes: int, device_type: str = "cuda"
) -> int:
    """Tokens of a forward for `micro_tokens: auto` on a device of known memory.

    The largest power of two that the memory plan has room for, and never fewer than `data.max_tokens`: the
    longest example has to go through. A pure function, so that every rank and every restart finds the same.
    """
    least = config.data.max_tokens
    fitting = least
    tokens = 1 << (least - 1).bit_length()
    while tokens <= _MOST_TOKENS.get(device_type, DEFAULT_MICRO_TOKENS):
        needed = estimate_memory(config, shape, world_size, tokens, device_type=device_type).device.total
        if needed > memory_bytes * USABLE_MEMORY:
            break
        fitting, tokens = tokens, tokens * 2
    return fitting


def resolve_auto(
    config: Config, shape: ModelShape, world_size: int, memory_bytes: int | None, device_type: str = "cuda"
) -> Config:
    """The config with what is left to the memory plan filled in; a pure function of its arguments.

    `activation_checkpointing: auto` becomes the fastest level with which a run fits. Then
    `micro_tokens: auto` becomes a number, where the device's memory is known.

    Args:
        config: As the user gave it.
        shape: The model.
        world_size: All ranks.
        memory_bytes: That each rank may use; None where it is not known: then nothing is recomputed.
        device_type: `cuda` or `cpu`.
    """
    if config.model.activation_checkpointing == "auto":
        usable = None if memory_bytes is None else memory_bytes * USABLE_MEMORY
        level = choose_recomputation(config, shape, world_size, usable, device_type)
        config = with_recomputation(config, level)
    by_tokens = config.batch.micro_tokens == "auto" and config.batch.micro_examples is None
    if memory_bytes is None or not by_tokens:
        return config
    tokens = fit_micro_tokens(config, shape, world_size, memory_bytes, device_type)
    batch = config.batch.model_copy(update={"micro_tokens": tokens})
    return config.model_copy(update={"batch": batch})


def explain_auto(asked: Config, resolved: Config, memory_bytes: int | None) -> tuple[str, ...]:
    """What was left to the plan, what it chose and why: a sentence each.

    Args:
        asked: As the user gave it.
        resolved: By `resolve_auto`, and by `resolve_compile`.
        memory_bytes: What each rank may use, as given there.
    """
    have = "unknown memory" if memory_bytes is None else f"{bytes_text(memory_bytes)} a rank"
    chosen: list[str] = []
    if asked.model.activation_checkpointing == "auto":
        level = resolved.model.activation_checkpointing
        why = (
            "the fastest level that the plan fits into"
            if level != "full"
            else "the level that needs least of"
        )
        if memory_bytes is None:
            why = "nothing is computed again with"
        chosen.append(f"model.activation_checkpointing: {level}, {why} {have}")
    if resolved.batch.micro_tokens != asked.batch.micro_tokens:
        what = f"batch.micro_tokens: {resolved.batch.micro_tokens}"
        least = resolved.batch.micro_tokens == asked.data.max_tokens
        why = "the longest example" if least else "the most that pay and that the plan fits into"
        chosen.append(f"{what}, {why}" + ("" if least else f" {have}"))
    if asked.model.compile == "auto" and resolved.model.compile is True:
        chosen.append("model.compile: true, the run is long enough to gain more than a minute's compiling")
    return tuple(chosen)
