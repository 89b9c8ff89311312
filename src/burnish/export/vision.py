"""What a vision-language checkpoint has besides its language model comes out as it went in."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from burnish.config.schema import ModelConfig
from burnish.hub import only_cached
from burnish.model.load import load_model_config
from burnish.model.vision import has_vision, kept_names, loader_of

PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "image_processor_config.json",
    "chat_template.json",
)
"""What transformers' processors are made from, besides the tokenizer."""


def kept_weights(model: PreTrainedModel, source: ModelConfig) -> dict[str, torch.Tensor]:
    """The weights of everything but the language model, as the checkpoint has them, in its dtype.

    Training may keep them in another one, so they are read again.

    Args:
        model: That was trained; gives names.
        source: Where it was loaded from.
    """
    names = kept_names(model)
    if not names or source.init == "random":
        return {}
    config = load_model_config(source)
    place = Path(source.path).expanduser()
    path = str(place) if place.exists() else source.path
    published: Any = loader_of(config).from_pretrained(
        path, revision=source.revision, dtype="auto", local_files_only=only_cached(path)
    )
    return {name: p.detach() for name, p in published.named_parameters() if name in names}


def copy_processor(model: PreTrainedModel, source: ModelConfig, folder: Path) -> None:
    """Copy the files that a vision-language model's processor is made from; others have none."""
    if not has_vision(model):
        return
    place = Path(source.path).expanduser()
    path = str(place) if place.exists() else source.path
    for name in PROCESSOR_FILES:
        found = cached_file(
            path,
            name,
            revision=source.revision,
            local_files_only=only_cached(path),
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is not None:
            shutil.copyfile(found, folder / name)
