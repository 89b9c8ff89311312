"""The plan of a run: everything derived, before anything runs, printed and saved with the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from burnish.config.schema import Config
from burnish.plan.counts import WindowCounts
from burnish.plan.effort import Device, checkpoint_bytes, disk_bytes, train_flops, train_seconds
from burnish.plan.memory import USABLE_MEMORY, Memory, estimate_memory, in_process
from burnish.plan.optimizer_state import names_are_known, trainable_params
from burnish.plan.schedule import num_warmup_steps
from burnish.plan.shapes import ModelShape
from burnish.plan.suggest import suggest


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
    choices: tuple[str, ...]
    """What was left to the plan (`auto`), what it chose and why."""

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
            "num_computed_tokens": counts.num_computed_tokens or counts.num_tokens,
            "unshared": counts.unshared,
            "examples_per_source": counts.examples_per_source,
            "world_size": self.world_size,
            "data_parallel_size": counts.world_size,
            "packed": counts.packed,
            "micro_batches_per_step": counts.micro_batches_total / counts.num_steps,
            "micro_batches_per_step_min": counts.micro_batches_min,
            "micro_batches_per_step_max": counts.micro_batches_max,
            "num_counted_steps": counts.num_counted_steps or counts.num_steps,
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
            "choices": list(self.choices),
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
    device_type: str = "cuda",
    choices: tuple[str, ...] = (),
    memory_bytes: int | None = None,
) -> Plan:
    """Derive everything that a run will do.

    Args:
        config: As resolved.
        counts: What the windows hold (`data.count.count_windows`), cut for
            `world_size / engine.sequence_parallel` ranks.
        model_shape: From the model's config.json.
        world_size: All ranks.
        device: What each rank has, for time and for whether it fits.
        device_type: `cuda` or `cpu`, whose kernels keep different things.
        choices: What `explain_auto` says of the config.
        memory_bytes: What each rank may use, where that is known: on a CPU what is more than needed is used
            to make steps faster.
    """
    share = counts.num_supervised_tokens / max(1, counts.num_tokens)
    tokens, accumulates = counts.max_micro_tokens, counts.micro_batches_max > 1
    memory = estimate_memory(config, model_shape, world_size, tokens, share, accumulates, device_type)
    if device_type == "cpu":
        memory = in_process(memory, memory_bytes)
    checkpoint_steps = _every(config.checkpoint.every_steps, counts.num_steps)
    has_eval = config.data.eval is not None or config.data.eval_fraction > 0
    eval_steps = tuple(sorted({0, *_every(config.eval.every_steps, counts.num_steps), counts.num_steps}))
    fits = None
    suggestions: tuple[str, ...] = ()
    seconds = None
    if device is not None:
        fits = memory.device.total <= device.memory_bytes * USABLE_MEMORY
        seconds = train_seconds(config, counts, model_shape, world_size, device)
        if not fits:
            suggestions = suggest(config, counts, model_shape, world_size, device.memory_bytes)
    return Plan(
        counts=counts,
        world_size=world_size,
        num_warmup_steps=num_warmup_steps(counts.num_steps, config.schedule),
        checkpoint_steps=checkpoint_steps,
        eval_steps=eval_steps if has_eval else (),
        num_params=model_shape.num_params + model_shape.kept_params,
        num_trainable_params=trainable_params(config, model_shape),
        exact_params=model_shape.exact and names_are_known(config, model_shape),
        memory=memory,
        flops=train_flops(config, counts, model_shape),
        checkpoint_bytes=checkpoint_bytes(config, model_shape, world_size),
        disk_bytes=disk_bytes(config, model_shape, world_size, len(checkpoint_steps) + 1),
        device=device,
        seconds=seconds,
        fits=fits,
        suggestions=suggestions,
        choices=choices,
    )


def _every(steps: int | None, num_steps: int) -> tuple[int, ...]:
    return () if steps is None else tuple(range(steps, num_steps + 1, steps))
