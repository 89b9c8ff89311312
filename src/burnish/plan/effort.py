"""FLOPs of a run, its time on a device, and the disk that its checkpoints take."""

from __future__ import annotations

import re
from dataclasses import dataclass

from burnish.config.schema import Config
from burnish.plan.counts import WindowCounts
from burnish.plan.optimizer_state import optimizer_bytes, trainable_params
from burnish.plan.shapes import ModelShape


@dataclass(frozen=True)
class Device:
    """What the plan assumes of one rank's device."""

    name: str
    memory_bytes: int
    flops_per_second: float
    """Peak of dense bf16 matrix products, as the vendor states it."""
    mfu: float = 0.4
    """Share of that peak which useful FLOPs reach. Published runs: 0.35 to 0.41."""


_GB = 10**9
DEVICES: tuple[Device, ...] = (
    Device("B200", 180 * _GB, 2250e12),
    Device("H200", 141 * _GB, 989e12),
    Device("H100", 80 * _GB, 989e12),
    Device("A100-80GB", 80 * _GB, 312e12),
    Device("A100-40GB", 40 * _GB, 312e12),
    Device("MI300X", 192 * _GB, 1307e12),
    Device("L40S", 48 * _GB, 362e12),
    Device("RTX 4090", 24 * _GB, 165e12),
    Device("L4", 24 * _GB, 121e12),
)


def find_device(name: str) -> Device | None:
    """The first known device whose name stands in `name` (as `torch.cuda` reports it), if any."""
    for device in DEVICES:
        parts = device.name.lower().replace("-", " ").split()
        # An L40 is no L4.
        if all(re.search(rf"{part}(?!\d)", name.lower()) for part in parts):
            return device
    return None


def train_flops(config: Config, counts: WindowCounts, shape: ModelShape) -> float:
    """Useful FLOPs of the whole run: no recomputation, the head on supervised tokens only.

    A product costs its forward once; the backward once for its input, and once more for its weight where
    that is trained. Attention inside a document of T tokens is causal: T^2 / 2 pairs.
    """
    passes = 3 if config.adapter is None else 2
    # Where examples share their beginnings; attention, a small part, is taken as if they did not.
    num_tokens = counts.num_computed_tokens or counts.num_tokens
    matrices = 2.0 * shape.active_layer_weights * num_tokens * passes
    head = 2.0 * shape.embedding_params * counts.num_supervised_tokens * passes
    attention = 2.0 * shape.num_layers * shape.query_size * counts.sum_squared_tokens * 3
    adapter = 6.0 * shape.lora_params(config.adapter) * num_tokens if config.adapter else 0.0
    return matrices + head + attention + adapter


def train_seconds(
    config: Config, counts: WindowCounts, shape: ModelShape, world_size: int, device: Device
) -> float:
    """Estimated time of all steps, waiting for the slowest rank included, evaluation and saves not."""
    flops = train_flops(config, counts, shape)
    if config.model.activation_checkpointing in ("full", "offload"):  # the layers' forward once more
        num_tokens = counts.num_computed_tokens or counts.num_tokens
        attention = 2.0 * shape.num_layers * shape.query_size * counts.sum_squared_tokens
        flops += 2.0 * shape.active_layer_weights * num_tokens + attention
    speed = world_size * device.flops_per_second * device.mfu
    return flops * (1 + counts.imbalance_mean) / speed


def checkpoint_bytes(config: Config, shape: ModelShape, world_size: int) -> int:
    """One checkpoint: weights, masters and both moments of what is trained."""
    sharded = config.engine.uses_deepspeed(world_size) and config.engine.zero_stage > 0
    masters = sharded and config.model.dtype != "fp32"
    return trainable_params(config, shape) * (6 if masters else 4) + optimizer_bytes(config, shape)


def disk_bytes(config: Config, shape: ModelShape, world_size: int, num_saves: int) -> int:
    """Most that the run's folder takes: kept checkpoints, the one being written, final and best."""
    kept = min(num_saves, config.checkpoint.keep + 1)
    whole = shape.num_params + shape.kept_params
    num_exported = whole if config.adapter is None else trainable_params(config, shape)
    exported = num_exported * (4 if config.model.dtype == "fp32" else 2)
    evaluates = config.data.eval is not None or config.data.eval_fraction > 0
    return kept * checkpoint_bytes(config, shape, world_size) + exported * (2 if evaluates else 1)
