"""The toy: a Llama of 2 layers, examples of unequal lengths and weights, and a config for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from burnish.config.schema import Config
from burnish.data.store import ExampleStore
from burnish.model.adapt import adapt
from burnish.model.attention import can_isolate
from burnish.model.compiled import compile_layers
from burnish.model.forward import SupervisedModel
from burnish.model.objective import Objective
from burnish.records import Example

VOCABULARY = 61


def toy_config(output_dir: Path | str, settings: Mapping[str, Any]) -> Config:
    """Defaults for tests, with dotted `settings` on top (`{"engine.zero_stage": 3}`)."""
    values: dict[str, Any] = {
        "model": {"path": "toy", "init": "random", "dtype": "fp32"},
        "data": {"train": "toy.jsonl", "max_tokens": 40},
        "batch": {"global_examples": 8, "micro_tokens": 64},
        "optim": {"lr": 1e-2, "weight_decay": 0.1},
        "schedule": {"warmup_ratio": 0.2},
        "train": {"max_steps": 6, "epochs": 9, "seed": 3},
        "checkpoint": {"resume": "never"},
        "output_dir": str(output_dir),
    }
    for key, value in settings.items():
        *sections, last = key.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return Config.model_validate(values)


def toy_store(num_examples: int = 27, seed: int = 0) -> ExampleStore:
    """Examples of 2 to 40 tokens from two sources, some weights fractional, some rows all masked
    but their last token. 27 do not divide by 8: windows at an epoch's end are smaller."""
    random = np.random.default_rng(seed)
    examples = []
    for i in range(num_examples):
        length = int(random.integers(2, 41))
        weights = random.choice(np.array([0.0, 0.5, 1.0], np.float32), length, p=[0.4, 0.1, 0.5])
        weights[-1] = 1.0
        tokens = random.integers(1, VOCABULARY, length).astype(np.int32)
        examples.append(
            Example("even" if i % 2 == 0 else "odd", f"toy:{i}", tokens, weights.astype(np.float32))
        )
    return ExampleStore.from_examples(examples)


def alike_store() -> ExampleStore:
    """24 examples: three prompts, eight answers to each."""
    random = np.random.default_rng(0)
    prompts = [random.integers(1, VOCABULARY, 32 + i) for i in range(3)]
    examples = []
    for i in range(24):
        answer = random.integers(1, VOCABULARY, int(random.integers(2, 7)))
        tokens = np.concatenate([prompts[i % 3], answer]).astype(np.int32)
        weights = np.zeros(len(tokens), np.float32)
        weights[20:24], weights[-len(answer) :] = 0.5, 1.0  # the prompt has targets too
        examples.append(Example("alike", f"toy:{i}", tokens, weights))
    return ExampleStore.from_examples(examples)


def toy_llama(seed: int = 1, tied: bool = False, mlp_width: int = 48) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=mlp_width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def toy_mixtral(seed: int = 1) -> MixtralForCausalLM:
    """A mixture, whose router can be balanced."""
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    return MixtralForCausalLM(config)


def toy_model(config: Config, dtype: torch.dtype, tied: bool = False, mlp_width: int = 48) -> SupervisedModel:
    """The supervised model as run.py makes it, without the folder."""
    capability_model: PreTrainedModel = toy_llama(tied=tied, mlp_width=mlp_width)
    if config.train.router_aux_loss:
        capability_model = toy_mixtral()
    capability = can_isolate(capability_model)
    torch.manual_seed(config.train.seed)
    adapted = adapt(
        capability_model.to(dtype),
        config.adapter,
        config.model.activation_checkpointing,
        freeze=config.model.freeze,
        mlp_tile_tokens=config.model.mlp_tile_tokens,
    )
    compile_layers(adapted, capability, torch.device("cpu"), config.model.compile is True)
    return SupervisedModel(adapted, capability, Objective.of(config.train))
