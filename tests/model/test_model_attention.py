"""Attention that keeps documents apart, and the trial that decides who may be packed."""

import pytest
import torch
from tiny_models import FAMILIES, build, make_documents
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from breadth.batches import collate
from breadth.families import build as build_family
from burnish.errors import ConfigError, MachineError
from burnish.model import document_attention as ours
from burnish.model.attention import can_isolate, verify_isolation
from burnish.model.device_batch import to_device
from burnish.model.document_attention import (
    ATTENTION_NAME,
    document_attention,
    document_mask,
    register_attention,
)
from burnish.model.forward import SupervisedModel
from burnish.model.surrogate import build_surrogate
from burnish.model.windows_asked import windows_disagree

LENGTHS = (5, 1, 12, 7)
BOUNDS = torch.tensor([0, *LENGTHS]).cumsum(0).int()


def heads(key_heads=2, width=8, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    shapes = [(1, 4, tokens, width), (1, key_heads, tokens, width), (1, key_heads, tokens, width)]
    made = (torch.randn(s, generator=generator) for s in shapes)
    return [t.to(device, dtype).requires_grad_() for t in made]


def masked(query, key, value, scale, window):
    """One call with the whole block-diagonal mask."""
    tokens = query.shape[2]
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).to(query.device)
    behind = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
    seen = (document[:, None] == document[None, :]) & (behind >= 0).to(query.device)
    if window is not None:
        seen &= (behind < window).to(query.device)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 4, 12, 100])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("written_out", [False, True])
def test_documents_equal_one_masked_call(window, key_heads, written_out, monkeypatch):
    if written_out:
        monkeypatch.setattr(ours.Scores, "plain", False)
    inputs = heads(key_heads)
    mask = document_mask(BOUNDS, max(LENGTHS))
    out, _ = document_attention(torch.nn.Identity(), *inputs, mask, scaling=0.3, sliding_window=window)
    expected = masked(*inputs, 0.3, window)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(out, inputs, seed)
    for a, b in zip(found, torch.autograd.grad(expected, inputs, seed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("value_width", [8, 6])
def test_one_document_by_torchs_own_kernels(window, value_width):
    query, key, value = heads()
    scores = ours.Scores(0.3, window, None, None, 0.0)
    out = ours._torchs_own(query, key, value[..., :value_width], scores)
    seen = ours.causal_mask(sum(LENGTHS), window, query.device)
    expected = ours._written_out(query, key, value[..., :value_width], seen, scores)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_bf16_inputs_give_bf16_outputs_from_fp32_work():
    inputs = heads(dtype=torch.bfloat16)
    out, _ = document_attention(torch.nn.Identity(), *inputs, document_mask(BOUNDS, max(LENGTHS)))
    exact = masked(*[t.float() for t in inputs], 8**-0.5, None)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=1e-2, atol=1e-2)
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(out.sum(), inputs))


def test_what_is_not_known_is_refused_and_not_ignored():
    with pytest.raises(ours.UnsupportedAttentionError, match="position_bias"):
        document_attention(
            torch.nn.Identity(), *heads(), document_mask(BOUNDS, max(LENGTHS)), position_bias=torch.zeros(1)
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 4])
def test_varlen_on_cuda(window):
    inputs = heads(width=64, dtype=torch.bfloat16, device="cuda")
    mask = document_mask(BOUNDS.cuda(), max(LENGTHS))
    out, _ = document_attention(torch.nn.Identity(), *inputs, mask, sliding_window=window)
    exact = masked(*[t.float() for t in inputs], 64**-0.5, window)
    torch.testing.assert_close(out.float(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "mistral"])
