"""What is added to the plain loss: each term against its plain formula, and none where none is wanted."""

import math

import pytest
import torch
from tiny_models import build, gradients, make_documents
from torch.nn import functional

from breadth.batches import collate
from burnish.config.schema import AdapterConfig, TrainConfig
from burnish.errors import ConfigError
from burnish.model import head as head_module
from burnish.model.adapt import adapt
from burnish.model.attention import can_isolate
from burnish.model.device_batch import to_device
from burnish.model.extras import balancing_loss
from burnish.model.forward import SupervisedModel
from burnish.model.head import HeadShape, supervised_loss
from burnish.model.objective import Objective

CPU = torch.device("cpu")
SHAPES = [HeadShape(), HeadShape(scale=0.5, softcap=2.0)]
OBJECTIVES = [Objective(0.1), Objective(z_loss=0.3), Objective(0.2, 0.1)]


def formula(logits, targets, weights, objective) -> torch.Tensor:
    """torch's own cross-entropy and logsumexp."""
    loss = functional.cross_entropy(
        logits, targets, reduction="none", label_smoothing=objective.label_smoothing
    )
    return ((loss + objective.z_loss * torch.logsumexp(logits, -1) ** 2) * weights).sum()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [8, 1024])
def test_smoothing_and_z_loss_in_the_head(monkeypatch, rows, shape, objective):
    monkeypatch.setattr(head_module, "CHUNK_ROWS", rows)
    monkeypatch.setattr(head_module, "BLOCK_BYTES_CPU", 3 * 4 * 53)
    torch.manual_seed(0)
    hidden = torch.randn(37, 16, dtype=torch.float64).requires_grad_()
    weight, bias = torch.randn(53, 16).double().requires_grad_(), torch.randn(53).double().requires_grad_()
    targets, weights = torch.randint(53, (37,)), torch.rand(37)
    logits = (hidden @ weight.T + bias) * shape.scale
    if shape.softcap is not None:
        logits = shape.softcap * torch.tanh(logits / shape.softcap)
    leaves = [hidden, weight, bias]
    expected = torch.autograd.grad(formula(logits, targets, weights, objective) * 3.0, leaves)
    loss = supervised_loss(hidden, weight, bias, targets, weights, shape, objective)
    # The value stays the plain loss: it compares with evaluation.
    plain = formula(logits, targets, weights, Objective())
    torch.testing.assert_close(loss.double(), plain, rtol=1e-6, atol=0)
    for ours, theirs in zip(torch.autograd.grad(loss * 3.0, leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_head_that_is_not_one_matrix_gives_the_same():
    objective = Objective(0.1, 0.01)
    model = build("llama")
    capability = can_isolate(model)
    batch = to_device(collate(make_documents(), True), CPU)
    fused = SupervisedModel(model, capability, objective).train()
    loss = fused(batch)
    loss.backward()
    expected = gradients(model)
    model.lm_head = torch.nn.Sequential(model.lm_head)  # no nn.Linear any more
    capability = type(capability)(**(vars(capability) | {"fused_head": False}))
    plain = SupervisedModel(model, capability, objective).train()
    torch.testing.assert_close(plain(batch), loss)
    plain(batch).backward()
    ours = {name.replace("lm_head.0", "lm_head"): g for name, g in gradients(model).items()}
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ noise


def noise_of(supervised, documents, packed) -> torch.Tensor:
    """What is added to the embeddings of a micro-batch."""
    batch = to_device(collate(documents, packed), CPU)
    seen = []
    body = supervised.model.model
    hook = body.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args or (kwargs["hidden_states"],))[0].detach()),
        with_kwargs=True,
    )
    supervised(batch)
    hook.remove()
    return seen[0] - body.embed_tokens(batch.token_ids)


@pytest.mark.parametrize("packed", [True, False])
def test_noise_is_scaled_by_each_document(packed):
    """A batch of documents of 9, 17 and 4 tokens: noise reaches alpha / sqrt(length * width) in each, and
    neither the packed row's length nor padding matters."""
    supervised = SupervisedModel(model := build("llama"), can_isolate(model), Objective(neftune_alpha=5.0))
    documents = make_documents(lengths=(9, 17, 4))
    noise = noise_of(supervised.train(), documents, packed)
    starts = [0, 9, 26] if packed else [0, 0, 0]
    for row, (length, start) in enumerate(zip((9, 17, 4), starts, strict=True)):
        part = noise[0 if packed else row, start : start + length].detach()
        bound = 5.0 / math.sqrt(length * 32)
        assert 0.95 * bound < float(part.abs().max()) <= bound * (1 + 1e-6)
        assert abs(float(part.mean())) < 0.15 * bound


def test_no_noise_in_evaluation_or_unasked():
    model = build("llama")
    batch = to_device(collate(make_documents(), True), CPU)
    plain = SupervisedModel(model, can_isolate(model))
    noisy = SupervisedModel(model, can_isolate(model), Objective(neftune_alpha=5.0))
    assert torch.equal(plain.eval()(batch, per_document=True), noisy.eval()(batch, per_document=True))
    assert not torch.equal(plain.train()(batch), noisy.train()(batch))
    assert not torch.equal(noisy(batch), noisy(batch))
    torch.manual_seed(1)
    first = noisy(batch)
    torch.manual_seed(1)
    assert torch.equal(first, noisy(batch))  # drawn from torch's generator: resumes with it


