"""Raw DeepSpeed settings in `engine.deepspeed`, and which of them would break the step. Pure text."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel

from burnish.errors import Problem

_WINDOWS = "a step's examples, and their cut into forwards, are planned before training"
_OPTIMIZER = "Burnish builds the optimizer and sets its rate at every step"
_PRECISION = "the dtype of the forward, and fp32 masters and sums, follow from one key"
_CHECKPOINTS = "checkpoints are written, checked and converted by Burnish"
_PARALLEL = "which rank sees which part of which example is planned by Burnish"
_CONTENT = "it changes what is computed besides the model, so no step would be the one that is planned"
_COMPILED = "a compiled step cannot be told when the window ends"
_OWN_KEY = "there is a key for it, which the plan and the checks read too"

_BATCH_CURE = "Use batch.global_examples and batch.micro_tokens."
_OPTIMIZER_CURE = "Use optim.name and its neighbours."
_SCHEDULE_CURE = "Use schedule.name and its neighbours."
_PRECISION_CURE = "Use model.dtype."
_LEAVE = "Leave it out."

REFUSED: Mapping[str, tuple[str, str]] = {
    "train_batch_size": (_WINDOWS, _BATCH_CURE),
    "train_micro_batch_size_per_gpu": (_WINDOWS, _BATCH_CURE),
    "gradient_accumulation_steps": (_WINDOWS, _BATCH_CURE),
    "managed_gradient_accumulation": (_WINDOWS, _LEAVE),
    "elasticity": (_WINDOWS, _BATCH_CURE),
    "autotuning": (_WINDOWS, "Use burnish plan."),
    "curriculum_learning": (_WINDOWS, _LEAVE),
    "data_efficiency": (_WINDOWS, _LEAVE),
    "optimizer": (_OPTIMIZER, _OPTIMIZER_CURE),
    "scheduler": (_OPTIMIZER, _SCHEDULE_CURE),
    "zero_allow_untested_optimizer": (_OPTIMIZER, _LEAVE),
    "zero_force_ds_cpu_optimizer": (_OPTIMIZER, _LEAVE),
    "gradient_clipping": (_OWN_KEY, "Use optim.max_grad_norm."),
    "fp16": (_PRECISION, _PRECISION_CURE),
    "bf16": (_PRECISION, _PRECISION_CURE),
    "bfloat16": (_PRECISION, _PRECISION_CURE),
    "amp": (_PRECISION, _PRECISION_CURE),
    "torch_autocast": (_PRECISION, _PRECISION_CURE),
    "data_types": (_PRECISION, _PRECISION_CURE),
    "checkpoint": (_CHECKPOINTS, "Use the keys under checkpoint."),
    "nebula": (_CHECKPOINTS, _LEAVE),
    "datastates_ckpt": (_CHECKPOINTS, _LEAVE),
    "activation_checkpointing": (_OWN_KEY, "Use model.activation_checkpointing."),
    "tensor_parallel": (_PARALLEL, _LEAVE),
    "pipeline": (_PARALLEL, _LEAVE),
    "sequence_parallel_size": (_OWN_KEY, "Use engine.sequence_parallel."),
    "expert_parallel": (_PARALLEL, _LEAVE),
    "hybrid_engine": (_CONTENT, _LEAVE),
    "progressive_layer_drop": (_CONTENT, _LEAVE),
    "compression_training": (_CONTENT, _LEAVE),
    "quantize_training": (_CONTENT, _LEAVE),
    "sparse_attention": (_CONTENT, _LEAVE),
    "eigenvalue": (_CONTENT, _LEAVE),
    "compile": (_COMPILED, _LEAVE),
    "zero_optimization.stage": (_OWN_KEY, "Use engine.zero_stage."),
    "zero_optimization.cpu_offload": (_OWN_KEY, "Use engine.offload_optimizer: cpu."),
    "zero_optimization.cpu_offload_params": (_OWN_KEY, "Use engine.offload_params: cpu."),
    "zero_optimization.offload_optimizer.device": (_OWN_KEY, "Use engine.offload_optimizer."),
    "zero_optimization.offload_optimizer.nvme_path": (_OWN_KEY, "Use engine.nvme_path."),
    "zero_optimization.offload_optimizer.super_offload": (_OPTIMIZER, _LEAVE),
    "zero_optimization.offload_param.device": (_OWN_KEY, "Use engine.offload_params."),
    "zero_optimization.offload_param.nvme_path": (_OWN_KEY, "Use engine.nvme_path."),
    "zero_optimization.zero_hpz_partition_size": (_OWN_KEY, "Use engine.hpz_size."),
    "zero_optimization.elastic_checkpoint": (_CHECKPOINTS, _LEAVE),
    "zero_optimization.load_from_fp32_weights": (_CHECKPOINTS, _LEAVE),
    "zero_optimization.mics_shard_size": (_CHECKPOINTS, "Use engine.hpz_size."),
    "zero_optimization.zenflow": (
        "it applies some gradients steps later, so a step would not be its window's",
        _LEAVE,
    ),
}
"""Raw keys that are not taken: why, and what to use instead. A section named here is refused whole."""


def refused_settings(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """Why raw settings cannot be handed on to DeepSpeed, one problem for each."""
    for place, value in _places(raw, ""):
        if place in REFUSED:
            why, cure = REFUSED[place]
            yield Problem(f"engine.deepspeed.{place}", f"is not taken: {why}", cure)
        elif place in _SECTIONS and not isinstance(value, Mapping):
            cure = "Write the keys that are to change under it."
            yield Problem(f"engine.deepspeed.{place}", f"is {value!r}, but it is a section", cure)


Names = Mapping[str, "Names | None"]
"""The settings of a section, by name; a section's own below it, None where it is none."""


