"""Where the parts of a Hugging Face causal language model are: body, head, and what the head does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from burnish.model.grown import GrownHead
from burnish.model.head import HeadShape


@dataclass(frozen=True)
class Head:
    """A head that is one matrix, and what is done to its output."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    shape: HeadShape


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model itself, inside an adapter or not."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"expected a transformers model, got {type(inner).__name__}")
    return inner


def body_of(model: PreTrainedModel) -> PreTrainedModel | None:
    """The part that turns tokens into hidden states; None where there is no such part apart."""
    # `get_decoder` looks for names; a family may give one of them to its head (ModernBERT's
    # decoder), or call its body otherwise than its prefix says (Llama 4): then any child will do
    # that is a model itself.
    candidates = [model.get_decoder(), model.base_model, *model.children()]
    for body in candidates:
        if isinstance(body, PreTrainedModel) and body is not model:
            return body
    return None


def head_layer(model: PreTrainedModel) -> nn.Linear | GrownHead | None:
    """The head, if it is one plain linear layer (an adapter on it makes it more than that), or one with
    rows of their own for new tokens."""
    layer = model.get_output_embeddings()
    return layer if isinstance(layer, GrownHead) or type(layer) is nn.Linear else None


def head_of(model: PreTrainedModel) -> Head | None:
    """The matrix of `head_layer`, put together where that has two."""
    layer = head_layer(model)
    if layer is None:
        return None
    shape = head_shape(model.config)
    if isinstance(layer, GrownHead):
        return Head(layer.merged_weight(), None, shape)
    return Head(layer.weight, layer.bias, shape)


def head_shape(config: Any) -> HeadShape:
    """What a family does to its logits, from the config attributes that families share.

    Only a proposal: `attention.py` compares it with the model's own logits.
    """
    text = config.get_text_config(decoder=True).to_dict()
    scale = float(text.get("logit_scale") or 1.0)  # Cohere
    scale *= float(text.get("lm_head_multiplier") or 1.0)  # Falcon-H1
    scale /= float(text.get("logits_scaling") or 1.0)  # Granite
    scale /= float(text.get("logits_mup_width_multiplier") or 1.0)  # Inkling
    if text.get("dim_model_base"):  # MiniCPM
        scale *= float(text["dim_model_base"]) / float(text["hidden_size"])
    # Gemma 2 and later; RecurrentGemma; xLSTM
    softcaps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    softcap = next((text[name] for name in softcaps if text.get(name)), None)
    return HeadShape(scale, None if not softcap else float(softcap))
