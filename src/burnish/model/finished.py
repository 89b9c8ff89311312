"""A finished model from its folder, full or an adapter on its base, as a user of it loads it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from burnish.config.adapter_file import CONFIG_FILE as ADAPTER_FILE
from burnish.config.adapter_file import recorded_base, tokenizer_place
from burnish.durable import unreadable_files
from burnish.errors import counted
from burnish.hub import only_cached
from burnish.model.load import check_report, reading_weights
from burnish.model.vision import loader_of


def load_finished(path: str, dtype: torch.dtype | None = None) -> PreTrainedModel | PeftModel:
    """Load a full model, or an adapter with its base.

    Args:
        path: Folder, or a full model's hub name.
        dtype: Of the weights; None for that of the files.

    Raises:
        OSError, ValueError: As transformers and peft have them, where something is not there or does not fit.
        PermissionError: A file may not be read.
        MachineError: A file of weights is damaged, or the base's are not those of its config.
    """
    _refuse_unreadable(path)
    file = Path(path) / ADAPTER_FILE
    if not file.is_file():
        return _load_full(path, None, dtype)
    try:
        adapter = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    name = recorded_base(Path(path))
    if name is None:
        raise ValueError(f"{file} names no base (base_model_name_or_path)")
    base = _load_full(name, adapter.get("revision"), dtype)
    make_room(base, adapter)
    adapted: Any = _on_base(base, path, name)
    if (Path(path) / GENERATION_CONFIG_NAME).is_file():  # where it stops; peft asks the base's
        adapted.generation_config = GenerationConfig.from_pretrained(path)
    return adapted


def load_finished_tokenizer(path: str, **arguments: Any) -> Any:
    """The tokenizer of a full model or an adapter: its own, or its base's where an adapter's folder, as peft
    alone leaves one, has none.

    Args:
        path: As for `load_finished`.
        arguments: For `AutoTokenizer.from_pretrained`.

    Raises:
        OSError, ValueError: As transformers has them.
    """
    named = tokenizer_place(path)
    return AutoTokenizer.from_pretrained(named, local_files_only=only_cached(named), **arguments)


def _on_base(base: PreTrainedModel, path: str, name: str) -> PeftModel:
    """The adapter on its base, every weight of the file in its place. Of those that are missing peft only
    warns, of those without a place it says nothing: another model's adapter would do a part of its work."""
    try:
        with reading_weights(path):
            adapted = PeftModel.from_pretrained(base, path)
            found = adapted.load_adapter(path, "default")  # again: this one says what it found
    except KeyError as error:
        raise ValueError(f"its {ADAPTER_FILE} is none of peft's: {error} is missing or not known") from error
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        first = next(line.strip() for line in str(error).splitlines() if "size mismatch" in line)
        raise ValueError(f"it is not an adapter of {name}: {first}") from error
    for what, keys in (("are missing", found.missing_keys), ("have no place there", found.unexpected_keys)):
        if keys:
            raise ValueError(
                f"it is not an adapter of {name}: {counted(len(keys), 'weight')} {what}: {keys[0]} …"
            )
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
    with reading_weights(path):
        model, report = loader_of(config).from_pretrained(
            path,
            revision=revision,
            dtype=dtype or "auto",
            local_files_only=offline,
            ignore_mismatched_sizes=True,  # so that they come back by name instead of as a traceback
            output_loading_info=True,
        )
    check_report(path, {**report, "unexpected_keys": []})  # what is left over does no harm here
    return model
