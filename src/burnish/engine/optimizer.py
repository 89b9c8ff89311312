"""The optimizer, and what each group of parameters gets of it. Knows torch, but no engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from burnish.config.packages import require_package
from burnish.config.patterns import names_part
from burnish.config.schema import OptimConfig
from burnish.engine.muon import MuonAdamW
from burnish.errors import ConfigError, Problem


def build_param_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Split the trainable parameters by what they get: decay or not, their rate's factor, Muon or AdamW.

    Weight decay pulls matrices towards zero; on norms' scales and on biases it only fights the data,
    so they are exempt. Muon is for the matrices between embeddings and head, which are lists of
    vectors rather than maps.

    Returns:
        Groups for `torch.optim`, none empty, each in the model's own order.

    Raises:
        ConfigError: A pattern of `optim.group_lr` names nothing that is trained.
        ValueError: Nothing is trainable.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameter")
    parts = parts_of([name for name, _ in trainable], optim)
    lists_of_vectors = _embeddings_and_heads(model) if optim.name == "muon" else set()
    groups: dict[tuple[bool, int, bool], list[nn.Parameter]] = {}
    for (name, parameter), part in zip(trainable, parts, strict=True):
        is_matrix = _num_dimensions(parameter) >= 2 and not _is_norm_or_bias(model, name)
        orthogonal = optim.name == "muon" and is_matrix and id(parameter) not in lists_of_vectors
        groups.setdefault((is_matrix, part, orthogonal), []).append(parameter)
    factors = [1.0, *optim.group_lr.values()]
    # Groups and their order are part of what a checkpoint of ZeRO holds, and rates may change when a run is
    # resumed: so they follow from the parts that have a factor, not from the factors. Matrices first.
    return [
        {
            "params": groups[key],
            "weight_decay": optim.weight_decay if key[0] else 0.0,
            "lr_factor": factors[key[1]],
            "orthogonal": key[2],
        }
        for key in sorted(groups, reverse=True)
    ]


def parts_of(names: Sequence[str], optim: OptimConfig) -> list[int]:
    """Which part of `optim.group_lr` each parameter belongs to, counted from 1; 0 for none. The last pattern
    that names it counts.

    Raises:
        ConfigError: A pattern names none of them.
    """
    parts = [0] * len(names)
    problems = []
    for part, pattern in enumerate(optim.group_lr, start=1):
        named = [number for number, name in enumerate(names) if names_part(pattern, name)]
        for number in named:
            parts[number] = part
        if not named:
            cure = f"Something that is trained: {names[0]}."
            problems.append(Problem("optim.group_lr", f"nothing trained is called {pattern!r}", cure))
    if problems:
        raise ConfigError(*problems)
    return parts


def _embeddings_and_heads(model: nn.Module) -> set[int]:
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    heads = [inner.get_output_embeddings() for inner in models]
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return {id(p) for layer in (*heads, *embeddings) if layer is not None for p in layer.parameters()}


def _is_norm_or_bias(model: nn.Module, name: str) -> bool:
    """By its name or its module's. Dimensions do not tell: fused experts keep their biases in one table
    (gpt-oss), and a norm may have scales for each head (Cohere).
    """
    owner, _, last = name.rpartition(".")
    return "bias" in last.split("_") or type(model.get_submodule(owner)).__name__.endswith("Norm")


def _num_dimensions(parameter: nn.Parameter) -> int:
    # `ds_shape` is put on the parameter by DeepSpeed when it partitions it; no other mark exists.
    full_shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(full_shape)


def build_optimizer(model: nn.Module, optim: OptimConfig, fused: bool = True) -> torch.optim.Optimizer:
    """The optimizer that the config names, over `build_param_groups`.

    Args:
        model: Its parameters that require gradients are optimized.
        optim: Name, learning rate, betas, eps and decay; the rate is set anew at every step.
        fused: Ask for AdamW's fused kernel (5 to 7 times the loop's speed on a CPU); taken where every
            parameter is on a device that has one.

    Raises:
        ConfigError: See `build_param_groups`.
        MachineError: adamw_8bit without bitsandbytes.
    """
    groups = build_param_groups(model, optim)
    devices = {p.device.type for group in groups for p in group["params"]}
    fused = fused and devices <= {"cpu", "cuda"}
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused)
    if optim.name == "muon":
        return MuonAdamW(groups, optim.lr, optim.betas, optim.eps, fused)
    if optim.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=optim.lr)
    return _adamw_8bit(groups, optim)


def _adamw_8bit(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    require_package("adamw_8bit")
    from bitsandbytes.optim.adamw import AdamW8bit

    return AdamW8bit(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr`, times its factor, for every group of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
