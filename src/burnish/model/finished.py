"""A finished model from its folder, full or an adapter on its base, as a user of it loads it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from burnish.durable import unreadable_files
from burnish.hub import only_cached
from burnish.model.vision import loader_of

_ADAPTER_FILE = "adapter_config.json"


def load_finished(path: str, dtype: torch.dtype | None = None) -> PreTrainedModel | PeftModel:
    """Load a full model, or an adapter with its base.

    Args:
        path: Folder, or a full model's hub name.
        dtype: Of the weights; None for that of the files.

    Raises:
        OSError, ValueError: As transformers has them, where something is not there or does not fit.
        PermissionError: A file may not be read.
    """
    try:
        return _load_adapted(path, dtype) if _is_adapter(path) else _load_full(path, None, dtype)
    except SafetensorError as error:  # neither an OSError nor a ValueError, for a file that was cut off too
        raise OSError(f"a file of weights is damaged: {error}") from error


def base_of(path: str) -> tuple[str, str | None]:
    """Folder or hub name of an adapter's base, and its revision.

    Raises:
        OSError, ValueError: The adapter's config cannot be read, or does not say.
    """
    adapter = json.loads((Path(path) / _ADAPTER_FILE).read_text(encoding="utf-8"))
    base = adapter.get("base_model_name_or_path") if isinstance(adapter, dict) else None
    if not base:
        raise ValueError(f"{_ADAPTER_FILE} does not name its base (base_model_name_or_path)")
    return str(base), adapter.get("revision")


def _is_adapter(path: str) -> bool:
    return (Path(path) / _ADAPTER_FILE).is_file()


def _load_adapted(path: str, dtype: torch.dtype | None) -> PeftModel:
    _refuse_unreadable(path)
    base = _load_full(*base_of(path), dtype)
    adapter = json.loads((Path(path) / _ADAPTER_FILE).read_text(encoding="utf-8"))
    make_room(base, adapter)
    adapted: Any = PeftModel.from_pretrained(base, path)
    if (Path(path) / GENERATION_CONFIG_NAME).is_file():  # where it stops; peft asks the base's
        adapted.generation_config = GenerationConfig.from_pretrained(path)
    return adapted


def make_room(base: PreTrainedModel, adapter: dict[str, Any]) -> None:
    """Give an adapter's base rows for the tokens that the adapter brings; it brings all they hold."""
    rows = base.config.get_text_config(decoder=True).vocab_size
    brought = adapter.get("trainable_token_indices") or {}
    lists = brought.values() if isinstance(brought, dict) else [brought]
    needed = 1 + max((max(tokens) for tokens in lists), default=-1)
    if needed > rows:
        base.resize_token_embeddings(needed, mean_resizing=False)


def _refuse_unreadable(path: str) -> None:
    for file in unreadable_files(Path(path)) if Path(path).is_dir() else ():
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))


def _load_full(path: str, revision: str | None, dtype: torch.dtype | None) -> PreTrainedModel:
    _refuse_unreadable(path)
    offline = only_cached(path)
    config = AutoConfig.from_pretrained(path, revision=revision, local_files_only=offline)
    return loader_of(config).from_pretrained(
        path, revision=revision, dtype=dtype or "auto", local_files_only=offline
    )
