"""What to change so that a run fits: lines for the config, those that cost least first. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from burnish.config.check import contradictions
from burnish.config.schema import Config
from burnish.plan.counts import WindowCounts
from burnish.plan.memory import USABLE_MEMORY, estimate_memory
from burnish.plan.shapes import ModelShape


def suggest(
    config: Config, counts: WindowCounts, shape: ModelShape, world_size: int, memory_bytes: int
) -> tuple[str, ...]:
    """Config lines, all together, with which the run would fit; none where nothing is enough.

    Changes are tried one on top of the other, from those that cost least: first those that leave the result
    as it is, then those that train something else. Once it fits, those that turn out not to be needed are
    taken back, the dearest first. Every set of lines was planned and checked: with it, the run fits, and no
    key contradicts another.
    """
    share = counts.num_supervised_tokens / max(1, counts.num_tokens)

    def needed(keys: Mapping[str, Any]) -> int:
        tokens = keys.get("batch.micro_tokens", counts.max_micro_tokens)
        return estimate_memory(_apply(config, keys), shape, world_size, tokens, share).device.total

    at_odds = _at_odds(config, world_size)

    def is_taken(keys: Mapping[str, Any]) -> bool:
        return _at_odds(_apply(config, keys), world_size) <= at_odds

    limit = memory_bytes * USABLE_MEMORY
    keys: dict[str, Any] = {}
    for change in _cheapest_first(config, counts, world_size):
        if is_taken(keys | change) and needed(keys | change) < needed(keys):
            keys |= change
        if needed(keys) <= limit:
            break
    else:
        return ()
    for key in reversed(list(keys)):
        without = {k: v for k, v in keys.items() if k != key}
        names_adapter = (
            config.adapter is not None or "adapter.quantize" not in without or "adapter.kind" in without
        )
        if names_adapter and is_taken(without) and needed(without) <= limit:
            keys = without
    return tuple(f"{key}: {value}" for key, value in keys.items())


def _cheapest_first(config: Config, counts: WindowCounts, world_size: int) -> Iterator[dict[str, Any]]:
    """Keys and values to try, in this order.

    What each costs: shorter forwards next to nothing; `light` some percent; a higher ZeRO stage a gather of
    the weights a forward and a backward; `full` a forward more; the optimizer on the host the copies of all
    gradients and weights a step; weights on the host those of every forward. An adapter trains
    something else.
    """
    tokens = max(config.data.max_tokens, counts.max_example_tokens)
    if tokens < counts.max_micro_tokens:
        yield {"batch.micro_tokens": tokens}
    levels = ("none", "light", "full")
    level = config.model.activation_checkpointing
    rank = levels.index(level) if level in levels else len(levels)
    if rank < 1:
        yield {"model.activation_checkpointing": "light"}
    quantized = config.adapter is not None and config.adapter.quantize is not None
    has_zero = config.engine.uses_deepspeed(world_size)
    engine = {} if has_zero else {"engine.kind": "deepspeed"}
    if world_size > 1:
        for stage in range(config.engine.zero_stage + 1 if has_zero else 1, 3 if quantized else 4):
            yield engine | {"engine.zero_stage": stage}
    if rank < 2:
        yield {"model.activation_checkpointing": "full"}
    yield engine | {"engine.offload_optimizer": "cpu"}
    if not quantized:
        whole = engine | {"engine.zero_stage": 3, "engine.offload_optimizer": "cpu"}
        yield whole | {"engine.offload_params": "cpu"}
    if config.adapter is None:
        yield {"adapter.kind": "lora"}
    if not quantized:  # 4-bit weights cannot be sharded by ZeRO-3, nor weights kept on the host without it
        kind = "lora" if config.adapter is None else config.adapter.kind
        quantize = {"adapter.kind": kind, "adapter.quantize": "nf4"}
        yield quantize | {"engine.zero_stage": 2, "engine.offload_params": "none"}


def _apply(config: Config, keys: Mapping[str, Any]) -> Config:
    raw = config.model_dump()
    for key, value in keys.items():
        section, name = key.split(".")
        raw[section] = (raw[section] or {}) | {name: value}
    return Config.model_validate(raw)


def _at_odds(config: Config, world_size: int) -> set[str]:
    """Keys that contradict others on so many ranks."""
    launch = config.launch.model_copy(update={"num_processes": world_size})
    return {problem.where for problem in contradictions(config.model_copy(update={"launch": launch}))}
