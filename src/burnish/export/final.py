"""The result as a Hugging Face folder: weights or adapter, tokenizer, template, generation config, card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from burnish.config.schema import Config
from burnish.export.card import ExportFacts, model_card
from burnish.export.chat import generation_config, save_tokenizer
from burnish.export.folder import prove_weights, whole_folder
from burnish.model.load import COMPUTE_DTYPES, load_model

MAX_SHARD_SIZE = "5GB"
BASE_FOLDER = "base"
"""Where the base of an adapter stands that exists nowhere else (`model.init: random`)."""


def export_final(
    config: Config,
    model: PreTrainedModel | PeftModel,
    state: Mapping[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    out: Path,
    facts: ExportFacts,
) -> Path:
    """Write what was trained into a folder that transformers, peft, TRL and vLLM load; on rank 0.

    The folder appears whole or not at all, and its weights have been read back and compared.

    Args:
        config: The run.
        model: Gives names and config; its own weights (partitioned, perhaps) are not read.
        state: `Engine.export_state`: all weights, or an adapter's.
        tokenizer: Saved beside the weights.
        template: The chat template that was trained with; saved as the tokenizer's.
        out: The folder; what stands there is replaced.
        facts: For the card.

    Returns:
        `out`.

    Raises:
        MachineError: It cannot be written, or what was written is not what was trained.
    """
    with whole_folder(out) as staging:
        if isinstance(model, PeftModel):
            _save_adapter(config, model, state, staging, out)
        else:
            save_model(model, state, COMPUTE_DTYPES[config.model.dtype], staging)
        own = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(own, PreTrainedModel)
        save_generation_config(own.generation_config, tokenizer, template, staging)
        save_tokenizer(tokenizer, template, staging)
        card = model_card(config, out.parent.resolve().name, facts)
        (staging / "README.md").write_text(card, encoding="utf-8")
    return out


def save_model(
    model: PreTrainedModel, state: Mapping[str, torch.Tensor], dtype: torch.dtype, folder: Path
) -> None:
    """Weights, rounded to `dtype`, and config of a full model; read back and compared.

    Args:
        model: Gives names and config.
        state: All weights by the model's names; tied ones are one tensor.
        dtype: Of floating-point weights in the files.
        folder: Exists.
    """
    rounded: dict[int, torch.Tensor] = {}
    for tensor in state.values():
        storage = tensor.data_ptr()
        if storage not in rounded:
            rounded[storage] = (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
    weights = {name: rounded[tensor.data_ptr()] for name, tensor in state.items()}
    model.save_pretrained(folder, state_dict=dict(weights), max_shard_size=MAX_SHARD_SIZE)
    # transformers writes the dtype of the weights in memory (fp32 masters), not that of the files.
    _change(folder / "config.json", dtype=str(dtype).removeprefix("torch."))
    prove_weights(folder, weights)


def save_generation_config(
    base: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase, template: str | None, folder: Path
) -> None:
    """The base's way of generating, made to stop where this tokenizer and template stop."""
    generation_config(base, tokenizer, template).save_pretrained(str(folder))


def _save_adapter(
    config: Config, model: PeftModel, state: Mapping[str, torch.Tensor], staging: Path, out: Path
) -> None:
    # Not "auto": that would ask the hub whether the embedding has grown.
    model.save_pretrained(str(staging), state_dict=dict(state), save_embedding_layers=False)
    prove_weights(staging, {name.replace(".default.", "."): tensor for name, tensor in state.items()})
    base = Path(config.model.path)
    name = str(base.resolve()) if base.is_dir() else config.model.path
    if config.model.init == "random":
        name = str((out / BASE_FOLDER).resolve())
        _save_fresh_base(config, staging / BASE_FOLDER)
    _change(
        staging / "adapter_config.json", base_model_name_or_path=name, revision=config.model.revision
    )


def _save_fresh_base(config: Config, folder: Path) -> None:
    """Fresh weights exist nowhere but in this run; they are a function of the seed, so make them again."""
    base = load_model(
        config.model,
        seed=config.train.seed,
        init_context=None,
        param_dtype=torch.float32,
        tokenizer_size=0,
    )
    save_model(base, base.state_dict(), torch.float32, folder)


def _change(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
