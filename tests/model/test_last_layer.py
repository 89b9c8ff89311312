"""The last layer at supervised rows only: the same loss and gradients, and only where it is proved."""

from __future__ import annotations

import dataclasses
import inspect
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, build, gradients, make_documents
from torch import nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from breadth.batches import collate
from burnish.config.schema import AdapterConfig
from burnish.model.adapt import adapt
from burnish.model.anatomy import body_of, causal_model
from burnish.model.attention import can_isolate
from burnish.model.device_batch import to_device
from burnish.model.forward import SupervisedModel
from burnish.model.last_layer import MOST_SUPERVISED, last_layer, supervised_rows, verify_last_layer
from burnish.model.objective import Objective
from burnish.model.recompute import Level

CPU = torch.device("cpu")
PLAIN = ("llama", "llama_bias", "qwen2", "qwen3", "mistral")
LEVELS: tuple[Level, ...] = ("none", "light", "full", "offload")
LORA = AdapterConfig(rank=4, alpha=8)


def layer_of(model: nn.Module) -> Any:
    body = body_of(causal_model(model))
    assert body is not None
    return last_layer(body)


def pair(
    family: str, adapter: AdapterConfig | None = None, level: Level = "none", tile_tokens: int | None = None
) -> tuple[SupervisedModel, SupervisedModel]:
    """A model whose last layer is trimmed, and the same with it whole."""
    models = []
    for whole in (None, "for comparison"):
        model: Any = build(family)
        capability = can_isolate(model)
        assert capability.whole_last_layer is None, capability.whole_last_layer
        adapted = adapt(model, adapter, level, mlp_tile_tokens=tile_tokens)
        with torch.no_grad():  # an adapter begins as nothing
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        capability = dataclasses.replace(capability, whole_last_layer=whole)
        models.append(SupervisedModel(adapted, capability).train())
    return models[0], models[1]


def rows_of_mlp(model: nn.Module) -> list[int]:
    """Fills with the rows that the last layer's MLP is given."""
    seen: list[int] = []
    layer_of(model).mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:-1].numel()))
    return seen


def trained(supervised: SupervisedModel, *batches: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Every batch forwarded before the first backward."""
    losses = [supervised(batch) for batch in batches]
    for loss in losses:
        loss.backward()
    return [loss.item() for loss in losses], gradients(supervised)


def assert_same(found: Any, expected: Any) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys() and found[1]
    largest = max(float(g.abs().max()) for g in expected[1].values())
    assert largest > 0
    for name, gradient in expected[1].items():
        gap = float((found[1][name] - gradient).abs().max())
        scale = max(float(gradient.abs().max()), 1e-2 * largest)
        assert gap <= 1e-6 * scale, f"{name}: {gap / scale}"


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", PLAIN)
def test_same_loss_and_gradients_from_fewer_rows(
    family: str, adapter: AdapterConfig | None, packed: bool
) -> None:
    ours, whole = pair(family, adapter, "none")
    batch = to_device(collate(make_documents(), packed), CPU)
    rows, all_rows = rows_of_mlp(ours.model), rows_of_mlp(whole.model)
    assert_same(trained(ours, batch), trained(whole, batch))
    assert rows == [len(batch.targets)] and all_rows == [batch.token_ids.numel()] > rows


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("level", LEVELS)
def test_each_of_two_forwards_is_computed_again_at_its_own_rows(
    level: Level, adapter: AdapterConfig | None
) -> None:
    ours, whole = pair("llama", adapter, level)
    seeds = ((0, (9, 17, 1, 12, 5)), (1, (4, 11, 6)))
    batches = [to_device(collate(make_documents(s, lengths), True), CPU) for s, lengths in seeds]
    rows = rows_of_mlp(ours.model)
    assert_same(trained(ours, *batches), trained(whole, *batches))
    counts = [len(batch.targets) for batch in batches]
    assert counts[0] != counts[1]
    assert rows == counts * (1 if level == "none" else 2)


@pytest.mark.parametrize("level", ["light", "full", "offload"])
def test_a_transformers_that_computes_the_whole_call_again(
    level: Level, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As 5.17 does; later ones put the checkpoint into the forward, which ours stands for."""

    def call(layer: Any, *args: Any, **arguments: Any) -> Any:
        compute = partial(nn.Module.__call__, layer, **arguments)
        again = layer.gradient_checkpointing and layer.training
        return layer._gradient_checkpointing_func(compute, *args) if again else compute(*args)

    ours, whole = pair("llama", LORA, level)
    kind = type(layer_of(ours.model))
    monkeypatch.setattr(kind, "forward", inspect.unwrap(kind.forward))
    monkeypatch.setattr(kind, "__call__", call)
    batch = to_device(collate(make_documents(), True), CPU)
    rows = rows_of_mlp(ours.model)
    with set_checkpoint_early_stop(False):  # which may end before it meets what differs
        assert_same(trained(ours, batch), trained(whole, batch))
    assert rows == [len(batch.targets)] * 2
    assert layer_of(ours.model).gradient_checkpointing


def test_tiled_mlp() -> None:
    ours, whole = pair("llama", tile_tokens=8)
    batch = to_device(collate(make_documents(), True), CPU)
    rows = rows_of_mlp(ours.model)
    assert_same(trained(ours, batch), trained(whole, batch))
    assert rows == [len(batch.targets)]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_evaluation(packed: bool) -> None:
    ours, whole = pair("qwen2")
    batch = to_device(collate(make_documents(), packed), CPU)
    rows = rows_of_mlp(ours.model)
    torch.testing.assert_close(ours(batch, True), whole(batch, True), rtol=1e-6, atol=0)
    assert rows == [len(batch.targets)]


def test_no_rows_and_nearly_all_rows_are_not_trimmed() -> None:
    ours, whole = pair("llama")
    tokens = np.arange(20) + 3
    none, most = np.zeros(20, np.float32), np.ones(20, np.float32)
    assert MOST_SUPERVISED < 19 / 20
    rows = rows_of_mlp(ours.model)
    for weights in (none, most):
        batch = to_device(collate([(tokens, weights)], True), CPU)
        found, expected = trained(ours, batch), trained(whole, batch)
        assert found[0] == expected[0]
        assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items())
    assert rows == [20, 20]


