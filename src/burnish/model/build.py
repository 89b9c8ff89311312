"""The model that a run trains: loaded, grown by new tokens, adapted, begun with an adapter's weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from burnish.config.adapter_file import token_rows_of
from burnish.config.schema import Config
from burnish.model.adapt import adapt
from burnish.model.begin import begin_with, tell_doubt
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
        ConfigError: The model does not exist, or cannot be adapted so; or the adapter to begin with is
            not one of it.
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
    if config.adapter is not None and config.adapter.path is not None:
        assert isinstance(adapted, PeftModel)
        tell_doubt(config)
        with init_context():
            begin_with(adapted, Path(config.adapter.path), token_rows_of(config.adapter))
    return adapted
