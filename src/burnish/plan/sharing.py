"""Whether examples may share the computation of what they begin with: what config and config.json say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from burnish.config.layout import CURE_SHARING, sharing_conflicts
from burnish.config.schema import Config
from burnish.errors import ConfigError, Problem

_OF_OTHER_HEADS = ("summary_", "classifier_", "seq_classif")
"""Dropouts of this kind stand in config.json, but not in a language model."""


def unshared(config: Config, device_type: str | None, model_problem: str | None) -> str | None:
    """Why nothing is shared; None where it may be.

    Args:
        config: The run's.
        device_type: `cpu` or `cuda`; None where it is not known yet, which counts as `cuda`.
        model_problem: What `unsuited`, or a trial of the model, found.

    Raises:
        ConfigError: `data.share_prefix` is on, and it cannot be.
    """
    choice = config.data.share_prefix
    if choice == "off":
        return "data.share_prefix is off"
    problem = next(sharing_conflicts(config), None) or model_problem
    if choice == "on" and problem is not None:
        raise ConfigError(Problem("data.share_prefix", f"is on, but {problem}", CURE_SHARING))
    if problem is None and choice == "auto" and device_type != "cpu":
        return "it has been tried on a CPU only so far (data.share_prefix: on shares all the same)"
    return problem


def unsuited(model_config: Mapping[str, Any], max_tokens: int | None) -> str | None:
    """Why a model is not fit for it, as far as its config.json tells; None where it may be.

    Args:
        model_config: config.json.
        max_tokens: Tokens of the longest document; None if that is not known.
    """
    text = model_config.get("text_config")
    values = dict(model_config) | (dict(text) if isinstance(text, Mapping) else {})
    for key, value in values.items():
        is_number = isinstance(value, int | float)
        if "drop" in key and is_number and value > 0 and not key.startswith(_OF_OTHER_HEADS):
            return f"the model's {key} draws for each example anew"
    if values.get("attn_logit_softcapping"):
        return "no kernel caps attention scores, and without one it is slow"
    window = values.get("sliding_window")
    wide = window is None or (max_tokens is not None and max_tokens <= window)
    if not wide and values.get("use_sliding_window") is not False:
        return f"the model's sliding window of {window} tokens is shorter than an example may be"
    return None
