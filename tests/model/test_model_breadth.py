"""Every decoder family of transformers: what docs/models.md says of it is what is seen of it.

`PYTHONPATH=src:tests python -m breadth` looks at all of them and writes `breadth/seen.json`, of which the
page's table is made. Here a few families of every kind are looked at again, and all in the slow tests.
"""

import dataclasses

import pytest
import torch
from peft import PeftModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from breadth.__main__ import zero3
from breadth.batches import collate, make_documents
from breadth.checks import (
    UNSEEN,
    YES,
    compared,
    gradients,
    largest_gap,
    look,
    ours,
    read_seen,
    reference,
    with_adapter,
)
from breadth.families import NOT_BUILT, build, families, small_config
from breadth.partitioned import PARTED
from burnish.config.schema import AdapterConfig, Config
from burnish.errors import ConfigError
from burnish.model import adapt as adapt_module
from burnish.model.adapt import adapt
from burnish.model.attention import can_isolate
from burnish.model.device_batch import to_device
from burnish.model.forward import SupervisedModel
from burnish.model.objective import Objective
from burnish.plan import ModelShape, estimate_memory

SEEN = read_seen()
CPU = torch.device("cpu")
PLANNED = Config.model_validate({
    "model": {"path": "m"}, "adapter": {"rank": 2}, "data": {"train": "d.jsonl"}, "output_dir": "out",
})  # fmt: skip

FEW = [
    "bart",  # positions that cannot be told: padded, labels that are not shifted
    "bloom",  # ALiBi
    "cohere2",  # scaled logits, sliding and full layers
    "deepseek_v3",  # latent attention, groups of experts
    "falcon_h1",  # attention and Mamba side by side
    "gemma3_text",  # scaled embeddings, normed queries, two kinds of RoPE
    "gpt2",  # learned positions, a fused Conv1D
    "gpt_oss",  # sinks
    "llama4_text",  # chunked attention, a router that is a linear layer
    "mamba",
    "opt",  # learned positions with an offset
    "qwen3_5_text",  # linear attention
    "roberta",  # positions from 2
]


def test_at_least_sixty_families_train_right():
    right = [row for row in SEEN.values() if row.equal == row.apart == YES]
    assert len(right) >= 60
    assert sum(row.packed for row in right) >= 60


def test_every_family_is_looked_at_or_left_out_with_a_reason():
    """Also: what transformers adds tomorrow makes this fail, and the table is made anew."""
    named = {name for row in SEEN.values() for name in (row.family, *row.aliases)}
    vision = {f for f, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if "ConditionalGeneration" in name}
    assert named | set(NOT_BUILT) | vision == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_nothing_goes_wrong_in_silence():
    """What a family cannot do is refused; nothing trains with other gradients."""
    for row in SEEN.values():
        for answer in (row.equal, row.apart, row.lora, row.recompute):
            assert answer in (YES, "refused"), row
        assert row.zero3 in (YES, UNSEEN) or row.zero3.startswith(("refused", "padded", "no: ")), row


@pytest.mark.parametrize("family", families())
def test_every_family_can_be_planned(family):
    """`train` plans before it loads: by names that a family may have for itself, lists, or no attention."""
    shape = ModelShape.from_config_json(small_config(family).to_dict())
    assert shape.num_layers >= 1
    assert shape.mlp_width > 0
    assert shape.cost_model().per_token > 0
    assert estimate_memory(PLANNED, shape, 1, 128).device.total > 0


@pytest.mark.parametrize("family", FEW)
def test_a_family_is_as_the_table_says(family):
    seen = look(family)
    assert dataclasses.replace(seen, zero3=SEEN[family].zero3) == SEEN[family]


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(families()) - set(FEW)))
def test_every_other_family_is_as_the_table_says(family):
    seen = look(family)
    assert dataclasses.replace(seen, zero3=SEEN[family].zero3) == SEEN[family]


@pytest.mark.slow
def test_every_family_under_zero_3(tmp_path):
    pytest.importorskip("deepspeed")
    together = {family: row for family, row in SEEN.items() if row.zero3 != PARTED}
    found = zero3(list(together.values()), tmp_path)
    assert found.keys() == {family for family, row in together.items() if row.equal != "refused"}
    committed = {family: SEEN[family].zero3 for family in found if SEEN[family].zero3 != UNSEEN}
    assert {family: found[family] for family in committed} == committed


