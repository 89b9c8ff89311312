# ruff: noqa: C408
"""Tiny random models, micro-batches, and the plain reference loss for the tests of this folder."""

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from burnish.records import NO_TARGET

COMMON = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.3,
)

FAMILIES = {
    "llama": dict(COMMON),
    "llama_bias": dict(COMMON, model_type="llama", attention_bias=True),
    "qwen2": dict(COMMON, tie_word_embeddings=True),
    "qwen3": dict(COMMON, tie_word_embeddings=True),
    "gemma2": dict(
        COMMON,
        sliding_window=6, query_pre_attn_scalar=8, attn_logit_softcapping=5.0,
        final_logit_softcapping=4.0
    ),
    "gpt2": dict(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2,
        initializer_range=0.3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "mistral": dict(COMMON, sliding_window=5),
    "cohere": dict(COMMON, logit_scale=0.25),
    "granite": dict(COMMON, logits_scaling=3.0, embedding_multiplier=2.0, residual_multiplier=0.5),
    "gpt_oss": dict(COMMON, num_local_experts=4, num_experts_per_tok=2, sliding_window=6),
    "mixtral": dict(COMMON, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.02),
    "gpt_neox": dict(COMMON, hidden_dropout=0.0, attention_dropout=0.0),
    "mamba": dict(vocab_size=97, hidden_size=32, state_size=4, num_hidden_layers=2, pad_token_id=0,
                  bos_token_id=1, eos_token_id=2),
}  # fmt: skip


def build(family: str, seed: int = 0, **changes) -> torch.nn.Module:
    arguments = dict(FAMILIES[family], **changes)
    config = AutoConfig.for_model(arguments.pop("model_type", family), **arguments)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # biases and norms start at 0 and 1: make them matter
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_documents(seed: int = 0, lengths=(9, 17, 1, 12, 5), vocabulary: int = 97):
    """(tokens, weights of tokens as targets) with multi-turn masks, one document without any."""
    generator = np.random.default_rng(seed)
    documents = []
    for number, length in enumerate(lengths):
        tokens = generator.integers(3, vocabulary, length)
        weights = np.zeros(length, np.float32)
        weights[length // 4 : length // 2] = 1.0
        weights[-2:] = 0.5
        if number == len(lengths) - 1:
            weights[:] = 0.0
        documents.append((tokens, weights))
    return documents


def reference_loss(model, documents) -> torch.Tensor:
    """Each document alone through `model(labels=...)`, its mean turned back into a sum, one call per
    distinct weight (labels know no weights)."""
    total = torch.zeros((), dtype=torch.float64)
    for tokens, weights in documents:
        for weight in sorted(set(weights[1:]) - {0}):
            ids = torch.from_numpy(tokens)[None]
            labels = torch.where(torch.from_numpy(weights == weight)[None], ids, NO_TARGET)
            count = int((labels[:, 1:] != NO_TARGET).sum())
            total = total + model(
                input_ids=ids, labels=labels, use_cache=False
            ).loss.double() * count * float(weight)
    return total


def gradients(model) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
