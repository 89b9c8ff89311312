"""New tokens: rows of their own, begun as the mean, trained alone beside an adapter, saved and loaded."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import build, gradients, make_documents
from transformers import AutoModelForCausalLM

from breadth.batches import collate
from burnish.config.schema import AdapterConfig, ModelConfig
from burnish.errors import ConfigError
from burnish.model.adapt import adapt
from burnish.model.attention import can_isolate
from burnish.model.device_batch import to_device
from burnish.model.forward import SupervisedModel
from burnish.model.load import load_model
from burnish.model.vocabulary import token_rows, train_tokens
from burnish.records import Vocabulary

ROWS = 97
LORA = AdapterConfig(kind="lora", rank=2, alpha=4)
CPU = torch.device("cpu")


def load(folder, vocabulary, **keys):
    return load_model(
        ModelConfig(path=str(folder), **keys),
        seed=1,
        init_context=None,
        param_dtype=torch.float32,
        vocabulary=vocabulary,
    )


def saved(folder, family, **changes):
    build(family, **changes).save_pretrained(folder)
    return folder


def documents_with(*new):
    """Documents that hold new tokens, as context and as targets."""
    documents = make_documents()
    for tokens, _ in documents:
        tokens[1::3] = np.resize(new, len(tokens[1::3]))
    return documents


def test_arithmetic():
    beyond = Vocabulary(named=frozenset({97, 99}), new=frozenset({97}))
    assert beyond.num_rows(97) == 100 and beyond.fresh(97) == (97, 99)
    assert Vocabulary().num_rows(97) == 97 and Vocabulary().fresh(97) == ()
    assert Vocabulary(multiple=64).num_rows(97) == 128
    assert Vocabulary(multiple=64).num_rows(128) == 128
    spare = Vocabulary(named=frozenset({5, 90}), new=frozenset({90}))
    assert spare.num_rows(97) == 97 and spare.fresh(97) == (90,)


@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("qwen2", {}), ("phi", {}), ("gpt_neox", {}), ("gemma2", {})]
)
def test_old_rows_stay_and_new_ones_are_their_mean(tmp_path, family, changes):
    if family == "phi":  # whose head has a bias
        from transformers import PhiConfig, PhiForCausalLM

        torch.manual_seed(0)
        model = PhiForCausalLM(
            PhiConfig(vocab_size=ROWS, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                      num_attention_heads=4, bos_token_id=1, eos_token_id=2)
        )  # fmt: skip
        torch.nn.init.normal_(model.lm_head.bias)
        model.save_pretrained(tmp_path)
    else:
        model = build(family, **changes)
        model.save_pretrained(tmp_path)
    grown = load(tmp_path, Vocabulary(named=frozenset({98}), new=frozenset({98}), multiple=4))
    assert grown.config.vocab_size == 100
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        before, after = getattr(model, layer)(), getattr(grown, layer)()
        assert after.weight.shape[0] == 100
        assert torch.equal(after.weight[:ROWS], before.weight)
        assert torch.allclose(after.weight[ROWS:], before.weight.mean(0).expand(3, -1), atol=1e-6)
        if getattr(before, "bias", None) is not None:
            assert torch.equal(after.bias[:ROWS], before.bias)
            assert torch.allclose(after.bias[ROWS:], before.bias.mean().expand(3), atol=1e-6)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (grown.get_input_embeddings().weight is grown.get_output_embeddings().weight) is tied
    ids = torch.randint(ROWS, (1, 9))
    assert torch.allclose(grown(ids).logits[..., :ROWS], model(ids).logits, atol=1e-5)
    grown.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(ids).logits, grown(ids).logits) and again.config.vocab_size == 100


def test_a_spare_row_begins_as_the_mean_too(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path)
    grown = load(tmp_path, Vocabulary(named=frozenset({90}), new=frozenset({90})))
    others = [i for i in range(ROWS) if i != 90]
    weight = model.get_input_embeddings().weight
    assert grown.config.vocab_size == ROWS
    assert torch.allclose(grown.get_input_embeddings().weight[90], weight[others].mean(0), atol=1e-6)
    assert torch.equal(grown.get_input_embeddings().weight[others], weight[others])


def test_a_fresh_model_is_built_with_its_rows(tmp_path):
    saved(tmp_path, "llama")
    model = load(tmp_path, Vocabulary(named=frozenset({97}), new=frozenset({97})), init="random")
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == 98


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("packed", [True, False])
def test_beside_an_adapter_new_rows_get_the_gradient_of_the_whole_matrix(tmp_path, family, packed):
    """The same model with every row trained is the reference: loss, and the gradient of new rows."""
    saved(tmp_path, family)
    vocabulary = Vocabulary(named=frozenset({97, 98}), new=frozenset({97, 98}))
    documents = documents_with(97, 98)
    found = []
    for with_adapter in (False, True):
        model = load(tmp_path, vocabulary)
        if with_adapter:
            model = adapt(model, LORA, "none")
            train_tokens(model, (97, 98))
        model.eval()
        capability = can_isolate(model, packing="auto" if packed else "off")
        assert capability.packed is packed and capability.fused_head
        supervised = SupervisedModel(model, capability)
        loss = supervised(to_device(collate(documents, packed), CPU))
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    (loss, whole), (own_loss, own) = found
    assert torch.allclose(own_loss, loss, rtol=1e-6)
    rows = {n: g for n, g in own.items() if ".new.weight" in n}
    assert len(rows) == (2 if family == "llama" else 1)
    assert all("lora_" in name for name in own.keys() - rows.keys())
    for name, gradient in rows.items():
        theirs = whole[name.removeprefix("base_model.model.").replace(".new.", ".")]
        assert torch.allclose(gradient, theirs[97:99], atol=1e-5, rtol=1e-4), name


def test_without_a_fused_head_the_loss_is_the_same(tmp_path):
    saved(tmp_path, "llama")
    model = load(tmp_path, Vocabulary(named=frozenset({97}), new=frozenset({97})))
    model = adapt(model, LORA, "none")
    train_tokens(model, (97,))
    model.eval()
    batch = to_device(collate(documents_with(97), True), CPU)
    capability = can_isolate(model)
    plain = SupervisedModel(model, replace(capability, fused_head=False))(batch)
    assert torch.allclose(plain, SupervisedModel(model, capability)(batch), rtol=1e-6)


def test_a_head_with_a_bias_is_refused_beside_an_adapter(tmp_path):
    from transformers import PhiConfig, PhiForCausalLM

    PhiForCausalLM(
        PhiConfig(vocab_size=ROWS, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                  num_attention_heads=4)
    ).save_pretrained(tmp_path)  # fmt: skip
    model = adapt(load(tmp_path, Vocabulary(named=frozenset({97}))), LORA, "none")
    with pytest.raises(ConfigError, match="bias"):
        train_tokens(model, (97,))


@pytest.mark.parametrize(("target", "where"), [("embed_tokens", "targets"), ("lm_head", "linear head")])
def test_an_adapter_on_the_grown_layer_itself_is_refused(tmp_path, target, where):
    saved(tmp_path, "llama")
    lora = LORA.model_copy(update={"targets": ("q_proj", target)})
    model = adapt(load(tmp_path, Vocabulary(named=frozenset({97}))), lora, "none")
    with pytest.raises(ConfigError, match=where):
        train_tokens(model, (97,))


def test_nothing_changes_without_new_tokens(tmp_path):
    saved(tmp_path, "llama")
    model = adapt(load(tmp_path, None), LORA, "none")
    before = model.get_input_embeddings()
    train_tokens(model, ())
    assert model.get_input_embeddings() is before
    assert token_rows(model, {}) == ({}, {})


def test_new_rows_on_a_base_in_4_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    saved(tmp_path, "llama")
    model = load_model(
        ModelConfig(path=str(tmp_path), dtype="fp32"),
        seed=1,
        init_context=None,
        param_dtype=torch.float32,
        quantize="nf4",
        vocabulary=Vocabulary(named=frozenset({97}), new=frozenset({97})),
    )
    model = adapt(model, LORA, "none")
    train_tokens(model, (97,))
    capability = can_isolate(model)
    assert capability.fused_head
    batch = to_device(collate(documents_with(97), capability.packed), CPU)
    SupervisedModel(model, capability)(batch).backward()
    rows = [p for n, p in model.named_parameters() if ".new.weight" in n]
    assert len(rows) == 2 and all(p.grad is not None and p.grad.abs().sum() > 0 for p in rows)