def setting_names(section: type[BaseModel]) -> Names:
    """The names in a section, and in those below it, from the class that DeepSpeed checks them by."""
    names: dict[str, Names | None] = {}
    for name, field in section.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        below = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        inner = setting_names(below[0]) if below else None
        names |= {name: inner, field.alias or name: inner}
    return names


def unknown_settings(raw: Mapping[str, Any], known: Names, where: str) -> Iterator[Problem]:
    """Settings that DeepSpeed does not have, one problem for each.

    Args:
        raw: A section of `engine.deepspeed`.
        known: What the section may hold.
        where: The section's key.
    """
    for key, value in raw.items():
        below = known.get(key)
        if key not in known:
            close = difflib.get_close_matches(key, known, n=2)
            cure = f"Did you mean {' or '.join(close)}?" if close else "Take it out."
            yield Problem(f"{where}.{key}", "is nothing that DeepSpeed has a setting for", cure)
        elif below is not None and isinstance(value, Mapping):
            yield from unknown_settings(value, below, f"{where}.{key}")


def misspelt_settings(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """Settings under `zero_optimization` that look like others. The DeepSpeed that is installed says which
    there are, but only once it is imported; a name like none of these may be new, and waits for that."""
    section = raw.get("zero_optimization")
    if not isinstance(section, Mapping):
        return
    for problem in unknown_settings(section, dict.fromkeys(TUNABLE), "engine.deepspeed.zero_optimization"):
        if problem.cure.startswith("Did you mean"):
            yield problem


TUNABLE = frozenset(
    {
        "allgather_bucket_size", "allgather_partitions", "allgather_sequential", "compute_grad_norm",
        "contiguous_gradients", "cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory",
        "elastic_checkpoint", "enable_sanity_checks", "gather_16bit_weights_on_model_save",
        "ignore_unused_parameters", "leaf_module", "legacy_stage1", "load_from_fp32_weights",
        "log_trace_cache_warnings", "max_live_parameters", "max_reuse_distance",
        "memory_efficient_linear", "model_persistence_threshold", "module_granularity_threshold",
        "offload_optimizer", "offload_param", "overlap_comm", "override_module_apply",
        "param_persistence_threshold", "parameter_alignment", "pipeline_loading_checkpoint",
        "prefetch_bucket_size", "reduce_bucket_size", "reduce_scatter", "round_robin_gradients",
        "save_muon_momentum_buffer_in_memory", "stage", "stage3_allgather_sequential",
        "stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save",
        "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold", "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size", "stage3_use_all_reduce_for_fetch_params", "sub_group_size",
        "use_all_reduce_for_fetch_params", "use_multi_rank_bucket_allreduce", "zenflow",
        "zero_hpz_partition_size", "zero_quantized_gradients", "zero_quantized_nontrainable_weights",
        "zero_quantized_weights",
    }
)  # fmt: skip
"""What DeepSpeed 0.19 has under `zero_optimization`, refused or not; a test holds it to the installed one."""

_SECTIONS = {place.rpartition(".")[0] for place in REFUSED if "." in place}


def _places(raw: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    for key, value in raw.items():
        place = f"{above}{key}"
        yield place, value
        # Below what is refused there is nothing more to say.
        if isinstance(value, Mapping) and place not in REFUSED:
            yield from _places(value, f"{place}.")
