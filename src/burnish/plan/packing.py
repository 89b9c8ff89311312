"""Whether documents will be packed, as far as config and config.json tell: what `plan` need not try."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from burnish.config.layout import OWN_ATTENTION
from burnish.config.schema import Config

_SURE = frozenset(
    {
        "llama", "mistral", "qwen2", "qwen3", "gemma2", "granite", "cohere", "gpt_neox",
        "mixtral", "olmo2", "smollm3", "qwen3_moe",
    }
)  # fmt: skip
"""Families that keep packed documents apart; a test tries each of them."""


def surely_packed(config: Config, model_config: Mapping[str, Any]) -> bool | None:
    """Whether micro-batches will be packed; None where only a trial of the model can tell.

    Args:
        config: The run's.
        model_config: The model's config.json.
    """
    if config.data.packing == "off" or config.model.attention not in OWN_ATTENTION:
        return False
    return True if surely_apart(model_config) else None


def surely_apart(model_config: Mapping[str, Any]) -> bool:
    """Whether a model is known to number each document by itself and without end, and to keep them apart.

    Args:
        model_config: Its config.json.
    """
    text = model_config.get("text_config")
    if text is not None or model_config.get("model_type") not in _SURE or "auto_map" in model_config:
        return False
    rope = model_config.get("rope_parameters") or model_config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else None
    # The others (dynamic NTK, LongRoPE) are chosen by the longest document of a row.
    return kind in ("default", "linear", "llama3", "yarn")
