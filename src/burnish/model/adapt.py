"""Adapters, freezing and activation checkpointing: what is trained, and what is computed again."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from burnish.config.adapter_file import modules_left_out
from burnish.config.patterns import names_part
from burnish.config.schema import AdapterConfig
from burnish.errors import ConfigError, Problem
from burnish.model.begin import require_fit
from burnish.model.reach import not_called, tell_unreached, unreached_weights
from burnish.model.recompute import Level, Region, recompute_layers
from burnish.model.tiling import tile_layers
from burnish.model.vision import has_vision, language_linears
from burnish.runtime import seeded


def adapt(
    model: PreTrainedModel,
    adapter: AdapterConfig | None,
    activation_checkpointing: Level,
    seed: int = 0,
    freeze: Sequence[str] = (),
    mlp_tile_tokens: int | None = None,
) -> PreTrainedModel | PeftModel:
    """Make a loaded model trainable as the config says.

    Args:
        model: The base model.
        adapter: None trains every weight; otherwise the base is frozen and adapter weights, in fp32,
            are trained.
        activation_checkpointing: What the backward computes again (see `recompute.py`); `auto` is
            resolved before, from the memory plan.
        seed: Of fresh adapter weights: the same on every rank and under every engine.
        freeze: Parts that are not trained, of the model or of its adapter (see `config/patterns.py`).
        mlp_tile_tokens: Compute MLPs so many tokens at a time (see `tiling.py`); None whole.

    Raises:
        ConfigError: Target modules or parts to freeze that do not exist, nothing left to train, or a level
            of checkpointing or tiles that this model cannot do.
    """
    compute_again(model, activation_checkpointing, mlp_tile_tokens)
    if adapter is None:
        _freeze(model, freeze)
        return model
    if activation_checkpointing != "none":
        # The frozen embeddings' output needs no gradient; a recomputed layer wants an input that does.
        model.enable_input_require_grads()
    with seeded(seed):
        adapted = _adapted(model, adapter)
    assert isinstance(adapted, PeftModel)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    _leave_inputs_as_they_are(adapted)
    _freeze(adapted, freeze)
    return adapted


def compute_again(model: PreTrainedModel, level: Level, mlp_tile_tokens: int | None) -> None:
    """Let the backward compute again what the config says; the model may be without memory for its weights.

    Args:
        model: Without an adapter yet.
        level, mlp_tile_tokens: As for `adapt`.

    Raises:
        ConfigError: The model cannot do that.
    """
    tiles = Region()
    if mlp_tile_tokens is not None:
        tile_layers(model, mlp_tile_tokens, tiles)
    recompute_layers(model, level, tiles)


def require_names(model: PreTrainedModel, adapter: AdapterConfig | None, freeze: Sequence[str]) -> nn.Module:
    """Refuse what `adapt` refuses of names, in its words; the model may be without memory for its weights.

    Args:
        model: The base model; not to be used afterwards.
        adapter, freeze: As for `adapt`.

    Returns:
        The model, adapted: what is trained of it has the names that it will have.

    Raises:
        ConfigError: Target modules or parts to freeze that do not exist, nothing left to train, or an
            adapter to begin with that is not one of this model.
    """
    adapted: nn.Module = model
    if adapter is not None:
        _target_weights(model, adapter)
        # No name depends on the rank. PiSSA begins with the weights' own values, under plain LoRA's names.
        kind = "lora" if adapter.kind == "pissa" else adapter.kind
        rank = 1 if adapter.path is None else adapter.rank
        adapted = _adapted(model, adapter.model_copy(update={"rank": rank, "kind": kind}))
        if adapter.kind == "pissa" and any(isinstance(module, ParamWrapper) for module in adapted.modules()):
            raise _no_pissa_of_experts()
        if adapter.path is not None:
            assert isinstance(adapted, PeftModel)
            require_fit(adapted, adapter)
    _freeze(adapted, freeze)
    return adapted


def _leave_inputs_as_they_are(model: PeftModel) -> None:
    """peft casts an adapter's input to the adapter's fp32, which autocast takes back: the same numbers twice
    over, and a copy of its own for each product's backward. Engines see to one dtype by themselves."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


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


def _adapted(model: PreTrainedModel, adapter: AdapterConfig) -> nn.Module:
    config = _lora_config(model, adapter)
    if isinstance(adapter.targets, str):
        tell_unreached(model)
    try:
        return get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:  # what peft knows not to work, such as convolutions of Mamba layers
        what = f"cannot all be given an adapter: {error}"
        # peft adapts the fused experts of some mixtures by itself, as weights, which cannot have dropout.
        of_dropout = adapter.dropout > 0 and "lora_dropout" in str(error)
        cure = "Set adapter.dropout to 0." if of_dropout else "Name other layers, or all-linear."
        raise ConfigError(Problem("adapter.targets", what, cure)) from error
    except AttributeError as error:  # peft looks for a weight of the module that holds fused experts
        if adapter.kind != "pissa":
            raise
        raise _no_pissa_of_experts() from error


def _no_pissa_of_experts() -> ConfigError:
    """peft adapts the fused experts of some mixtures by itself, and can take nothing out of them."""
    what = "is pissa, which an adapter on fused experts cannot be"
    return ConfigError(Problem("adapter.kind", what, "Set it to lora or rslora, or name other layers."))


def _lora_config(model: PreTrainedModel, adapter: AdapterConfig) -> LoraConfig:
    weights = _target_weights(model, adapter)
    excluded = not_called(model) if isinstance(adapter.targets, str) else modules_left_out(adapter)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=adapter.dropout,
        target_modules=_targets(model, adapter.targets, weights),
        target_parameters=weights or None,
        exclude_modules=excluded or None,
        use_rslora=adapter.kind == "rslora",
        use_dora=adapter.kind == "dora",
        init_lora_weights="pissa" if adapter.kind == "pissa" else True,
    )


def _target_weights(model: PreTrainedModel, adapter: AdapterConfig) -> list[str]:
    """Those targets that are no modules but weights outside of linear layers, such as fused experts."""
    if isinstance(adapter.targets, str):
        return []
    there = [f".{name}" for name in unreached_weights(model)]
    weights = [target for target in adapter.targets if any(name.endswith(f".{target}") for name in there)]
    problems = []
    if weights and adapter.dropout:
        what = f"is {adapter.dropout}, which an adapter on {weights[0]} cannot have"
        problems.append(Problem("adapter.dropout", what, "Set it to 0."))
    if weights and adapter.kind not in ("lora", "rslora"):
        what = f"is {adapter.kind}, which an adapter on {weights[0]} cannot be"
        problems.append(Problem("adapter.kind", what, "Set it to lora or rslora."))
    if problems:
        raise ConfigError(*problems)
    return weights


def _targets(
    model: PreTrainedModel, targets: str | tuple[str, ...], weights: Sequence[str]
) -> str | list[str]:
    """Target modules for peft, every name checked against the model; `weights` are targets that are none."""
    if isinstance(targets, str):
        # peft's all-linear: every linear layer but the output embeddings, of a vision part too.
        return language_linears(model) if has_vision(model) else targets
    targets = tuple(target for target in targets if target not in weights)
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
