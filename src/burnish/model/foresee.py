"""What a model will be like, found out from its config.json alone: its widths, its largest weight, how it
will be fed. No weights are read."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from burnish.config.layout import OWN_ATTENTION
from burnish.config.schema import Config, ModelConfig
from burnish.model.adapt import compute_again, require_names
from burnish.model.attention import Capability, asked, can_isolate
from burnish.model.begin import tell_doubt
from burnish.model.extras import Balance
from burnish.model.load import load_model_config
from burnish.model.vision import architecture_of, count_kept, freeze_vision
from burnish.plan.shapes import ModelShape


def shape_of(model_config: Any) -> ModelShape:
    """Widths of a model, and how much it has besides a language model.

    Args:
        model_config: As `load_model_config` returns it.

    Raises:
        ConfigError: It lacks a width, or has no language model of its own.
    """
    return ModelShape.from_config_json(model_config.to_dict()).beside(*count_kept(model_config))


def largest_parameter(model: ModelConfig) -> int | None:
    """Numbers in a model's largest weight, with an eighth more for tokens that may be added.

    Returns:
        None where the code comes with the model, which only loading runs.
    """
    empty = _empty(load_model_config(model))
    return None if empty is None else max(p.numel() for p in empty.parameters()) * 9 // 8


def _empty(model_config: Any) -> PreTrainedModel | None:
    """A model without memory for its weights."""
    architecture = architecture_of(model_config)
    if architecture is None:
        return None
    with torch.device("meta"):
        return architecture(model_config)


def foresee_capability(config: Config) -> Capability | None:
    """What `can_isolate` will find for the model when it is loaded.

    The model is built without memory for its weights, in bf16, so that the trial runs on a small model of the
    same architecture, as it does for every model whose weights cannot be computed with.

    Returns:
        None where the code comes with the model, which only loading runs.

    Raises:
        ConfigError: What `can_isolate` raises.
    """
    empty = _empty(load_model_config(config.model))
    if empty is None:
        return None
    choice, max_tokens, packing, alone = asked(config)
    # A kernel that is asked for may not be installed here, and what is found out does not depend on it.
    choice = choice if choice in OWN_ATTENTION else "eager"
    return can_isolate(empty.bfloat16(), choice, max_tokens, packing, alone)


def require_parts(config: Config) -> list[str] | None:
    """Refuse `adapter.targets`, `model.freeze` and `train.router_aux_loss` where the model has no such part,
    in `adapt`'s own words; layers that cannot be computed again as asked; and an adapter to begin with that
    is not one of this model.

    The model is built without memory for its weights. Silent where the code comes with the model, which only
    loading runs.

    Returns:
        Names of the weights that will be trained, as the engine will know them; None where nobody knows.

    Raises:
        ConfigError: See `require_names` and `compute_again`.
    """
    empty = _empty(load_model_config(config.model))
    if empty is None:
        return None
    tell_doubt(config)
    freeze_vision(empty)
    level = config.model.activation_checkpointing
    compute_again(empty, "none" if level == "auto" else level, config.model.mlp_tile_tokens)
    Balance.of(empty, config.train.router_aux_loss)
    adapted = require_names(empty, config.adapter, config.model.freeze)
    if config.adapter is not None and (config.model.add_tokens or config.adapter.path is not None):
        return None  # rows of tokens may be trained beside the adapter: how they are called is peft's to say
    return [f"model.{name}" for name, weight in adapted.named_parameters() if weight.requires_grad]
