"""Documents that share their beginnings give the loss and the gradients that they give apart."""

import inspect
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, build, gradients, reference_loss
from torch.nn.functional import scaled_dot_product_attention

from burnish.config.schema import AdapterConfig
from burnish.data.collate import collate
from burnish.model import document_attention as ours
from burnish.model import varlen as kernels
from burnish.model.adapt import adapt
from burnish.model.anatomy import causal_model
from burnish.model.attention import can_isolate
from burnish.model.device_batch import to_device
from burnish.model.document_attention import document_attention
from burnish.model.forward import SupervisedModel
from burnish.model.prefix_attention import prefix_mask, prefix_numbers, shared_varlen_attention
from burnish.records import Example

CPU = torch.device("cpu")
SEGMENTS = np.array(
    # root of 5 with two below it, the second of which has two of its own; then a document by itself
    [[0, 5, 9, 12, 18, 22], [5, 9, 12, 18, 22, 29], [22, 9, 22, 18, 22, 29]],
    np.int32,
)
TOKENS, LONGEST = 29, 14


def mask_of(segments=SEGMENTS, longest=LONGEST, device="cpu"):
    numbers = torch.from_numpy(prefix_numbers(segments)).to(device)
    return prefix_mask(numbers, segments.shape[1], longest)


def heads(key_heads=2, width=8, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, TOKENS, width), (1, key_heads, TOKENS, width), (1, key_heads, TOKENS, width)]
    made = (torch.randn(s, generator=generator) for s in shapes)
    return [t.to(device, dtype).requires_grad_() for t in made]


def written_out(query, key, value, scale, window):
    """One call with a mask that says of every pair whether it is seen."""
    begins, stops, ends = SEGMENTS
    seen = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    for begin, stop, end in zip(begins, stops, ends, strict=True):
        seen[begin:stop, begin:stop] = torch.ones(stop - begin, stop - begin).tril().bool()
        seen[stop:end, begin:stop] = True
    if window is not None:  # a key's place is counted in its document
        place = seen.sum(1) - 1
        seen &= place[:, None] - place[None, :] < window
    seen = seen.to(query.device)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale).transpose(1, 2)


def assert_same(inputs, out, expected, **tolerance):
    torch.testing.assert_close(out, expected, **tolerance)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    found = torch.autograd.grad(out, inputs, seed)
    for a, b in zip(found, torch.autograd.grad(expected, inputs, seed), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("window", [None, 3, 14, 100])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("plain", [True, False])
def test_segments_equal_one_masked_call(window, key_heads, plain, monkeypatch):
    if not plain:
        monkeypatch.setattr(ours.Scores, "plain", False)
    inputs = heads(key_heads)
    out, _ = document_attention(torch.nn.Identity(), *inputs, mask_of(), scaling=0.3, sliding_window=window)
    assert_same(inputs, out, written_out(*inputs, 0.3, window), rtol=1e-5, atol=2e-6)


def varlen(q, k, v, bounds, key_bounds, *_, scale, window_size, **__):
    """What FlashAttention is documented to do: causal, and windows, aligned to the last query and key."""
    out = []
    for (a, b), (c, d) in zip(pairwise(bounds.tolist()), pairwise(key_bounds.tolist()), strict=True):
        place, other = torch.arange(d - c - (b - a), d - c), torch.arange(d - c)
        seen = other[None, :] <= place[:, None]
        if window_size[0] >= 0:
            seen &= place[:, None] - other[None, :] <= window_size[0]
        groups = q.shape[1] // k.shape[1]
        keys, values = (x[c:d].repeat_interleave(groups, 1).transpose(0, 1) for x in (k, v))
        part = scaled_dot_product_attention(q[a:b].transpose(0, 1), keys, values, attn_mask=seen, scale=scale)
        out.append(part.transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("window", [None, 6])
def test_varlen_is_given_the_right_sequences(window, monkeypatch):
    """The CUDA path with FlashAttention written out: everything but the kernel."""
    use_kernel(varlen, monkeypatch)
    inputs = heads()
    q, k, v = (x[0].transpose(0, 1) for x in inputs)
    out = shared_varlen_attention(q, k, v, mask_of(), 0.3, window)
    assert_same(inputs, out, written_out(*inputs, 0.3, window), rtol=1e-5, atol=2e-6)


def use_kernel(kernel, monkeypatch):
    monkeypatch.setattr(kernels, "varlen_attn", kernel)
    monkeypatch.setattr(kernels, "_PARAMETERS", frozenset(inspect.signature(kernel).parameters))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    raise AssertionError("cannot be told a scale")


def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
            window_size=(-1, -1)):  # fmt: skip
    return varlen(query, key, value, cu_seq_q, cu_seq_k, scale=scale, window_size=window_size)


def of_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
            window_size=(-1, -1), enable_gqa=False, seqused_k=None, num_splits=None):  # fmt: skip
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return varlen(query, key, value, cu_seq_q, cu_seq_k, scale=scale, window_size=window_size)


