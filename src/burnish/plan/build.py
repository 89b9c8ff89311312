"""The plan of a run: everything derived, before anything runs, printed and saved with the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from burnish.config.schema import Config
from burnish.plan.counts import DEFAULT_MICRO_TOKENS, WindowCounts
from burnish.plan.effort import Device, checkpoint_bytes, disk_bytes, train_flops, train_seconds
from burnish.plan.memory import Memory, estimate_memory
from burnish.plan.optimizer_state import trainable_params
from burnish.plan.schedule import num_warmup_steps
from burnish.plan.shapes import ModelShape

_USABLE_MEMORY = 0.92
"""Share of a device's memory that a run may plan with: the rest is the driver's and fragmentation's."""


@dataclass(frozen=True)
class Plan:
    """What a run will do. Counts are exact; memory, time and disk are estimates."""

    counts: WindowCounts
    world_size: int
    num_warmup_steps: int
    checkpoint_steps: tuple[int, ...]
    eval_steps: tuple[int, ...]
    num_params: int
    num_trainable_params: int
    exact_params: bool
    memory: Memory
    flops: float
    checkpoint_bytes: int
    disk_bytes: int
    device: Device | None
    """None where nothing is known of the device; then there is neither time nor verdict."""
    seconds: float | None
    fits: bool | None
    suggestions: tuple[str, ...]
    """Lines for the config that make it fit, all together; empty where it fits or nothing would."""

    def to_dict(self) -> dict[str, Any]:
        """What plan.json holds. Numbers are not rounded."""
        counts = self.counts
        return {
            "num_steps": counts.num_steps,
            "steps_per_epoch": counts.steps_per_epoch,
            "num_warmup_steps": self.num_warmup_steps,
            "num_examples": counts.num_examples,
            "num_examples_per_epoch": counts.num_examples_per_epoch,
            "num_tokens": counts.num_tokens,
            "num_supervised_tokens": counts.num_supervised_tokens,
            "examples_per_source": counts.examples_per_source,
            "world_size": self.world_size,
            "data_parallel_size": counts.world_size,
            "packed": counts.packed,
            "micro_batches_per_step": counts.micro_batches_total / counts.num_steps,
            "micro_batches_per_step_min": counts.micro_batches_min,
            "micro_batches_per_step_max": counts.micro_batches_max,
            "num_micro_batches": counts.micro_batches_total,
            "least_micro_batches_share": counts.least_micro_batches_share,
            "max_micro_tokens": counts.max_micro_tokens,
            "imbalance": {
                "mean": counts.imbalance_mean,
                "max": counts.imbalance_max,
                "num_windows": counts.imbalance_windows,
            },
            "num_params": self.num_params,
            "num_trainable_params": self.num_trainable_params,
            "exact_params": self.exact_params,
            "memory_bytes": self.memory.device.to_dict(),
            "host_memory_bytes": self.memory.host_bytes,
            "nvme_bytes": self.memory.nvme_bytes,
            "flops": self.flops,
            "device": None if self.device is None else self.device.name,
            "device_memory_bytes": None if self.device is None else self.device.memory_bytes,
            "seconds": self.seconds,
            "fits": self.fits,
            "suggestions": list(self.suggestions),
            "checkpoint_steps": list(self.checkpoint_steps),
            "eval_steps": list(self.eval_steps),
            "checkpoint_bytes": self.checkpoint_bytes,
            "disk_bytes": self.disk_bytes,
        }

    def describe(self) -> str:
        """The plan for a terminal: a few lines of plain text."""
        from burnish.plan.describe import describe_plan

        return describe_plan(self)


def make_plan(
    config: Config,
    counts: WindowCounts,
    model_shape: ModelShape,
    world_size: int,
    device: Device | None = None,
) -> Plan:
    """Derive everything that a run will do.

    Args:
        config: As resolved.
        counts: What the windows hold (`data.count.count_windows`), cut for
            `world_size / engine.sequence_parallel` ranks.
        model_shape: From the model's config.json.
        world_size: All ranks.
        device: What each rank has, for time and for whether it fits.
    """
    share = counts.num_supervised_tokens / max(1, counts.num_tokens)
    memory = estimate_memory(config, model_shape, world_size, counts.max_micro_tokens, share)
    checkpoint_steps = _every(config.checkpoint.every_steps, counts.num_steps)
    has_eval = config.data.eval is not None or config.data.eval_fraction > 0
    eval_steps = tuple(sorted({0, *_every(config.eval.every_steps, counts.num_steps), counts.num_steps}))
    fits = None
    suggestions: tuple[str, ...] = ()
    seconds = None
    if device is not None:
        fits = memory.device.total <= device.memory_bytes * _USABLE_MEMORY
        seconds = train_seconds(config, counts, model_shape, world_size, device)
        if not fits:
            suggestions = suggest(config, counts, model_shape, world_size, device.memory_bytes)
    return Plan(
        counts=counts,
        world_size=world_size,
        num_warmup_steps=num_warmup_steps(counts.num_steps, config.schedule),
        checkpoint_steps=checkpoint_steps,
        eval_steps=eval_steps if has_eval else (),
        num_params=model_shape.num_params,
        num_trainable_params=trainable_params(config, model_shape),
        exact_params=model_shape.exact,
        memory=memory,
        flops=train_flops(config, counts, model_shape),
        checkpoint_bytes=checkpoint_bytes(config, model_shape, world_size),
        disk_bytes=disk_bytes(config, model_shape, world_size, len(checkpoint_steps) + 1),
        device=device,
        seconds=seconds,
        fits=fits,
        suggestions=suggestions,
    )


