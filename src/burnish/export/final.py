"""The result as a Hugging Face folder: weights or adapter, tokenizer, template, generation config, card."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from burnish.config.schema import Config
from burnish.data.tokenizer import vocabulary_of
from burnish.errors import MachineError, Problem
from burnish.export.card import ExportFacts, model_card, write_facts
from burnish.export.chat import generation_config, save_tokenizer
from burnish.export.folder import prove_weights, whole_folder
from burnish.export.pissa import as_lora, as_lora_config
from burnish.export.vision import copy_processor, kept_weights
from burnish.model.load import COMPUTE_DTYPES, load_model
from burnish.model.vocabulary import token_rows

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
    pissa_start: Mapping[str, torch.Tensor] | None = None,
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
        pissa_start: An adapter's weights before the first step, for PiSSA (see `pissa.py`).

    Returns:
        `out`.

    Raises:
        MachineError: It cannot be written, or what was written is not what was trained.
    """
    with whole_folder(out) as staging:
        # A fresh model's generation config is nobody's choice; a pretrained one's is kept.
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        own = base.generation_config if config.model.init == "pretrained" else None
        if isinstance(model, PeftModel):
            base_path = _base_path(config, tokenizer, template, out.parent / BASE_FOLDER)
            state = state if pissa_start is None else as_lora(state, pissa_start)
            _save_adapter(model, state, base_path, config.model.revision, staging)
            if pissa_start is not None:
                file = staging / "adapter_config.json"
                _change(file, **as_lora_config(json.loads(file.read_text(encoding="utf-8"))))
        else:
            kept = kept_weights(model, config.model)
            save_model(model, state, COMPUTE_DTYPES[config.model.dtype], staging, kept)
            copy_processor(model, config.model, staging)
        save_generation_config(own, tokenizer, template, staging)
        save_tokenizer(tokenizer, template, staging)
        card = model_card(config, out.parent.resolve().name, facts)
        (staging / "README.md").write_text(card, encoding="utf-8")
        write_facts(staging, facts)
    return out


def save_model(
    model: PreTrainedModel,
    state: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    folder: Path,
    kept: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Weights, rounded to `dtype`, and config of a full model; read back and compared.

    Args:
        model: Gives names and config.
        state: All weights by the model's names; tied ones are one tensor.
        dtype: Of floating-point weights in the files.
        folder: Exists.
        kept: Weights that are written as they are, instead of those in `state`.
    """
    kept = kept or {}
    # Parameters only: some buffers (a router's correction) need their fp32.
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    rounded: dict[tuple[int, int], torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name in kept:
            weights[name] = kept[name].contiguous()
            continue
        key = (tensor.data_ptr(), tensor.numel())  # tied ones share both, and stay one tensor
        if key not in rounded:
            is_weight = name in parameters and tensor.is_floating_point()
            rounded[key] = tensor.detach().to(dtype if is_weight else tensor.dtype).contiguous()
        weights[name] = rounded[key]
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
    model: PeftModel, state: Mapping[str, torch.Tensor], base_path: str, revision: str | None, folder: Path
) -> None:
    # Not "auto": that would ask the hub whether the embedding has grown.
    model.save_pretrained(str(folder), state_dict=dict(state), save_embedding_layers=False)
    saved = get_peft_model_state_dict(model, state_dict=dict(state), save_embedding_layers=False)
    saved = {name: tensor.contiguous() for name, tensor in saved.items()}
    indices, names = token_rows(model, state)
    if indices:
        saved |= {theirs: state[ours].contiguous() for ours, theirs in names.items()}
        save_file(saved, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        _change(folder / "adapter_config.json", trainable_token_indices=indices)
    renamed = prove_weights(folder, saved)
    if renamed or not saved:
        what = f"reading back the adapter: {sorted(renamed)[:3] or 'there is nothing in it'}"
        raise MachineError(Problem(str(folder), what, "Nothing was put in place; the checkpoints hold it."))
    _change(folder / "adapter_config.json", base_model_name_or_path=base_path, revision=revision)


def _base_path(config: Config, tokenizer: PreTrainedTokenizerBase, template: str | None, beside: Path) -> str:
    """Where the adapter's base can be loaded from. Fresh weights exist nowhere but in this run; they
    are a function of the seed, so they are made again and saved beside the adapter, once."""
    path = Path(config.model.path)
    if config.model.init == "pretrained":
        return str(path.resolve()) if path.is_dir() else config.model.path
    dtype = COMPUTE_DTYPES[config.model.dtype]
    base = load_model(
        config.model,
        seed=config.train.seed,
        init_context=None,
        param_dtype=dtype,
        vocabulary=vocabulary_of(tokenizer, config.model),
    )
    # An earlier run may have left another base there, from another seed, which its adapters still need.
    numbered = (beside.with_name(f"{beside.name}-{number}") for number in itertools.count(2))
    places = itertools.chain([beside], numbered)
    folder = next(place for place in places if not place.exists() or _holds(place, base.state_dict()))
    if not folder.exists():
        with whole_folder(folder) as staging:
            save_model(base, base.state_dict(), dtype, staging)
            save_generation_config(None, tokenizer, template, staging)
            save_tokenizer(tokenizer, template, staging)
    return str(folder.resolve())


def _holds(folder: Path, weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether a folder's weights are these (where its names are others, whether they are as many)."""
    try:
        prove_weights(folder, weights)
    except (MachineError, SafetensorError):
        return False
    return True


def _change(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