@pytest.mark.parametrize("family", ["whisper", "bart", "roberta"])
def test_in_fp64_nothing_is_left_of_the_difference(family):
    """Where a family and its loss stay in fp64, the rounding of fp32 vanishes and an error would remain."""
    model, documents = build(family).double(), make_documents()
    capability = can_isolate(build(family))
    model.set_attn_implementation(capability.attention)
    found = ours(model, capability, documents)
    # Attention written out has its softmax in fp32, whatever the rest is in; SDPA has it in fp64.
    expected = reference(build(family).double(), documents, "sdpa")
    assert largest_gap(found[1], expected[1])[1] < 1e-12


def test_a_wrong_gradient_is_seen():
    documents = make_documents()
    expected = reference(build("llama"), documents)
    model = build("llama")
    capability = can_isolate(model)
    found = ours(model, capability, [*documents[:3], (documents[3][0], documents[3][1] * 0.999)])
    assert compared(found, expected) != YES
    wrong = {name: gradient.clone() for name, gradient in expected[1].items()}
    wrong["model.norm.weight"][0] *= 1.001
    assert "model.norm.weight" in compared((expected[0], wrong), expected)


# ------------------------------------------------------------------ what is off in the table


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi", "bart", "mamba2", "gpt_oss", "granitemoe"])
def test_dropout_keeps_documents_apart(family):
    """With the same random numbers, a document's loss is the same whatever its neighbours are."""
    config = small_config(family).to_dict()
    drops = {name: 0.3 for name, value in config.items() if "drop" in name and isinstance(value, float)}
    model = build(family, **drops)
    capability = can_isolate(model)
    documents = make_documents()
    silent = [(tokens, weights * 0) for tokens, weights in documents]
    silent[2] = documents[2]
    others = list(make_documents(1))
    others = [(tokens, weights * 0) for tokens, weights in others]
    others[2] = documents[2]

    def drawn(docs):
        torch.manual_seed(5)
        return ours(model, capability, docs)

    found, again = drawn(silent), drawn(others)
    assert found[0] == pytest.approx(again[0], rel=1e-6)
    if drops:
        torch.manual_seed(6)
        assert ours(model, capability, silent)[0] != pytest.approx(found[0], rel=1e-4)


BALANCED = ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "olmoe", "phimoe"]


def balanced_is_right(family):
    """Gradients with the model's own balancing loss of each document, weighted by its targets."""
    model, documents = build(family), make_documents()
    capability = can_isolate(model)
    supervised = SupervisedModel(model, capability, Objective(router_aux_loss=0.5)).train()
    supervised(to_device(collate(documents, capability.packed), CPU)).backward()
    found = gradients(model)
    twin = build(family)
    _, expected = reference(twin, documents)
    for tokens, weights in documents:
        outputs = twin(torch.from_numpy(tokens)[None], output_router_logits=True, use_cache=False)
        if outputs.aux_loss is None:
            pytest.skip("its own code adds no balancing loss")
        (0.5 * outputs.aux_loss * float(weights[1:].sum())).backward()
    for name, gradient in gradients(twin).items():
        expected[name] = expected[name] + gradient
    name, gap = largest_gap(found, expected)
    assert gap < 1e-5, name


@pytest.mark.parametrize("family", BALANCED)
def test_router_losses(family):
    balanced_is_right(family)


def test_a_mixture_made_without_experts_is_refused():
    model = build("doge")  # its config names the loss's factor, and `is_moe` is false
    capability = can_isolate(model)
    supervised = SupervisedModel(model, capability, Objective(router_aux_loss=0.5)).train()
    with pytest.raises(ConfigError, match="DogeForCausalLM gave no router's logits"):
        supervised(to_device(collate(make_documents(), capability.packed), CPU))


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(SEEN) - set(BALANCED)))
def test_router_losses_of_every_family_that_has_one(family):
    text = small_config(family).to_dict()
    if text.get("router_aux_loss_coef") is None:
        pytest.skip("has no balancing loss")
    try:
        balanced_is_right(family)
    except ConfigError:
        pytest.skip("refused")