def _every(steps: int | None, num_steps: int) -> tuple[int, ...]:
    return () if steps is None else tuple(range(steps, num_steps + 1, steps))


def suggest(
    config: Config, counts: WindowCounts, shape: ModelShape, world_size: int, memory_bytes: int
) -> tuple[str, ...]:
    """Config lines, all together, with which the run would fit; none where nothing is enough.

    Changes are tried one on top of the other, those that leave the result as it is before those that train
    something else, until it fits; then those that turn out not to be needed are taken back.
    """
    share = counts.num_supervised_tokens / max(1, counts.num_tokens)

    def needed(keys: Mapping[str, Any]) -> int:
        tokens = keys.get("batch.micro_tokens", counts.max_micro_tokens)
        return estimate_memory(_apply(config, keys), shape, world_size, tokens, share).device.total

    limit = memory_bytes * _USABLE_MEMORY
    keys: dict[str, Any] = {}
    for change in _milder_first(config, counts, world_size):
        if needed(keys | change) < needed(keys):
            keys |= change
        if needed(keys) <= limit:
            break
    else:
        return ()
    for key in reversed(list(keys)):
        without = {k: v for k, v in keys.items() if k != key}
        if _consistent(config, without) and needed(without) <= limit:
            keys = without
    return tuple(f"{key}: {value}" for key, value in keys.items())


def _milder_first(config: Config, counts: WindowCounts, world_size: int) -> Iterator[dict[str, Any]]:
    """Keys and values to try, in this order."""
    tokens = max(config.data.max_tokens, counts.max_example_tokens)
    if tokens < counts.max_micro_tokens:
        yield {"batch.micro_tokens": tokens}
    yield {"model.activation_checkpointing": "full"}
    quantized = config.adapter is not None and config.adapter.quantize is not None
    if world_size > 1:
        for stage in range(config.engine.zero_stage + 1, 3 if quantized else 4):
            yield {"engine.zero_stage": stage}
    if world_size > 1 or config.engine.kind == "deepspeed":
        yield {"engine.offload_optimizer": "cpu"}
    elif config.adapter is None:
        yield {"engine.kind": "deepspeed", "engine.offload_optimizer": "cpu"}
    if config.adapter is None:
        yield {"adapter.kind": "lora"}
    if not quantized:  # 4-bit weights cannot be sharded by ZeRO-3
        kind = "lora" if config.adapter is None else config.adapter.kind
        yield {"adapter.kind": kind, "adapter.quantize": "nf4", "engine.zero_stage": 2}


def _apply(config: Config, keys: Mapping[str, Any]) -> Config:
    raw = config.model_dump()
    for key, value in keys.items():
        section, name = key.split(".")
        raw[section] = (raw[section] or {}) | {name: value}
    return Config.model_validate(raw)


def _consistent(config: Config, keys: Mapping[str, Any]) -> bool:
    """Whether a key that others need is still there."""
    trial = _apply(config, keys)
    sharded = trial.adapter is not None and trial.adapter.quantize and trial.engine.zero_stage == 3
    new_adapter = config.adapter is None and "adapter.quantize" in keys and "adapter.kind" not in keys
    return not sharded and not new_adapter


def fit_micro_tokens(
    config: Config, shape: ModelShape, world_size: int, memory_bytes: int, most: int = 65_536
) -> int:
    """Tokens of a forward for `micro_tokens: auto` on a device of known memory.

    The largest power of two (from 4096, to `most`) that the memory plan has room for, and never fewer than
    `data.max_tokens`. A pure function, so that every rank and every restart finds the same.
    """
    tokens = max(config.data.max_tokens, DEFAULT_MICRO_TOKENS)
    bigger = 1 << tokens.bit_length()
    while bigger <= most:
        needed = estimate_memory(config, shape, world_size, bigger).device.total
        if needed > memory_bytes * _USABLE_MEMORY:
            break
        tokens, bigger = bigger, bigger * 2
    return tokens


def resolve_auto(config: Config, shape: ModelShape, world_size: int, memory_bytes: int | None) -> Config:
    """The config with what is left to the memory plan filled in; a pure function of its arguments.

    `activation_checkpointing: auto` becomes none where a run fits without it, else full. Then
    `micro_tokens: auto` becomes a number, where the device's memory is known.

    Args:
        config: As the user gave it.
        shape: The model.
        world_size: All ranks.
        memory_bytes: Of each rank's device; None on a CPU, where nothing is recomputed.
    """
    if config.model.activation_checkpointing == "auto":
        tokens = max(config.data.max_tokens, DEFAULT_MICRO_TOKENS)
        trial = _apply(config, {"model.activation_checkpointing": "none"})
        needed = estimate_memory(trial, shape, world_size, tokens).device.total
        fits = memory_bytes is None or needed <= memory_bytes * _USABLE_MEMORY
        config = trial if fits else _apply(config, {"model.activation_checkpointing": "full"})
    by_tokens = config.batch.micro_tokens == "auto" and config.batch.micro_examples is None
    if memory_bytes is not None and by_tokens:
        tokens = fit_micro_tokens(config, shape, world_size, memory_bytes)
        config = _apply(config, {"batch.micro_tokens": tokens})
    return config
