"""Which engine a config asks for, and what the model must know of it beforehand. No deepspeed here
until it is asked for."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Literal

import torch

from burnish.config.packages import require_package
from burnish.config.schema import Config
from burnish.engine.base import Engine
from burnish.engine.ds_checkpoint import TAG
from burnish.engine.ds_config import runs_in_fp32, uses_nvme
from burnish.engine.ds_workarounds import name_accelerator
from burnish.engine.local import WEIGHTS_FILE, LocalEngine
from burnish.engine.sequence import SequenceParallelEngine, sequence_group
from burnish.errors import ConfigError, Problem
from burnish.model.forward import SupervisedModel
from burnish.model.load import COMPUTE_DTYPES
from burnish.model.sequence_attention import share_sequence
from burnish.runtime import Ranks, log


def engine_kind(config: Config, ranks: Ranks) -> Literal["local", "deepspeed"]:
    """`engine.kind`, with auto resolved: DeepSpeed for several processes or offloading, else local."""
    return "deepspeed" if config.engine.uses_deepspeed(ranks.world_size) else "local"


def engine_of(folder: Path) -> Literal["local", "deepspeed"] | None:
    """Which engine saved a checkpoint's files in this folder; None where they are not there to tell."""
    if (folder / WEIGHTS_FILE).is_file():
        return "local"
    return "deepspeed" if (folder / TAG).is_dir() else None


def parameter_dtype(config: Config, ranks: Ranks, stored: torch.dtype | None = None) -> torch.dtype:
    """What the model's weights should be loaded in.

    Trained weights have fp32 masters under every engine, so they are loaded with all the bits that they
    were stored with: the local engine (and DeepSpeed without ZeRO) trains them under autocast, and under
    ZeRO they are rounded once the masters can be told (`engine/ds_weights.py`). A base that an adapter
    freezes needs no master and stays in the forward's dtype; and so does a model that may not fit in
    memory, which is what NVMe is for.

    Args:
        config: The run.
        ranks: This process among the others.
        stored: What the checkpoint's weights are in; None where they are fresh, or nobody knows.
    """
    forward = COMPUTE_DTYPES[config.model.dtype]
    if config.adapter is not None:
        return forward
    autocasts = engine_kind(config, ranks) == "local" or runs_in_fp32(config)
    is_rounded = stored != forward and not uses_nvme(config)
    return torch.float32 if autocasts or is_rounded else forward


def model_init_context(
    config: Config, ranks: Ranks, device: torch.device, dtype: torch.dtype
) -> contextlib.AbstractContextManager[Any]:
    """Enter this around loading a pretrained model: under ZeRO-3 it partitions while it loads.

    Args:
        config: The run.
        ranks: This process among the others.
        device: Where this rank computes.
        dtype: What weights are loaded in, `parameter_dtype`.
    """
    if not _is_zero3(config, ranks):
        return contextlib.nullcontext()
    _require_equal_parts(config, ranks)
    _require_deepspeed(device)
    from burnish.engine.deepspeed import zero3_init_context

    return zero3_init_context(config, ranks, device, dtype)


def build_engine(config: Config, ranks: Ranks, device: torch.device, model: SupervisedModel) -> Engine:
    """Put the model, its optimizer and the ranks together.

    Args:
        config: The run.
        ranks: This process among the others; with several, the process group has been joined.
        device: Where this rank computes.
        model: Loaded in `parameter_dtype`, under `model_init_context`.

    Raises:
        ConfigError: The model or the number of ranks does not go with what is asked for.
        MachineError: deepspeed is not installed, or the device cannot do the dtype.
    """
    if config.model.attention == "flex" and device.type == "cpu":
        what = "is flex, which has no backward on a CPU"
        raise ConfigError(Problem("model.attention", what, "Leave it at auto."))
    size = config.engine.sequence_parallel
    if size == 1:
        return _whole_engine(config, ranks, device, model)
    if ranks.world_size % size:
        what = f"is {size}, which does not divide {ranks.world_size} ranks"
        raise ConfigError(Problem("engine.sequence_parallel", what, "Start a multiple of it."))
    group = sequence_group(ranks, size, config.launch.hang_timeout_seconds)
    share_sequence(model.model, model.capability, group, size)
    return SequenceParallelEngine(_whole_engine(config, ranks, device, model), ranks, size)


def _whole_engine(config: Config, ranks: Ranks, device: torch.device, model: SupervisedModel) -> Engine:
    if engine_kind(config, ranks) == "deepspeed":
        _require_equal_parts(config, ranks)
        _require_deepspeed(device)
        from burnish.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, config, ranks=ranks, device=device)
    if config.model.dtype == "fp16" and device.type == "cpu":
        log.warning("model.dtype: fp16 is tens of times slower on a CPU than bf16 or fp32.")
    return LocalEngine(
        model,
        config.optim,
        ranks=ranks,
        device=device,
        compute_dtype=COMPUTE_DTYPES[config.model.dtype],
        adapter_only=config.adapter is not None,
    )


def _is_zero3(config: Config, ranks: Ranks) -> bool:
    return engine_kind(config, ranks) == "deepspeed" and config.engine.zero_stage == 3


def _require_equal_parts(config: Config, ranks: Ranks) -> None:
    size = config.engine.hpz_size
    if ranks.world_size % size:
        what = f"is {size}, which does not divide {ranks.world_size} ranks"
        raise ConfigError(Problem("engine.hpz_size", what, "Give the number of GPUs of one host."))


def _require_deepspeed(device: torch.device) -> None:
    require_package("deepspeed")
    name_accelerator(device)