def test_modules_are_called_and_the_layer_is_left_as_it_was() -> None:
    """Engines hang their gathering of weights on the calls of modules."""
    ours, _ = pair("llama")
    layer = layer_of(ours.model)
    called: list[nn.Module] = []
    for module in layer.modules():
        module.register_forward_hook(lambda module, *_: called.append(module))
    ours(to_device(collate(make_documents(), True), CPU))
    assert sorted(map(id, called)) == sorted(map(id, layer.modules()))
    assert "forward" not in layer.__dict__
    with pytest.raises(RuntimeError), supervised_rows(layer, torch.zeros(1, dtype=torch.int64)):
        raise RuntimeError
    assert "forward" not in layer.__dict__


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(PLAIN)))
def test_other_structures_are_right_or_left_alone(family: str) -> None:
    """Whatever the trial says of a mixture, the loss is that of the whole layer."""
    model = build(family)
    capability = can_isolate(model)
    if family in ("gemma2", "cohere", "granite", "gpt2", "gpt_neox", "mamba"):
        assert capability.whole_last_layer is not None
    batch = to_device(collate(make_documents(), capability.packed), CPU)
    found = trained(SupervisedModel(model, capability).train(), batch)
    capability = dataclasses.replace(capability, whole_last_layer="for comparison")
    assert_same(found, trained(SupervisedModel(model, capability).train(), batch))


def test_balancing_sees_every_token() -> None:
    model = build("mixtral")
    capability = can_isolate(model)
    batch = to_device(collate(make_documents(), True), CPU)
    objective = Objective(router_aux_loss=0.5)
    found = trained(SupervisedModel(model, capability, objective).train(), batch)
    capability = dataclasses.replace(capability, whole_last_layer="for comparison")
    assert_same(found, trained(SupervisedModel(model, capability, objective).train(), batch))


class Doubling(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.inner = mlp

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden) + hidden.roll(1, dims=1)  # looks at the token before


def tried(model: Any) -> str | None:
    with torch.no_grad():
        return verify_last_layer(model.eval())


def test_the_trial_finds_what_only_looks_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names are right, and yet: another residual, dropout behind attention, an MLP that mixes tokens."""
    assert tried(build("llama")) is None
    mixing = build("llama")
    layer_of(mixing).mlp = Doubling(layer_of(mixing).mlp)
    assert "something else" in str(tried(mixing))

    layers = type(layer_of(build("llama")))
    own = layers.forward
    for other in (
        lambda self, hidden, **others: own(self, hidden, **others) + 0.01 * hidden,
        lambda self, hidden, **others: nn.functional.dropout(own(self, hidden, **others), 0.1, self.training),
        lambda self, hidden, **others: (own(self, hidden, **others),)[0] + self.mlp(hidden),
    ):
        monkeypatch.setattr(layers, "forward", other)
        assert "something else" in str(tried(build("llama")))
    monkeypatch.setattr(layers, "forward", own)
    owning = build("llama")
    layer_of(owning).register_parameter("scale", nn.Parameter(torch.ones(1)))
    assert "not made of" in str(tried(owning))
    assert "fp32" in str(tried(build("llama").bfloat16()))