# ------------------------------------------------------------------ variants of a family

ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8}
VARIANTS = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "untied": ("gemma2", {"tie_word_embeddings": False}),
    "linear": ("llama", {"rope_parameters": {**ROPE, "rope_type": "linear"}}),
    "yarn": ("llama", {"rope_parameters": {**ROPE, "rope_type": "yarn"}}),
    "llama3": (
        "llama",
        {"rope_parameters": {**ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ),
    "longrope": (
        "phi3",
        {
            "rope_parameters": {
                **ROPE,
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
            },
            "original_max_position_embeddings": 8,
        },
    ),
    "alibi": ("falcon", {"alibi": True}),
    "multi-query": ("falcon", {"multi_query": True, "new_decoder_architecture": False}),
    "clipped": ("mpt", {"attn_config": {"clip_qkv": 0.5}}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "normed queries": ("cohere", {"use_qk_norm": True}),
    "one window for all": ("starcoder2", {"sliding_window": 3}),
    "post-norm": ("opt", {"do_layer_norm_before": False}),
    "projected embeddings": ("opt", {"word_embed_proj_dim": 16}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant(name):
    family, changes = VARIANTS[name]
    documents = make_documents()
    model = build(family, **changes)
    if name == "longrope":  # each in a micro-batch of its own, then
        capability = can_isolate(model, max_tokens=17, alone=True)
        assert not capability.packed
        parts = [ours(model, capability, [document]) for document in documents]
        total = {n: torch.stack([g[n] for _, g in parts]).sum(0) for n in parts[0][1]}
        found = sum(loss for loss, _ in parts), total
    else:
        found = ours(model, can_isolate(model), documents)
    assert compared(found, reference(build(family, **changes), documents)) == YES


def test_embeddings_of_another_size():
    documents, sizes = make_documents(), (110, 128)
    for family in ("llama", "gemma2", "gpt2"):
        models = [build(family) for _ in range(2)]
        for model in models:
            torch.manual_seed(1)
            model.resize_token_embeddings(sizes[0], mean_resizing=False, pad_to_multiple_of=64)
            assert model.get_output_embeddings().weight.shape[0] == sizes[1]
        found = ours(models[0], can_isolate(models[0]), documents)
        assert compared(found, reference(models[1], documents)) == YES


# ------------------------------------------------------------------ positions with an end


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert", "biogpt", "whisper", "gptj"])
def test_documents_longer_than_learned_positions_are_refused(family):
    model = build(family)
    limit = 128
    can_isolate(model, max_tokens=limit)
    with pytest.raises(ConfigError, match=rf"knows {limit} positions[\s\S]*Set it to {limit}"):
        can_isolate(model, max_tokens=limit + 1)
    last = torch.arange(limit)[None] % 97
    model(last, use_cache=False)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.cat([last, last[:, :1]], 1), use_cache=False)


@pytest.mark.parametrize("family", ["llama", "bloom", "mamba", "xglm", "gpt_neox"])
def test_positions_without_a_table_have_no_end(family):
    can_isolate(build(family), max_tokens=100_000)


# ------------------------------------------------------------------ what an adapter reaches


def test_fused_experts_out_of_reach_are_told(monkeypatch):
    told = []
    monkeypatch.setattr("burnish.model.reach.log.warning", lambda text, *rest: told.append(text % rest))
    adapt(build("mixtral"), AdapterConfig(rank=2, alpha=4), "none")
    assert "mlp.experts.gate_up_proj" in told[0] and "in no linear layer" in told[0]
    adapt(build("llama"), AdapterConfig(rank=2, alpha=4), "none")
    assert len(told) == 1


def test_fused_experts_by_name():
    targets = ("q_proj", "v_proj", "experts.gate_up_proj", "experts.down_proj")
    documents = make_documents()
    model = with_adapter("mixtral", targets=targets)
    assert any("experts" in n for n, p in model.named_parameters() if p.requires_grad)
    found = ours(model, can_isolate(model), documents)
    assert compared(found, reference(with_adapter("mixtral", targets=targets), documents)) == YES
    assert any(bool(g.any()) for name, g in found[1].items() if "experts" in name)
    ids = torch.from_numpy(documents[1][0])[None]
    before = model.eval()(ids, use_cache=False).logits
    assert isinstance(model, PeftModel)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids, use_cache=False).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"dropout": 0.1}, r"adapter\.dropout"), ({"kind": "dora"}, r"adapter\.kind")],
)
def test_what_an_adapter_on_fused_experts_cannot_have(changes, message):
    config = AdapterConfig(rank=2, alpha=4, targets=("experts.down_proj",), **changes)
    with pytest.raises(ConfigError, match=message):
        adapt(build("mixtral"), config, "none")


def test_what_peft_refuses_is_a_clear_error():
    with pytest.raises(ConfigError, match="out_proj"):
        adapt(build("mamba"), AdapterConfig(rank=2, alpha=4, targets=("in_proj", "out_proj")), "none")
    assert adapt_module.not_called(build("mamba")) == ["out_proj"]
    assert adapt_module.not_called(build("llama4_text")) == ["router"]
    assert adapt_module.not_called(build("llama")) == []
