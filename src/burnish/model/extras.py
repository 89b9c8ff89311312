"""What training may do besides the plain loss: noise on the embeddings, and balancing a mixture's experts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float32, Int64
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from burnish.errors import ConfigError, Problem


@contextlib.contextmanager
def noisy_embeddings(
    model: PreTrainedModel, alpha: float, lengths: Float32[torch.Tensor, "rows columns"]
) -> Iterator[None]:
    """While entered, token embeddings come with noise: NEFTune (Jain et al., 2023).

    Noise is uniform in -1 to 1, times `alpha / sqrt(tokens * width)`, so that its length does not depend on
    either. Tokens are those of the document, not of the packed row or with its padding: how documents
    are laid out changes nothing.

    Args:
        model: Has the embeddings.
        alpha: Size of the noise.
        lengths: For each position, the length of its document.
    """

    def add_noise(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        scale = (alpha / (lengths * output.shape[-1]).sqrt())[..., None]
        return output + (torch.empty_like(output).uniform_(-1, 1) * scale.to(output.dtype))

    hook = model.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class Balance:
    """How a mixture's experts are balanced."""

    factor: float
    experts_per_token: int

    @staticmethod
    def of(model: PreTrainedModel, factor: float | Literal["auto"]) -> Balance | None:
        """What the config asks of this model; None where nothing is.

        Raises:
            ConfigError: The model has no experts to balance.
        """
        if factor == 0:
            return None
        text = model.config.get_text_config(decoder=True).to_dict()
        chosen = text.get("num_experts_per_tok") or text.get("moe_k")
        own = text.get("router_aux_loss_coef")
        if own is None or not chosen:
            kind = text.get("model_type", type(model).__name__)
            what = f"is {factor}, but a {kind} model has no balancing loss"
            raise ConfigError(Problem("train.router_aux_loss", what, "Leave it out."))
        return Balance(float(own if factor == "auto" else factor), int(chosen))


def balancing_loss(
    router_logits: Sequence[Float[torch.Tensor, "*tokens experts"]],
    documents: Int64[torch.Tensor, " tokens"],
    counted: Float32[torch.Tensor, " tokens"],
    document_weights: Float32[torch.Tensor, " documents"],
    experts_per_token: int,
) -> Float32[torch.Tensor, ""]:
    """`sum_d(weight_d * balance_d)` over documents.

    For one document, `balance = experts * sum_e(share_e * probability_e)`: the share of tokens sent to an
    expert (over all layers, each of its `experts_per_token` counted) times its mean probability, as in
    Switch Transformers (Fedus et al., 2021, equations 4 to 6) and in transformers' own loss.

    The product of two means is not additive, so a batch's balance depends on what else is in the batch. Taken
    for each document alone (as DeepSeek-V2's sequence-wise loss is) it does not: any cut of a
    window gives the same sum, and a document's part equals what its model gives for it alone.

    Args:
        router_logits: Of each layer with experts.
        documents: To which document a token belongs.
        counted: 1 for a token, 0 for padding.
        document_weights: Weight of each document, the sum of its targets'.
        experts_per_token: How many experts a token is sent to.
    """
    num_documents, num_experts = len(document_weights), router_logits[0].shape[-1]
    sent = counted.new_zeros(num_documents, num_experts)
    probability = counted.new_zeros(num_documents, num_experts)
    for logits in router_logits:
        shares = functional.softmax(logits.reshape(-1, num_experts).float(), dim=-1)
        chosen = torch.zeros_like(shares).scatter_(1, shares.topk(experts_per_token, dim=-1).indices, 1.0)
        sent = sent.index_add(0, documents, chosen * counted[:, None])
        probability = probability.index_add(0, documents, shares * counted[:, None])
    tokens = counted.new_zeros(num_documents).index_add(0, documents, counted) * len(router_logits)
    balance = num_experts * (sent * probability).sum(-1) / tokens.clamp(min=1).square()
    return (balance * document_weights).sum()
