"""What the plan says of optimizers, against what they keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from burnish.config.schema import AdapterConfig, Config
from burnish.engine.optimizer import build_optimizer
from burnish.model.adapt import adapt
from burnish.plan import ModelShape, estimate_memory, trainable_params
from burnish.plan.optimizer_state import optimizer_bytes

WIDTHS = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 256, "vocab_size": 500, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ADAPTER = {"rank": 64, "alpha": 8}


def config(**sections: Any) -> Config:
    base = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}, "output_dir": "out"}
    return Config.model_validate(base | sections)


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "muon", "adafactor"])
def test_state_is_as_large_as_planned(name: str, family: str, adapter: Any) -> None:
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    theirs = AutoConfig.for_model(family, **WIDTHS)
    model = AutoModelForCausalLM.from_config(theirs, dtype=torch.float32)
    adapt(model, None if adapter is None else AdapterConfig(**adapter), "none")
    settings = config(optim={"name": name}, adapter=adapter)
    optimizer = build_optimizer(model, settings.optim)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    kept = sum(
        value.numel() * value.element_size()
        for entries in optimizer.state.values()
        for key, value in entries.items()
        if isinstance(value, torch.Tensor) and key not in ("step", "qmap1", "qmap2")
    )
    planned = optimizer_bytes(settings, ModelShape.from_config_json(theirs.to_dict()))
    if name == "adafactor" and adapter is not None:
        assert planned <= kept < 2 * planned  # an adapter's widths are summed up
    else:
        # bitsandbytes keeps 32 bits for small weights: norms and biases here
        assert planned == pytest.approx(kept, rel=0.05 if name == "adamw_8bit" else 1e-9)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("freeze", [["embed_tokens"], ["layers.0"], ["self_attn", "lm_head"], ["*.mlp.*"]])
def test_frozen_parts_are_neither_trained_nor_kept(freeze: list[str], tied: bool) -> None:
    theirs = AutoConfig.for_model("llama", **WIDTHS, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(theirs, dtype=torch.float32)
    adapt(model, None, "none", freeze=freeze)
    shape = ModelShape.from_config_json(theirs.to_dict())
    frozen = config(model={"path": "m", "freeze": freeze}, engine={"kind": "local"})
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable_params(frozen, shape) == trained < shape.num_params
    parts = estimate_memory(frozen, shape, 1, 1024).device
    whole = estimate_memory(config(engine={"kind": "local"}), shape, 1, 1024).device
    assert parts.weights == whole.weights and parts.optimizer == 8 * trained
