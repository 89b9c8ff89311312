"""DeepSpeed's config as a plain dict, made from ours. Pure: imports neither torch nor deepspeed."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.config.schema import Config

BUCKET_ELEMENTS = 50_000_000
"""Gradients reduced, and weights gathered, at once. DeepSpeed's own 500 million reserve 1 to 2 GB
for each buffer and are no faster from a few ten million on."""
BUCKET_ELEMENTS_CPU = 5_000_000
"""At stages 1 and 2 on CPUs, where a message is no more than a copy."""
FIRST_LOSS_SCALE_POWER = 12
"""Of two. 2^16, where DeepSpeed and torch start, overflows in the first steps of most language models."""
SWAPPED_ELEMENTS = 100_000_000
"""Of the masters, in memory at once where they are swapped to NVMe. DeepSpeed's own 1,000 million would
pin 16 GB."""


SWAP_BUFFERS = 8
"""Weights on their way from NVMe at once, each in a buffer for the largest of them. DeepSpeed's 5 are too few
where a module and what is fetched ahead of the next ones come together."""


@dataclass(frozen=True)
class ModelSizes:
    """What DeepSpeed's buffers must hold, in numbers; without a model, as much as is ever useful."""

    trainable: int = BUCKET_ELEMENTS
    largest_share: int = 100_000_000
    """A rank's part of the largest weight, which a buffer for weights on NVMe must hold."""


def deepspeed_config(config: Config, num_gpus: int, sizes: ModelSizes | None = None) -> dict[str, Any]:
    """The dict for `deepspeed.initialize` that the step recipe needs.

    Windows own the accumulation: DeepSpeed sees `gradient_accumulation_steps: 1` and, unmanaged,
    takes a step only when it is told to. The optimizer is ours (`engine/optimizer.py`), so no
    optimizer or scheduler section is written. Batch sizes mean nothing in this recipe, but
    DeepSpeed insists on one.

    Args:
        config: The run.
        num_gpus: Of all ranks, 0 on CPUs: pinned memory exists only with one, overlapped communication only
            with several.
        sizes: Of the model, where it is known; buffers are then no larger than it needs.
    """
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # Without ZeRO we clip ourselves, see `DeepSpeedEngine.step`.
        "gradient_clipping": (config.optim.max_grad_norm or 0.0) if config.engine.zero_stage else 0.0,
        "zero_optimization": _zero_section(config, num_gpus, sizes or ModelSizes()),
        "zero_allow_untested_optimizer": True,
        # Its timer makes the host wait for the device in every forward.
        "timers": {"throughput": {"enabled": False}},
        # With offload: torch's fused AdamW on the CPU instead of an extension compiled on the spot.
        "zero_force_ds_cpu_optimizer": False,
        **_precision_sections(config),
    }
    if uses_nvme(config):
        settings["aio"] = {"block_size": 2**20, "queue_depth": 8, "overlap_events": True}
    return _with_raw(settings, config.engine.deepspeed)


def _with_raw(settings: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """Raw settings over ours, section by section. Those that break the recipe: config/raw_deepspeed.py."""
    merged = dict(settings)
    for key, value in raw.items():
        ours = merged.get(key)
        if isinstance(ours, Mapping) and isinstance(value, Mapping):
            merged[key] = _with_raw(ours, value)
        else:
            merged[key] = value
    return merged


def runs_in_fp32(config: Config) -> bool:
    """Whether DeepSpeed sees an fp32 model.

    At stage 0 it always does, with autocast inside where the forward runs in less. Its own bf16 without
    ZeRO adds micro-batches up in bf16, its own fp16 (0.19) divides gradients by a loss scale that the loss
    was never multiplied by; and weights, masters and gradients together take no less memory there.
    """
    return config.model.dtype == "fp32" or config.engine.zero_stage == 0


def _precision_sections(config: Config) -> dict[str, Any]:
    """bf16, fp16 or neither. Masters and optimizer state are fp32 in all of them."""
    if config.model.dtype == "fp32":
        return {}
    if runs_in_fp32(config):
        return {
            "torch_autocast": {
                "enabled": True,
                "dtype": {"bf16": "bfloat16", "fp16": "float16"}[config.model.dtype],
            }
        }
    # Many micro-batches added up in 16 bits lose their last ones.
    sums = {"data_types": {"grad_accum_dtype": "fp32"}}
    if config.model.dtype == "bf16":
        return {"bf16": {"enabled": True, "check_grad_overflow": True}, **sums}
    # Any fixed scale, so that DeepSpeed does not move it: `DeepSpeedEngine` sets it from its own.
    return {"fp16": {"enabled": True, "loss_scale": 2.0**FIRST_LOSS_SCALE_POWER}, **sums}


def _zero_section(config: Config, num_gpus: int, sizes: ModelSizes) -> dict[str, Any]:
    stage, on_gpu = config.engine.zero_stage, num_gpus > 0
    section: dict[str, Any] = {"stage": stage}
    if stage == 0:
        return section
    bucket = BUCKET_ELEMENTS if on_gpu or stage == 3 else BUCKET_ELEMENTS_CPU
    section |= {
        "reduce_bucket_size": min(bucket, sizes.trainable),
        # DeepSpeed (0.19) refuses it at stage 1 with an accumulation that it does not manage; and one rank
        # would only wait for the device after every micro-batch.
        "overlap_comm": stage > 1 and num_gpus > 1,
        "contiguous_gradients": True,
    }
    if stage < 3:
        section["allgather_bucket_size"] = BUCKET_ELEMENTS
    else:
        section["stage3_prefetch_bucket_size"] = BUCKET_ELEMENTS
        section["zero_hpz_partition_size"] = config.engine.hpz_size
        if swaps_optimizer(config):  # several buffers of this size are pinned for the way there and back
            section["sub_group_size"] = SWAPPED_ELEMENTS
    if config.engine.offload_optimizer != "none":
        section["offload_optimizer"] = _offload_section(config, config.engine.offload_optimizer, on_gpu)
    if config.engine.offload_params != "none":
        section["offload_param"] = _offload_section(config, config.engine.offload_params, on_gpu)
        if swaps_weights(config):
            buffers = {"buffer_size": sizes.largest_share, "buffer_count": SWAP_BUFFERS}
            # By default 1,000 million numbers a rank are left in memory whatever is asked for.
            section["offload_param"] |= {**buffers, "max_in_cpu": 0}
    return section


def uses_nvme(config: Config) -> bool:
    """Whether anything is swapped to a disk."""
    return swaps_optimizer(config) or swaps_weights(config)


def swaps_optimizer(config: Config) -> bool:
    """Whether masters and optimizer state are swapped to a disk."""
    return config.engine.offload_optimizer == "nvme"


def swaps_weights(config: Config) -> bool:
    """Whether the weights of the forward are swapped to a disk."""
    return config.engine.offload_params == "nvme"


def nvme_folder(config: Config) -> Path:
    """This run's own folder for swap files, so that runs can share a disk."""
    output_dir = Path(config.output_dir).resolve()
    if config.engine.nvme_path is None:
        return output_dir / ".offload"
    return Path(config.engine.nvme_path) / f"{output_dir.name}-{zlib.crc32(bytes(output_dir)):08x}"


def _offload_section(config: Config, device: str, on_gpu: bool) -> dict[str, Any]:
    section: dict[str, Any] = {"device": device, "pin_memory": on_gpu}
    if device == "nvme":
        section["nvme_path"] = str(nvme_folder(config))
    return section