@pytest.mark.parametrize("kernel", [of_2_10, of_2_11, of_2_13], ids=["2.10", "2.11", "2.13"])
@pytest.mark.parametrize("key_heads", [2, 4])
def test_the_kernel_is_called_as_each_version_wants(kernel, key_heads, monkeypatch):
    use_kernel(kernel, monkeypatch)

    def fit(width=64, value_width=64, dtype=torch.bfloat16):
        query, value = (torch.zeros(1, 4, 3, size, dtype=dtype) for size in (width, value_width))
        return kernels.fits_varlen(query, value)

    fits = fit()
    assert fits == (kernel is not of_2_10)
    assert fit(192, 128) == fits  # latent attention: values are padded
    assert not fit(60, 60)  # no multiple of 8
    assert not fit(64, 128)
    assert not fit(dtype=torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert not fit()
    if fits:
        inputs = heads(key_heads)
        q, k, v = (x[0].transpose(0, 1) for x in inputs)
        out = shared_varlen_attention(q, k, v, mask_of(), 0.3, None)
        assert_same(inputs, out, written_out(*inputs, 0.3, None), rtol=1e-5, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 6])
def test_varlen_on_cuda(window):
    inputs = heads(width=64, dtype=torch.bfloat16, device="cuda")
    mask = mask_of(device="cuda")
    out, _ = document_attention(torch.nn.Identity(), *inputs, mask, scaling=0.1, sliding_window=window)
    assert_same(inputs, out, written_out(*inputs, 0.1, window), rtol=2e-2, atol=2e-2)


def make_examples(seed: int = 0) -> list[Example]:
    """A common beginning of 33 tokens, in two of them one of 44 (less than 32 more: not shared), a pair that
    shares 36 of its own, twins, one that is the beginning of another, and one by itself; targets with
    weights stand in the shared part too."""
    generator = np.random.default_rng(seed)

    def more(num: int) -> np.ndarray:
        return generator.integers(3, 97, num)

    common, pair = more(33), more(36)
    longer = np.concatenate([common, more(11)])
    rows = [
        np.concatenate([common, more(8)]),
        np.concatenate([longer, more(9)]),
        np.concatenate([longer, more(1)]),
        np.concatenate([pair, more(5)]),
        np.concatenate([pair, more(7)]),
        np.concatenate([pair, more(7)]),
        pair,
        more(40),
        common,
        more(1),
    ]
    rows.append(rows[0])  # the same tokens, other weights
    examples = []
    for number, tokens in enumerate(rows):
        weights = generator.choice([0.0, 0.5, 1.0], len(tokens), p=[0.4, 0.2, 0.4]).astype(np.float32)
        weights[-1] = 1.0
        examples.append(Example("s", f"s:{number}", tokens.astype(np.int32), weights))
    return examples


