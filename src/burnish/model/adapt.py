"""Adapters, freezing and activation checkpointing: what is trained, and what is computed again."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from burnish.config.patterns import names_part
from burnish.config.schema import AdapterConfig
from burnish.errors import ConfigError, Problem
from burnish.model.vision import has_vision, language_linears

Checkpointing = Literal["none", "light", "full", "auto"]


def adapt(
    model: PreTrainedModel,
    adapter: AdapterConfig | None,
    activation_checkpointing: Checkpointing,
    seed: int = 0,
    freeze: Sequence[str] = (),
) -> PreTrainedModel | PeftModel:
    """Make a loaded model trainable as the config says.

    Args:
        model: The base model.
        adapter: None trains every weight; otherwise the base is frozen and adapter weights, in fp32,
            are trained.
        activation_checkpointing: `none`, or `full`: every layer keeps its input and is computed again
            in the backward. (`auto` is decided by the caller.)
        seed: Of fresh adapter weights: the same on every rank and under every engine.
        freeze: Parts that are not trained, of the model or of its adapter (see `config/patterns.py`).

    Raises:
        ConfigError: Target modules or parts to freeze that do not exist, nothing left to train, or a level
            of checkpointing that this model cannot do.
    """
    if activation_checkpointing == "light":
        raise ConfigError(
            Problem(
                "model.activation_checkpointing",
                "light is not built yet",
                "Use none, or full where memory is short.",
            )
        )
    if activation_checkpointing == "full":
        _checkpoint_layers(model)
    if adapter is None:
        _freeze(model, freeze)
        return model
    if activation_checkpointing == "full":
        # The frozen embeddings' output needs no gradient; a recomputed layer wants an input that does.
        model.enable_input_require_grads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, _lora_config(model, adapter), autocast_adapter_dtype=False)
    assert isinstance(adapted, PeftModel)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    _freeze(adapted, freeze)
    return adapted


def _freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Take the named parts out of training. Tied weights are one: freezing either freezes both."""
    named = [(name, p) for name, p in model.named_parameters(remove_duplicate=False)]
    problems = []
    for pattern in patterns:
        found = [parameter for name, parameter in named if names_part(pattern, name)]
        for parameter in found:
            parameter.requires_grad_(False)
        if not found:
            parts = sorted({part for name, _ in named for part in name.split(".")})
            close = difflib.get_close_matches(pattern, parts, n=3)
            cure = f"Did you mean {' or '.join(close)}?" if close else f"A name there is: {named[0][0]}."
            problems.append(Problem("model.freeze", f"no weight of the model is called {pattern!r}", cure))
    if patterns and not any(parameter.requires_grad for _, parameter in named):
        problems.append(Problem("model.freeze", "leaves nothing to train", "Freeze less."))
    if problems:
        raise ConfigError(*problems)


def _checkpoint_layers(model: PreTrainedModel) -> None:
    if not model.supports_gradient_checkpointing:
        raise ConfigError(
            Problem(
                "model.activation_checkpointing",
                f"{type(model).__name__} cannot compute its layers again",
                "Set it to none.",
            )
        )
    # Non-reentrant: the only kind that works with frozen inputs and keyword arguments.
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def _lora_config(model: PreTrainedModel, adapter: AdapterConfig) -> LoraConfig:
    targets = _targets(model, adapter.targets)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=adapter.dropout,
        target_modules=targets,
        use_rslora=adapter.kind == "rslora",
        use_dora=adapter.kind == "dora",
        init_lora_weights="pissa" if adapter.kind == "pissa" else True,
    )


def _targets(model: PreTrainedModel, targets: str | tuple[str, ...]) -> str | list[str]:
    """Target modules for peft, every name checked against the model."""
    if isinstance(targets, str):
        # peft's all-linear: every linear layer but the output embeddings, of a vision part too.
        return language_linears(model) if has_vision(model) else targets
    names = [name for name, _ in model.named_modules() if name]
    known = set(names) | {name.rsplit(".", 1)[-1] for name in names}
    problems = []
    for target in targets:
        if target in known or any(name.endswith(f".{target}") for name in names):
            continue
        close = difflib.get_close_matches(target, sorted(known), n=3)
        cure = f"Did you mean {' or '.join(close)}?" if close else f"There are: {', '.join(_leaves(model))}."
        problems.append(Problem("adapter.targets", f"the model has no module {target!r}", cure))
    if problems:
        raise ConfigError(*problems)
    if not has_vision(model):
        return list(targets)
    return [n for n in language_linears(model) if any(f".{n}".endswith(f".{target}") for target in targets)]


def _leaves(model: PreTrainedModel) -> list[str]:
    return sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
