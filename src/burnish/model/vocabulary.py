"""Embedding and head with rows for new tokens; and, beside an adapter, those rows trained.

A new row is the mean of the rows of the tokens that the model knew, nothing random: every rank and every
engine finds the same, and a new token is at first about as likely as the average one (Hewitt 2021,
"Initializing new word embeddings for pretrained language models"). transformers draws from a normal
distribution around the same mean, with a covariance of 1e-9 times that of the rows.

With an adapter only new tokens have rows that are trained (`grown.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.utils.integrations import gather_params_ctx
from torch import nn
from transformers import PreTrainedModel

from burnish.errors import ConfigError, Problem
from burnish.model.anatomy import causal_model
from burnish.model.grown import GrownEmbedding, GrownHead
from burnish.records import Vocabulary

_CHUNK_ROWS = 4096
"""Of a matrix, that are summed in fp64 at a time."""


def grow(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """Give embedding and head the rows that the tokenizer asks for; a tied head stays tied.

    Under ZeRO-3 (inside its context) grown weights come out whole; the engine partitions them again.

    Args:
        model: As loaded; its config is changed with it.
        vocabulary: Of the run's tokenizer.

    Raises:
        ConfigError: The head is no linear layer.
    """
    text = model.config.get_text_config(decoder=True)
    before: int = text.vocab_size
    num_rows, fresh = vocabulary.num_rows(before), list(vocabulary.fresh(before))
    if num_rows == before and not fresh:
        return
    embedding: Any = model.get_input_embeddings()
    head = _linear_head(model)
    tied = head is not None and head.weight is embedding.weight
    unknown = torch.zeros(num_rows, dtype=torch.bool)
    unknown[before:] = True
    unknown[fresh] = True
    embedding.weight = _grown(embedding.weight, unknown)
    embedding.num_embeddings = num_rows
    if head is not None:
        head.weight = embedding.weight if tied else _grown(head.weight, unknown)
        head.out_features = num_rows
        if head.bias is not None:
            head.bias = _grown(head.bias, unknown)
    text.vocab_size = num_rows
    # transformers keeps the number on some models too, as its own resizing does.
    model.vocab_size = num_rows  # pyright: ignore[reportAttributeAccessIssue]


def _linear_head(model: PreTrainedModel) -> nn.Linear | None:
    head = model.get_output_embeddings()
    if head is None or isinstance(head, nn.Linear):
        return head
    what = f"needs a linear head, but {type(model).__name__} has a {type(head).__name__}"
    cure = "Leave it out, or the head out of adapter.targets."
    raise ConfigError(Problem("model.add_tokens", what, cure))


@torch.no_grad()
def _grown(weight: Any, unknown: torch.Tensor) -> nn.Parameter:
    """The weight with as many rows as `unknown` says; the unknown ones are the mean of the others.

    A weight that ZeRO-3 has partitioned is gathered for it.
    """
    with gather_params_ctx([weight], modifier_rank=None):
        before = weight.shape[0]
        unknown = unknown.to(weight.device)
        parts = zip(weight.split(_CHUNK_ROWS), unknown[:before].split(_CHUNK_ROWS), strict=True)
        sums = torch.stack([rows[~skipped].double().sum(0) for rows, skipped in parts])
        grown = weight.new_empty(len(unknown), *weight.shape[1:])
        grown[:before] = weight
        grown[unknown] = (sums.sum(0) / (~unknown).sum()).to(weight.dtype)
    return nn.Parameter(grown, requires_grad=weight.requires_grad)


def train_tokens(model: nn.Module, tokens: Sequence[int]) -> None:
    """Beside an adapter, train the rows of these tokens too, in fp32. Without one all rows are trained.

    Args:
        model: Adapted; embedding and head are taken apart in place.
        tokens: As `Vocabulary.fresh` gives them; there may be none.

    Raises:
        ConfigError: The head has a bias, which peft would leave out where the adapter is loaded. Or the
            adapter is on the embedding or the head itself.
    """
    if not isinstance(model, PeftModel) or not tokens:
        return
    causal = causal_model(model)
    embedding: Any = causal.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        what = "names the embedding, whose new rows are trained whole (model.add_tokens)"
        raise ConfigError(Problem("adapter.targets", what, "Leave it out of the targets."))
    head = _linear_head(causal)
    if head is not None and head.bias is not None:
        what = f"{type(causal).__name__}'s head has a bias, which peft leaves out for tokens of an adapter"
        raise ConfigError(Problem("model.add_tokens", what, "Train all weights: leave adapter out."))
    tied = head is not None and head.weight is embedding.weight
    rows = _rows(embedding.weight, tokens)
    causal.set_input_embeddings(GrownEmbedding(embedding, tokens, rows))
    if head is not None:
        own = rows if tied else _rows(head.weight, tokens)
        causal.set_output_embeddings(GrownHead(head, tokens, own))


@torch.no_grad()
def _rows(weight: Any, tokens: Sequence[int]) -> nn.Parameter:
    with gather_params_ctx([weight], modifier_rank=None):
        return nn.Parameter(weight[list(tokens)].float().clone())


def token_rows(
    model: nn.Module, state: Mapping[str, torch.Tensor]
) -> tuple[dict[str, list[int]], dict[str, str]]:
    """What `train_tokens` trains, as peft calls it.

    Returns:
        `trainable_token_indices` of the adapter's config, by module; and of each weight in `state` that
        holds such rows, the name that peft gives it in an adapter's file.
    """
    indices: dict[str, list[int]] = {}
    names: dict[str, str] = {}
    modules = [(n, m) for n, m in model.named_modules() if isinstance(m, GrownEmbedding | GrownHead)]
    seen: set[int] = set()
    # A tied head's rows are the embedding's, which comes first: peft ties them again.
    for path, module in sorted(modules, key=lambda item: isinstance(item[1], GrownHead)):
        if id(module.new.weight) not in seen and f"{path}.new.weight" in state:
            seen.add(id(module.new.weight))
            indices[path.removeprefix("base_model.model.")] = module.tokens.tolist()
            names[f"{path}.new.weight"] = f"{path}.token_adapter.trainable_tokens_delta"
    return indices, names
