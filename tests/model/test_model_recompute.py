"""Recomputation: the same gradients whatever is kept, and only what it says is computed again."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, build, gradients, make_documents
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from breadth.batches import collate
from burnish.config.schema import AdapterConfig
from burnish.errors import ConfigError
from burnish.model import recompute
from burnish.model.adapt import adapt
from burnish.model.attention import can_isolate
from burnish.model.device_batch import to_device
from burnish.model.forward import SupervisedModel
from burnish.model.native.build import why_not
from burnish.model.recompute import Level

CPU = torch.device("cpu")
LEVELS: tuple[Level, ...] = ("light", "full", "offload")
WRITE_OVER = ("gpt_oss",)
"""Families whose experts add to a product in place."""
LORA = AdapterConfig(rank=4, alpha=8, dropout=0.3)


class CountedOperations(TorchDispatchMode):
    """Counts what is computed while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def trained(
    family: str, level: Level, adapter: AdapterConfig | None, bf16: bool = False, **changes: Any
) -> dict[str, Any]:
    """Loss and gradients of one micro-batch."""
    model = build(family, **changes)
    capability = can_isolate(model)
    supervised = SupervisedModel(adapt(model, adapter, level), capability).train()
    with torch.no_grad():  # an adapter begins as nothing: then its way down has no gradient
        for name, parameter in supervised.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    batch = to_device(collate(make_documents(), capability.packed), CPU)
    torch.manual_seed(7)  # of dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = supervised(batch)
    with CountedOperations() as operations:
        loss.backward()
    return {"loss": loss.item(), "gradients": gradients(supervised), "counts": operations.counts}


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["loss"] == expected["loss"]
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_gradients(family: str, adapter: AdapterConfig | None) -> None:
    if adapter is not None and family == "gpt_oss":
        adapter = adapter.model_copy(update={"targets": ("q_proj", "o_proj")})
    if adapter is not None and family == "mixtral":  # its experts are adapted as weights
        adapter = adapter.model_copy(update={"dropout": 0.0})
    expected = trained(family, "none", adapter)
    for level in LEVELS:
        if level != "light" or family not in WRITE_OVER:
            same(trained(family, level, adapter), expected)


@pytest.mark.parametrize("family", WRITE_OVER)
def test_light_is_refused_where_layers_write_over_what_it_keeps(family: str) -> None:
    with pytest.raises(ConfigError, match="write over"):
        adapt(build(family), None, "light")


def test_same_gradients_in_bf16() -> None:
    for level in LEVELS:
        same(trained("llama", level, None, bf16=True), trained("llama", "none", None, bf16=True))


@pytest.mark.parametrize("native", [False, True], ids=["aten", "native"])
def test_light_keeps_products_and_attention_and_nothing_cheap(native: bool) -> None:
    if native and why_not() is not None:
        pytest.skip(f"no kernels: {why_not()}")
    results = [
        trained("llama", level, None, bf16=native, head_dim=16 if native else 8)
        for level in ("none", "light", "full")
    ]
    none, light, full = (found["counts"] for found in results)
    attention = "burnish::attention" if native else "aten::_scaled_dot_product_flash_attention_for_cpu"
    if native:
        same(results[1], results[0])
        same(results[2], results[0])
    assert light["aten::mm"] == none["aten::mm"] < full["aten::mm"]
    assert light[attention] == none[attention] == 0 < full[attention]
    for cheap in ("aten::rsqrt", "aten::silu"):
        assert light[cheap] == full[cheap] > none[cheap]


def test_light_computes_an_adapters_way_up_again() -> None:
    """Keeping it would take as much as keeping the products that it is added to."""
    none, light, full = (trained("llama", level, LORA)["counts"] for level in ("none", "light", "full"))
    assert none["aten::mm"] < light["aten::mm"] < full["aten::mm"]


def test_offload_moves_inputs_of_layers_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[int, ...]] = []

    def noted(pin_memory: bool) -> saved_tensors_hooks:
        assert pin_memory == torch.cuda.is_available()
        return saved_tensors_hooks(lambda x: moved.append(tuple(x.shape)) or x, lambda x: x)

    monkeypatch.setattr(recompute, "save_on_cpu", noted)
    trained("llama", "offload", None)
    assert moved == [(1, 44, 32)] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: on a CPU nothing has to move")
def test_offloaded_inputs_leave_the_gpu() -> None:
    held = {}
    for level in ("full", "offload"):
        model = build("llama", num_hidden_layers=6, hidden_size=256, num_attention_heads=4, head_dim=64)
        adapt(model, None, level).to("cuda").train()
        tokens = torch.arange(4096, device="cuda")[None] % 97
        before = torch.cuda.memory_allocated()
        loss = model.model(input_ids=tokens, use_cache=False)[0].sum()
        torch.cuda.synchronize()
        held[level] = torch.cuda.memory_allocated() - before
        loss.backward()
    one_input = 4096 * 256 * 4
    assert held["full"] - held["offload"] > 4 * one_input


def test_a_model_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match="cannot compute its layers again"):
        adapt(model, None, "light")