def test_generation_and_left_padding_work_under_our_name(family):
    """Whoever asks the trained model for text gets the same as from plain transformers."""
    model = build(family).eval()
    ids = torch.tensor([[0, 0, 5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17, 18, 19, 20]])
    mask = (ids != 0).long()
    plain = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    model.set_attn_implementation("eager")
    expected = model.generate(input_ids=ids, attention_mask=mask, **plain)
    assert can_isolate(model).packed and model.config._attn_implementation == ATTENTION_NAME
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **plain), expected)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_small_model_of_the_family_gives_the_same_answer(family):
    """The trial under bf16 or ZeRO-3 runs on a surrogate."""
    exact, rounded = build(family), build(family).bfloat16()
    before, after = can_isolate(exact), can_isolate(rounded)
    assert before == after
    assert rounded.config._attn_implementation == after.attention
    surrogate = build_surrogate(rounded)
    assert surrogate is not None and surrogate.dtype == torch.float32
    assert surrogate.config.num_hidden_layers <= exact.config.num_hidden_layers


@pytest.mark.parametrize("num_before", [1, 11])
def test_a_kind_of_layer_that_comes_late_is_tried_too(num_before):
    """Linear attention, which leaks, behind many layers that do not: the small model has one of each."""
    kinds = ["full_attention"] * num_before + ["linear_attention"]
    model = build_family("qwen3_next", layer_types=kinds, num_hidden_layers=len(kinds)).bfloat16()
    assert can_isolate(model).reason == "a document's hidden states change with its neighbour"


def test_weights_that_are_not_in_memory_are_not_tried():
    """`plan` has a model without weights; Zamba, whose layers share weights, cannot be made small."""
    model = build_family("zamba")
    assert build_surrogate(model) is None
    capability = can_isolate(model.to("meta"))
    assert not capability.packed and "could not be built" in capability.reason


def test_a_model_that_leaks_is_found_out():
    """Guards the trial itself: an attention function that forgets boundaries does not pass."""
    from transformers import AttentionInterface

    model = build("llama").eval()
    register_attention()

    def leaking(module, query, key, value, attention_mask, **kwargs):
        return document_attention(module, query, key, value, None, scaling=kwargs["scaling"])

    AttentionInterface.register(ATTENTION_NAME, leaking)
    try:
        with torch.no_grad():
            assert "neighbour" in verify_isolation(model)
    finally:
        register_attention()


def test_a_window_that_a_layer_keeps_to_itself_is_found_out():
    model = build("gemma2", sliding_window=5).eval()
    run = lambda: model(torch.arange(7)[None], use_cache=False)  # noqa: E731
    assert windows_disagree(model, run) is None
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    assert "window of 5" in windows_disagree(model, run)
    assert "window of 5" in windows_disagree(model, run, longest=6)
    assert windows_disagree(model, run, longest=5) is None  # no document is longer than the window


def test_positions_scaled_by_the_longest_document_want_it_alone_beyond_their_limit():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = build("llama", rope_parameters=rope, max_position_embeddings=16)
    assert can_isolate(model, max_tokens=16).packed
    with pytest.raises(ConfigError, match=r"beyond 16 tokens[\s\S]*micro_examples"):
        can_isolate(model, max_tokens=17)
    assert not can_isolate(model, max_tokens=17, alone=True).packed
    assert not can_isolate(model).packed


def test_an_encoder_is_refused():
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("bert", intermediate_size=48, initializer_range=0.3, **sizes)
    with pytest.raises(ConfigError, match="not causal"):
        can_isolate(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("choice", ["sdpa", "eager"])
def test_asking_for_another_attention_pads(choice):
    capability = can_isolate(build("llama"), choice)
    assert not capability.packed and capability.attention == choice
    model = SupervisedModel(build("llama"), capability)
    with pytest.raises(ValueError, match="padded"):
        model(to_device(collate(make_documents(), True), torch.device("cpu")))


def test_attention_that_the_model_cannot_take_is_an_error_of_its_key():
    with pytest.raises(ConfigError, match=r"model\.attention: Gemma2ForCausalLM cannot take sdpa here: "):
        can_isolate(build("gemma2"), "sdpa")


def test_attention_whose_package_is_missing_is_an_error_of_the_machine(monkeypatch):
    def missing(*_arguments, **_more):
        raise ImportError("the package for FlashAttention2 doesn't seem to be installed.")

    monkeypatch.setattr(LlamaForCausalLM, "_flash_attn_can_dispatch", missing)
    with pytest.raises(MachineError, match=r"model\.attention: .* doesn't seem to be installed"):
        can_isolate(build("llama"), "flash_attention_2")
