"""Vision-language checkpoints as text models: the language model is trained, everything else is kept.

The whole model is loaded, so that the result is again the whole model, but only its language model ever
runs: text has no images, and the vision part would compute nothing from it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from burnish.errors import ConfigError, Problem
from burnish.model.anatomy import body_of


def architecture_of(config: Any) -> type[PreTrainedModel] | None:
    """transformers' class for a config: a causal language model, or a vision-language model where the
    checkpoint is one. None where there is neither (code that comes with a model is not looked at)."""
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    whole: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    named = (config.architectures or [""])[0]
    # Of Llama 4 and some others there is a class for the text alone; its checkpoints are the whole model.
    if whole is not None and (causal is None or named == whole.__name__):
        return whole
    return causal


def loader_of(config: Any) -> Any:
    """The class of transformers whose `from_pretrained` loads `architecture_of`."""
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    is_whole = whole is not None and architecture_of(config) is whole
    return AutoModelForImageTextToText if is_whole else AutoModelForCausalLM


def has_vision(model: PreTrainedModel) -> bool:
    """Whether a model is more than a language model."""
    return model.config.get_text_config(decoder=True) is not model.config


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a vision-language model that turns tokens into hidden states.

    Raises:
        ConfigError: It has no such part of its own.
    """
    body = body_of(model)
    text = model.config.get_text_config(decoder=True)
    if body is None or type(body.config) is not type(text):
        what = f"{type(model).__name__} has no language model of its own, apart from images"
        raise ConfigError(Problem("model.path", what, "Give a checkpoint of the language model alone."))
    return body


def freeze_vision(model: PreTrainedModel) -> None:
    """Train nothing but the language model and the head; a plain language model stays as it is.

    Raises:
        ConfigError: See `language_model`.
    """
    if not has_vision(model):
        return
    kept = kept_names(model)
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.requires_grad_(False)


def kept_names(model: PreTrainedModel) -> set[str]:
    """Parameters that are no part of the language model; none of a plain language model."""
    if not has_vision(model):
        return set()
    parts: tuple[nn.Module | None, ...] = (
        language_model(model),
        model.get_input_embeddings(),
        model.get_output_embeddings(),
    )
    ours = {id(p) for part in parts if part is not None for p in part.parameters()}
    return {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) not in ours}


def count_kept(config: Any) -> tuple[int, int]:
    """Parameters that are no part of the language model, and how many of them are weights of plain linear
    layers, which `adapter.quantize` packs too. The model is built without memory for its weights.

    Args:
        config: As transformers reads a config.json.

    Returns:
        Zeros for a plain language model, and where code that comes with the model would have to be run.

    Raises:
        ConfigError: See `language_model`.
    """
    architecture: Any = architecture_of(config)
    if architecture is None or config.get_text_config(decoder=True) is config:
        return 0, 0
    with torch.device("meta"):
        model = architecture(config)
    kept = kept_names(model)
    linears = {f"{name}.weight" for name, module in model.named_modules() if type(module) is nn.Linear}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if name in kept}
    return sum(sizes.values()), sum(size for name, size in sizes.items() if name in linears)


def language_linears(model: PreTrainedModel) -> list[str]:
    """Full names of the linear layers inside the language model, for an adapter on all of them."""
    body = language_model(model)
    inside = {id(module) for module in body.modules() if isinstance(module, nn.Linear)}
    return [name for name, module in model.named_modules() if id(module) in inside]
