"""The model that a run trains: loaded, grown by new tokens, adapted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from burnish.config.schema import Config
from burnish.model.adapt import adapt
from burnish.model.load import load_model
from burnish.model.vocabulary import train_tokens
from burnish.records import Vocabulary


def build_model(
    config: Config,
    dtype: torch.dtype,
    vocabulary: Vocabulary,
    new_tokens: Sequence[int],
    init_context: Callable[[], AbstractContextManager[Any]],
) -> PreTrainedModel | PeftModel:
    """Load the model and make it trainable as the config says.

    Args:
        config: The run.
        dtype: What parameters are kept in.
        vocabulary: What the tokenizer asks of the embedding.
        new_tokens: Whose rows are trained beside an adapter too (`ModelShape.new_tokens`).
        init_context: Makes the engine's context for loading (ZeRO-3): one for each stage that reads weights.

    Raises:
        ConfigError: The model does not exist, or cannot be adapted so.
        MachineError: Weights are missing, left over, or of another shape; a package is missing.
    """
    model = load_model(
        config.model,
        seed=config.train.seed,
        init_context=init_context(),
        param_dtype=dtype,
        quantize=config.adapter.quantize if config.adapter else None,
        vocabulary=vocabulary,
    )
    with init_context():  # DoRA and PiSSA read weights: ZeRO-3 has to gather them
        adapted = adapt(
            model,
            config.adapter,
            config.model.activation_checkpointing,
            seed=config.train.seed,
            freeze=config.model.freeze,
            mlp_tile_tokens=config.model.mlp_tile_tokens,
        )
    train_tokens(adapted, new_tokens)
    return adapted
