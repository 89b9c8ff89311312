"""The wrapped model: evaluation per document, fallbacks, empty micro-batches, what engines do to it."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny_models import build, gradients, make_documents, reference_loss

from breadth.batches import collate
from burnish.config.schema import AdapterConfig
from burnish.errors import ConfigError
from burnish.model.adapt import adapt
from burnish.model.attention import can_isolate
from burnish.model.device_batch import to_device
from burnish.model.forward import SupervisedModel

CPU = torch.device("cpu")


def supervised(family="qwen2", **changes):
    model = build(family, **changes)
    return SupervisedModel(model, can_isolate(model)), model


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_evaluation_sums_each_document(packed, fused):
    wrapped, model = supervised()
    wrapped.capability = dataclasses.replace(wrapped.capability, fused_head=fused)
    documents = make_documents()
    sums = wrapped(to_device(collate(documents, packed), CPU), per_document=True)
    assert sums.shape == (len(documents),) and not sums.requires_grad
    for document, found in zip(documents, sums, strict=True):
        assert float(found) == pytest.approx(reference_loss(model, [document]).item(), rel=2e-6, abs=1e-6)


@pytest.mark.parametrize("packed", [True, False])
def test_the_models_own_head_gives_the_same(packed):
    wrapped, model = supervised()
    batch = to_device(collate(make_documents(), packed), CPU)
    fused = wrapped(batch)
    fused.backward()
    expected = gradients(model)
    wrapped.capability = dataclasses.replace(wrapped.capability, fused_head=False)
    loss = wrapped(batch)
    loss.backward()
    torch.testing.assert_close(loss, fused, rtol=1e-6, atol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_a_micro_batch_without_targets_gives_zero_gradients_not_none(fused):
    wrapped, model = supervised()
    wrapped.capability = dataclasses.replace(wrapped.capability, fused_head=fused)
    stand_in = [(np.array([1]), np.zeros(1, np.float32))]
    loss = wrapped(to_device(collate(stand_in, True), CPU))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_parameters_outside_their_module_are_told():
    wrapped, model = supervised()
    assert wrapped.external_parameters() == [model.lm_head.weight]
    unfused = dataclasses.replace(wrapped.capability, fused_head=False)
    assert SupervisedModel(model, unfused).external_parameters() == []


def test_turning_the_module_into_bf16_leaves_rotary_frequencies_alone():
    wrapped, model = supervised()
    before = model.model.rotary_emb.inv_freq.clone()
    wrapped.bfloat16()
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


def test_names_are_the_models_own_behind_one_prefix():
    wrapped, model = supervised()
    assert set(wrapped.state_dict()) == {f"model.{name}" for name in model.state_dict()}


def test_an_adapted_head_takes_the_models_own_way():
    model = adapt(build("llama"), AdapterConfig(rank=2, alpha=4, targets=("q_proj", "lm_head")), "none")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    wrapped = SupervisedModel(model, can_isolate(model))
    documents = make_documents()
    loss = wrapped(to_device(collate(documents, True), CPU))
    assert float(loss.detach()) == pytest.approx(reference_loss(model, documents).item(), rel=1e-6)


def test_adapters_follow_from_the_seed_and_are_fp32():
    config = AdapterConfig(rank=2, alpha=4)
    one = adapt(build("llama").bfloat16(), config, "none", seed=3)
    torch.rand(5)
    two = adapt(build("llama").bfloat16(), config, "none", seed=3)
    trained = [(n, p) for n, p in one.named_parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 and "lora_" in n for n, p in trained)
    assert not any("lm_head" in n for n, _ in trained)
    others = dict(two.named_parameters())
    assert all(torch.equal(p, others[n]) for n, p in trained)


def test_wrong_targets_are_named_with_a_guess():
    with pytest.raises(ConfigError) as caught:
        adapt(build("llama"), AdapterConfig(targets=("q_porj", "nothing_like_it", "v_proj")), "none")
    text = str(caught.value)
    assert "q_porj" in text and "Did you mean q_proj" in text
    assert "nothing_like_it" in text and "down_proj" in text