# ------------------------------------------------------------------ experts


def reference_balance(model, documents) -> torch.Tensor:
    """transformers' own balancing loss of each document alone, weighted by its targets."""
    total = torch.zeros(())
    for tokens, weights in documents:
        outputs = model(torch.from_numpy(tokens)[None], output_router_logits=True, use_cache=False)
        total = total + outputs.aux_loss * float(weights[1:].sum())
    return total


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("factor", [0.5, "auto"])
def test_balance_equals_each_document_alone_in_transformers(factor, packed):
    model = build("mixtral")
    documents = make_documents()
    capability = can_isolate(model)
    batch = to_device(collate(documents, packed), CPU)
    plain = SupervisedModel(model, capability).train()
    value = plain(batch)
    value.backward()
    expected = gradients(model)
    (reference_balance(model, documents) * (0.02 if factor == "auto" else factor)).backward()
    for name, gradient in gradients(model).items():
        expected[name] = expected[name] + gradient
    balanced = SupervisedModel(model, capability, Objective(router_aux_loss=factor)).train()
    loss = balanced(batch)
    loss.backward()
    assert torch.equal(loss, value)
    ours = gradients(model)
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5 * largest)
    assert torch.equal(plain.eval()(batch, per_document=True), balanced.eval()(batch, per_document=True))


def test_balance_does_not_depend_on_the_cut():
    """One micro-batch of five documents, or two: the same sum, so the factor counts once a step."""
    model = build("mixtral")
    supervised = SupervisedModel(model, can_isolate(model), Objective(router_aux_loss=1.0)).train()
    documents = make_documents()
    supervised(to_device(collate(documents, True), CPU)).backward()
    whole = gradients(model)
    for part in (documents[:2], documents[2:]):
        supervised(to_device(collate(part, True), CPU)).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-5)


def test_even_routing_has_the_least_balance():
    documents, counted, weights = torch.zeros(8, dtype=torch.int64), torch.ones(8), torch.ones(1)
    even = torch.eye(4).repeat(2, 1) * 50
    assert balancing_loss([even, even], documents, counted, weights, 1) == pytest.approx(1.0)
    one_sided = torch.tensor([[50.0, 0, 0, 0]]).expand(8, 4)
    assert balancing_loss([one_sided], documents, counted, weights, 1) == pytest.approx(4.0)


def test_balance_with_an_adapter_and_recomputed_layers():
    model = adapt(build("mixtral"), AdapterConfig(rank=2, alpha=4), "full")
    objective = Objective(router_aux_loss=1.0)
    supervised = SupervisedModel(model, can_isolate(model), objective).train()
    batch = to_device(collate(make_documents(), True), CPU)
    supervised(batch).backward()
    balanced = gradients(model)
    plain = SupervisedModel(model, can_isolate(model)).train()
    plain(batch).backward()
    differ = [n for n, g in gradients(model).items() if not torch.allclose(g, balanced[n], atol=1e-6)]
    assert differ


def test_a_model_without_experts_cannot_balance_them():
    model = build("llama")
    with pytest.raises(ConfigError, match="no balancing loss"):
        SupervisedModel(model, can_isolate(model), Objective(router_aux_loss="auto"))


def test_by_default_nothing_is_added():
    assert Objective.of(TrainConfig()) == Objective()


# ------------------------------------------------------------------ freezing


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_frozen_parts_are_not_trained_and_the_rest_has_the_same_gradients():
    model, documents = build("llama"), make_documents()
    batch = to_device(collate(documents, True), CPU)
    capability = can_isolate(model)
    SupervisedModel(model, capability).train()(batch).backward()
    everything = gradients(model)
    adapt(model, None, "none", freeze=["embed_tokens", "layers.0", "lm_head"])
    assert not any("layers.0." in n or "embed" in n or "lm_head" in n for n in trained(model))
    SupervisedModel(model, capability).train()(batch).backward()
    rest = gradients(model)
    assert rest.keys() == trained(model) and rest.keys() < everything.keys()
    for name, gradient in rest.items():
        torch.testing.assert_close(gradient, everything[name], rtol=1e-4, atol=1e-5)


def test_freezing_in_an_adapter():
    model = adapt(build("llama"), AdapterConfig(rank=2, alpha=4), "none", freeze=["lora_A", "layers.0"])
    assert trained(model) and all("lora_B" in n and "layers.1." in n for n in trained(model))


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (["embed_token"], "Did you mean embed_tokens"),
        (["qqq"], "A name there is"),
        (["*"], "nothing to train"),
    ],
)
def test_freezing_what_is_not_there(freeze, message):
    with pytest.raises(ConfigError, match=message):
        adapt(build("llama"), None, "none", freeze=freeze)
