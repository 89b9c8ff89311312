"""What a layer keeps for its backward, weighed in a real forward, is what the plan derives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from burnish.config.schema import AdapterConfig
from burnish.data.collate import collate
from burnish.model.adapt import adapt
from burnish.model.attention import can_isolate
from burnish.model.device_batch import to_device
from burnish.model.forward import SupervisedModel
from burnish.model.native import attend
from burnish.model.native.build import why_not
from burnish.plan.activations import Forward, layer_bytes_per_token
from burnish.plan.shapes import ModelShape
from burnish.records import Example

TOKENS = 256
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
LORA = AdapterConfig(rank=8, alpha=8)


def kept_bytes(num_layers: int, adapter: AdapterConfig | None) -> int:
    """Of everything that the forward of a micro-batch keeps but weights and their casts."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=num_layers))
    model = adapt(model.to(torch.float32 if adapter is None else torch.bfloat16), adapter, "none")
    supervised = SupervisedModel(model, can_isolate(model)).train()
    weights = {p.untyped_storage().data_ptr() for p in supervised.parameters()}
    ids = np.arange(TOKENS // 2, dtype=np.int32) % 64
    examples = [Example("rows", f"{i}", ids, np.ones(TOKENS // 2, np.float32)) for i in range(2)]
    found: dict[int, int] = {}
    alive = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no other tensor gets its address
        return tensor

    batch = to_device(collate(examples, np.arange(2), True, 0), torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        supervised(batch)
    layers = [p for n, p in model.named_parameters() if ".layers." in n and p.requires_grad and p.dim() == 2]
    return sum(found.values()) - 2 * sum(p.numel() for p in layers)


@pytest.mark.parametrize(
    "adapter", [None, LORA, LORA.model_copy(update={"dropout": 0.1})], ids=["weights", "lora", "dropout"]
)
@pytest.mark.parametrize("native", [False, True], ids=["aten", "native"])
def test_a_layer_keeps_what_is_planned(
    adapter: AdapterConfig | None, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 2 % by aten's attention. Ours keeps bf16 where that keeps fp32, up to an eighth less; the plan,
    which may be for another machine, does not count on it."""
    if native and attend.kernels() is None:
        pytest.skip(f"no kernels: {why_not()}")
    if not native:
        monkeypatch.setattr(attend, "kernels", lambda: None)
    shape = ModelShape.from_config_json({"model_type": "llama", "num_hidden_layers": 2, **SIZES})
    forward = Forward(2, 4 if adapter is None else 2, autocast=True, adapter=adapter, on_cpu=True)
    measured = (kept_bytes(4, adapter) - kept_bytes(2, adapter)) / 2 / TOKENS
    planned = sum(layer_bytes_per_token(forward, shape))
    if native:
        assert 0.85 * planned < measured < planned
    else:
        assert planned == pytest.approx(measured, rel=0.02)
