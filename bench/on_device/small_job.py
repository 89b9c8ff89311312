"""A small model and one step of it, put together as a run does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from burnish.config.schema import Config
from burnish.data.store import ExampleStore
from burnish.data.windows import plan_windows
from burnish.engine.build import build_engine
from burnish.model.attention import can_isolate
from burnish.model.forward import SupervisedModel
from burnish.plan.shapes import ModelShape
from burnish.records import Example
from burnish.runtime import Ranks
from burnish.train.step import Feed, train_step

ALONE = Ranks(0, 0, 1)


def small_step(device: torch.device) -> Callable[[], Any]:
    """A function that takes one optimizer step of several micro-batches in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = Config.model_validate(
        {
            "model": {"path": "small", "dtype": "bf16"},
            "data": {"train": "made-here", "max_tokens": 512},
            "batch": {"global_examples": 16, "micro_tokens": 1024},
            "engine": {"kind": "local"},
            "output_dir": "nowhere",
        }
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    shape = ModelShape.from_config_json(model.config.to_dict())
    capability = can_isolate(model, max_tokens=512)
    engine = build_engine(config, ALONE, device, SupervisedModel(model, capability))
    store = ExampleStore.from_examples(_examples(64))
    windows = plan_windows(
        store, config.data, config.batch, config.train, 1, capability.packed, shape.cost_model(), 1
    )
    feed = Feed(store, capability.packed, 0)
    return lambda: train_step(engine, windows.window(1), feed, ALONE, 1e-4)


def _examples(num: int) -> list[Example]:
    chance = np.random.default_rng(0)
    examples = []
    for row in range(num):
        ids = chance.integers(0, 4096, int(chance.integers(40, 500))).astype(np.int32)
        weights = np.ones(len(ids), np.float32)
        weights[: len(ids) // 3] = 0
        examples.append(Example("made", f"{row}", ids, weights))
    return examples