def nested_examples() -> list[Example]:
    """Two levels: a system prompt, two questions, three answers."""
    generator = np.random.default_rng(5)
    system, one, other = (generator.integers(3, 97, n) for n in (35, 34, 40))
    answers = [generator.integers(3, 97, n) for n in (6, 3, 9)]
    tokens = [
        np.concatenate([system, one, answers[0]]),
        np.concatenate([system, one, answers[1]]),
        np.concatenate([system, other, answers[2]]),
    ]
    return [
        Example("s", "s", t.astype(np.int32), (np.arange(len(t)) % 3 > 0).astype(np.float32)) for t in tokens
    ]


def shared_batch(examples):
    batch = collate(examples, list(range(len(examples))), True, 0, share_prefixes=True)
    assert batch.shared is not None and batch.token_ids.shape[1] < batch.num_tokens
    return batch


def assert_equal_gradients(ours_, theirs, tolerance):
    assert ours_.keys() == theirs.keys() and ours_
    largest = max(float(g.abs().max()) for g in theirs.values())
    assert largest > 0
    for name, gradient in theirs.items():
        gap = float((ours_[name].float() - gradient.float()).abs().max())
        scale = max(float(gradient.abs().max()), 1e-2 * largest)
        assert gap <= tolerance * scale, f"{name}: {gap / scale}"


def reference(model, examples):
    """Each document alone, in plain transformers."""
    causal_model(model).set_attn_implementation("eager")
    loss = reference_loss(model, [(e.token_ids.astype(np.int64), e.weights) for e in examples])
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize("make", [make_examples, nested_examples])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"mamba"}))
def test_loss_and_gradients_equal_each_document_alone(family, checkpointing, make):
    if checkpointing == "full" and make is nested_examples:
        pytest.skip("seen with the other documents")
    model = build(family) if family != "gpt2" else build(family, n_positions=128)
    examples = make()
    expected, expected_gradients = reference(model, examples)
    capability = can_isolate(model)
    adapt(model, None, checkpointing)
    supervised = SupervisedModel(model, capability).train()
    loss = supervised(to_device(shared_batch(examples), CPU))
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert_equal_gradients(gradients(model), expected_gradients, 1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters(kind):
    torch.manual_seed(0)
    model = adapt(build("qwen3"), AdapterConfig(kind=kind, rank=4, alpha=8), "none")
    with torch.no_grad():  # B starts at 0, and then A has no gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    examples = make_examples()
    expected, expected_gradients = reference(model, examples)
    supervised = SupervisedModel(model, can_isolate(model)).train()
    loss = supervised(to_device(shared_batch(examples), CPU))
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert_equal_gradients(gradients(model), expected_gradients, 1e-5)


def test_bf16_autocast_stays_near_fp32():
    model = build("llama", initializer_range=0.1)
    examples = make_examples()
    expected, expected_gradients = reference(model, examples)
    supervised = SupervisedModel(model, can_isolate(model)).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = supervised(to_device(shared_batch(examples), CPU))
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=2e-2)
    assert_equal_gradients(gradients(model), expected_gradients, 2e-2)


def test_a_wrong_tree_is_seen_by_these_tests():
    """Guards against passing in vain: a segment that does not see the one above it changes the loss."""
    model = build("llama")
    examples = make_examples()
    supervised = SupervisedModel(model, can_isolate(model))
    batch = shared_batch(examples)
    assert batch.shared is not None
    right = supervised(to_device(batch, CPU)).item()
    _, stops, ends = batch.shared.segments
    above = int(np.flatnonzero(ends > stops)[0])
    ends[above] = stops[above]
    assert supervised(to_device(batch, CPU)).item() != pytest.approx(right, rel=1e-4)


def test_what_is_asked_of_each_document_is_refused():
    model = build("llama")
    supervised = SupervisedModel(model, can_isolate(model))
    with pytest.raises(ValueError, match="told apart"):
        supervised(to_device(shared_batch(make_examples()), CPU), per_document=True)
