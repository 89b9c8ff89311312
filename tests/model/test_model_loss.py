"""The loss and every gradient of a micro-batch equal each document's alone, in plain transformers."""

import pytest
import torch
from tiny_models import FAMILIES, build, gradients, make_documents, reference_loss

from breadth.batches import collate
from burnish.config.schema import AdapterConfig
from burnish.model.adapt import adapt
from burnish.model.anatomy import causal_model
from burnish.model.attention import can_isolate
from burnish.model.device_batch import to_device
from burnish.model.forward import SupervisedModel

CPU = torch.device("cpu")
PADDED = {"mamba"}


def assert_equal_gradients(ours: dict, theirs: dict, tolerance: float) -> None:
    assert ours.keys() == theirs.keys() and ours
    largest = max(float(g.abs().max()) for g in theirs.values())
    assert largest > 0
    for name, gradient in theirs.items():
        gap = float((ours[name].float() - gradient.float()).abs().max())
        # Some gradients vanish in exact arithmetic (a bias of keys): compare those with the largest.
        scale = max(float(gradient.abs().max()), 1e-2 * largest)
        assert gap <= tolerance * scale, f"{name}: {gap / scale}"


def reference(model, documents):
    causal_model(model).set_attn_implementation("eager")
    loss = reference_loss(model, documents)
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_loss_and_gradients_equal_each_document_alone(family, checkpointing, packed):
    model = build(family)
    documents = make_documents()
    expected, expected_gradients = reference(model, documents)
    capability = can_isolate(model)
    assert capability.packed == (family not in PADDED), capability.reason
    assert capability.fused_head
    if packed and not capability.packed:
        pytest.skip(capability.reason)
    adapt(model, None, checkpointing)
    supervised = SupervisedModel(model, capability).train()
    loss = supervised(to_device(collate(documents, packed), CPU))
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert_equal_gradients(gradients(model), expected_gradients, 1e-5)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "pissa"])
def test_adapters(kind, checkpointing):
    torch.manual_seed(0)
    model = adapt(build("qwen3"), AdapterConfig(kind=kind, rank=4, alpha=8), checkpointing)
    with torch.no_grad():  # B starts at 0, and then A has no gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name and kind != "pissa":
                parameter.normal_(std=0.1)
    documents = make_documents()
    expected, expected_gradients = reference(model, documents)
    capability = can_isolate(model)
    assert capability.packed and capability.fused_head
    supervised = SupervisedModel(model, capability).train()
    loss = supervised(to_device(collate(documents, True), CPU))
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    found = gradients(model)
    assert all("lora_" in name for name in found)
    assert_equal_gradients(found, expected_gradients, 1e-5)


def test_bf16_autocast_stays_near_fp32():
    model = build("llama", initializer_range=0.1)
    documents = make_documents()
    expected, expected_gradients = reference(model, documents)
    supervised = SupervisedModel(model, can_isolate(model)).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = supervised(to_device(collate(documents, True), CPU))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=2e-2)
    assert_equal_gradients(gradients(model), expected_gradients, 2e-2)


def test_contamination_is_seen_by_these_tests():
    """Guards against passing in vain: without boundaries, the same comparison fails."""
    model = build("llama")
    documents = make_documents()
    expected, _ = reference(model, documents)
    supervised = SupervisedModel(model, can_isolate(model))
    model.set_attn_implementation("sdpa")
    batch = to_device(collate(documents, True), CPU)
    leaking = batch.__class__(
        **{**vars(batch), "attention_mask": torch.ones(1, batch.token_ids.shape[1]).long()}
    )
    assert float(supervised(leaking)) != pytest.approx(expected, rel=1e-4)
