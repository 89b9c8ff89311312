"""What a model can be trusted with, decided by trying it and not by its name.

Two questions: may documents be packed into one row, and is the head a plain matrix. Both are answered
by comparing numbers on a few tokens, so a family that transformers adds tomorrow falls into the safe
path (padded rows, the model's own head) by itself.

The trial runs on the model itself where that is exact (fp32, all weights here), and otherwise on a
small fp32 model of the same architecture (`surrogate.py`): isolation is a matter of structure, not of
weights, and bf16 rounding or weights partitioned by ZeRO-3 would only blur or prevent the trial.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from burnish.config.layout import OWN_ATTENTION
from burnish.config.schema import Config
from burnish.errors import ConfigError, MachineError, Problem
from burnish.model.anatomy import body_of, causal_model, head_of
from burnish.model.document_attention import ATTENTION_NAME, document_mask, register_attention
from burnish.model.last_layer import verify_last_layer
from burnish.model.positions import require_positions, rope_mixes
from burnish.model.prefix_attention import prefix_mask, prefix_numbers
from burnish.model.surrogate import REFUSALS, build_surrogate
from burnish.model.vision import has_vision
from burnish.model.windows_asked import windows_disagree
from burnish.plan import unsuited

log = logging.getLogger("burnish")

PROBE_LENGTHS = (7, 6)
"""Tokens of the two documents of a trial."""


@dataclass(frozen=True)
class Capability:
    """How a model is to be fed, and why."""

    packed: bool
    """Documents may lie end to end in one row."""
    attention: str
    """The attention implementation, as transformers calls it (`burnish` is ours)."""
    reason: str
    """Why it is not packed, or what was checked; for the plan and for people."""
    fused_head: bool = False
    """The head is one matrix, and `head_shape` says right what becomes of its output."""
    unshared: str | None = "documents are not packed"
    """Why documents may not share the computation of what they begin with; None where they may."""
    whole_last_layer: str | None = "the last layer was not tried"
    """Why the last layer is computed whole; None where supervised rows are enough (`last_layer.py`)."""


def asked(config: Config) -> tuple[str, int, str, bool]:
    """What a config says to `can_isolate`, in its order."""
    alone = config.batch.micro_examples == 1
    return config.model.attention, config.data.max_tokens, config.data.packing, alone


def can_isolate(
    model: nn.Module,
    choice: str = "auto",
    max_tokens: int | None = None,
    packing: str = "auto",
    alone: bool = False,
) -> Capability:
    """Find out how a model is to be fed, and set its attention accordingly.

    Args:
        model: A causal language model with its weights (or ZeRO-3's shards), adapted or not.
        choice: `model.attention` of the config.
        max_tokens: Tokens of the longest document; None if that is not known.
        packing: `data.packing` of the config.
        alone: Every padded micro-batch holds one document.

    Raises:
        ConfigError: The model's tokens see the tokens after them: it is no causal language model. Or
            documents may be longer than its learned positions, or so long that they change how others
            beside them are numbered. Or packing is `on`, and the model cannot keep packed documents apart.
            Or it cannot take the attention that is asked for.
        MachineError: The package for that attention is not installed.
    """
    causal = causal_model(model)
    register_attention()
    subject = _subject(causal)
    if subject is None:
        attention, reason = "eager", f"a small {type(causal).__name__} could not be built to try packing"
        capability = Capability(False, attention, reason)
    else:
        with _quiet(subject):
            capability = _try_out(subject, choice, max_tokens, packing, alone)
            if capability.fused_head:
                capability = replace(capability, whole_last_layer=verify_last_layer(subject))
    log.debug("the last layer at supervised rows only: %s", capability.whole_last_layer or "yes")
    if has_vision(causal) and not capability.fused_head:
        what = f"{type(causal).__name__}'s language model alone gives other logits than the whole model"
        raise ConfigError(
            Problem("model.path", what, "Give a checkpoint of the language model without vision.")
        )
    if packing == "on" and not capability.packed:
        raise ConfigError(
            Problem(
                "data.packing", f"is on, but {capability.reason}", "Set it to auto: rows are then padded."
            )
        )
    _use_attention(causal, capability.attention)
    return capability


def _use_attention(model: PreTrainedModel, attention: str) -> None:
    """Have transformers compute attention so; what it refuses was asked for by name.

    Raises:
        ConfigError: The model, or the device, cannot.
        MachineError: The package for it is not installed.
    """
    try:
        model.set_attn_implementation(attention)
    except (ImportError, ValueError) as error:
        what = f"{type(model).__name__} cannot take {attention} here: {str(error).strip().splitlines()[0]}"
        kind = MachineError if isinstance(error, ImportError) else ConfigError
        raise kind(Problem("model.attention", what, "Leave it at auto.")) from error


def _subject(model: PreTrainedModel) -> PreTrainedModel | None:
    """On which model the trial is to run; None where there is none."""
    # ZeRO-3 leaves empty ones; a model that is only foreseen has none in memory.
    whole = all(p.numel() > 0 and not p.is_meta for p in model.parameters())
    exact = whole and all(p.dtype == torch.float32 for p in model.parameters())
    if exact:
        return model
    return build_surrogate(model) or (model if whole else None)


def _try_out(
    model: PreTrainedModel, choice: str, max_tokens: int | None, packing: str, alone: bool
) -> Capability:
    _require_causal(model)
    require_positions(model, max_tokens, alone)
    fused = verify_head(model)
    padded = _padded_attention(model, choice)
    if packing == "off":
        return Capability(False, padded, "data.packing is off", fused)
    if choice not in OWN_ATTENTION:
        return Capability(False, padded, f"packing is not offered with attention: {choice}", fused)
    problem = rope_mixes(model, max_tokens) or verify_isolation(model, max_tokens)
    if problem is not None:
        return Capability(False, padded, problem, fused)
    unshared = unsuited(model.config.to_dict(), max_tokens) or verify_sharing(model)
    return Capability(True, ATTENTION_NAME, "packed documents equal documents alone", fused, unshared)


def _require_causal(model: PreTrainedModel) -> None:
    """Encoders (BERT and its kin) load as causal language models too, and would learn by looking ahead."""
    model.set_attn_implementation("eager")
    tokens = _probe_tokens(model)[0][None].to(model.device)
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % model.config.get_text_config(decoder=True).vocab_size
    before, after = (model(input_ids=t, use_cache=False).logits[0, :-1] for t in (tokens, changed))
    if not _close(before, after):
        raise ConfigError(
            Problem(
                "model.path",
                f"{type(model).__name__} ({model.config.model_type}) is not causal: tokens see later ones",
                "Burnish trains causal language models; an encoder may need is_decoder in its config.json.",
            )
        )


def _padded_attention(model: PreTrainedModel, choice: str) -> str:
    """transformers' attention for padded rows: as asked for, else SDPA where it gives what the
    written-out attention gives (it ignores Gemma 2's soft-capping, for one)."""
    if choice not in OWN_ATTENTION:
        return {"flex": "flex_attention"}.get(choice, choice)
    body = body_of(model)
    if not model._supports_sdpa or body is None:
        return "eager"
    tokens = _probe_tokens(model)[0]
    model.set_attn_implementation("eager")
    eager = _alone(body, tokens)
    model.set_attn_implementation("sdpa")
    return "sdpa" if _close(eager, _alone(body, tokens)) else "eager"


def verify_isolation(model: PreTrainedModel, max_tokens: int | None = None) -> str | None:
    """Compare two packed documents with each alone.

    Args:
        model: The model, in evaluation mode; its attention implementation is changed.
        max_tokens: Tokens of the longest document; None if that is not known.

    Returns:
        None if they are equal and the second does not see the first; otherwise what is wrong.
    """
    name, body = type(model).__name__, body_of(model)
    if body is None:
        return f"{name} has no body apart from its head"
    one, other, two = _probe_tokens(model)
    first = len(one)
    model.set_attn_implementation("eager")
    alone = torch.cat([_alone(body, one), _alone(body, two)])
    model.set_attn_implementation(ATTENTION_NAME)
    if model.config.get_text_config(decoder=True)._attn_implementation != ATTENTION_NAME:
        return f"{name} does not take an attention function"
    try:
        packed = _packed(body, one, two)
        neighbour = _packed(body, other, two)
    except REFUSALS as error:
        return f"{name} cannot be given document boundaries: {error}"
    if not _close(packed[first:], neighbour[first:]):
        return "a document's hidden states change with its neighbour"
    if not _close(packed, alone):
        return "packed documents give other hidden states than documents alone"
    return windows_disagree(model, lambda: _alone(body, one), max_tokens)


def verify_sharing(model: PreTrainedModel) -> str | None:
    """Compare two documents that begin alike, their beginning computed once, with each alone.

    Returns:
        None if they are equal; otherwise what is wrong.
    """
    body = body_of(model)
    assert body is not None  # documents could be packed
    begin, _, end = _probe_tokens(model)
    documents = [torch.cat([begin, end]), torch.cat([begin, end[1:]])]
    num = len(begin)
    row = torch.cat([*documents[:1], documents[1][num:]])
    stops = [num, len(documents[0]), len(row)]
    segments = np.array([[0, *stops[:2]], stops, [len(row), *stops[1:]]], np.int32)
    model.set_attn_implementation("eager")
    alone = [_alone(body, document) for document in documents]
    model.set_attn_implementation(ATTENTION_NAME)
    device = next(body.parameters()).device
    positions = torch.cat([torch.arange(stops[1]), torch.arange(num, len(documents[1]))])
    numbers = torch.from_numpy(prefix_numbers(segments)).to(device)
    try:
        shared = body(
            input_ids=row.to(device)[None],
            position_ids=positions.to(device)[None],
            attention_mask=prefix_mask(numbers, 3, len(documents[0])),
            use_cache=False,
        )[0][0]
    except REFUSALS as error:
        return f"{type(model).__name__} cannot be given shared beginnings: {error}"
    same = _close(shared, torch.cat([alone[0], alone[1][num:]]))
    return None if same else "documents that share a beginning give other hidden states than alone"


def verify_head(model: PreTrainedModel) -> bool:
    """Whether `head_of` gives the logits that the model gives."""
    body, head = body_of(model), head_of(model)
    if body is None or head is None:
        return False
    tokens = _probe_tokens(model)[0][None].to(model.device)
    own = model(input_ids=tokens, use_cache=False).logits
    hidden = body(input_ids=tokens, use_cache=False)[0]
    if hidden.shape[-1] != head.weight.shape[-1]:
        return False
    logits = nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias)
    logits = logits * head.shape.scale
    if head.shape.softcap is not None:
        logits = head.shape.softcap * torch.tanh(logits / head.shape.softcap)
    return own.shape == logits.shape and _close(own, logits)


def _probe_tokens(model: PreTrainedModel) -> list[torch.Tensor]:
    """Two different first documents of one length, and a second one."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    first, second = PROBE_LENGTHS
    return [torch.randint(vocabulary, (n,), generator=generator) for n in (first, first, second)]


def _alone(body: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    # Without positions: the model's own are the truth (RoBERTa's begin at 2, and must not be told 0).
    return body(input_ids=tokens.to(next(body.parameters()).device)[None], use_cache=False)[0][0]


def _packed(body: nn.Module, *documents: torch.Tensor) -> torch.Tensor:
    device = next(body.parameters()).device
    lengths = [len(d) for d in documents]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return body(
        input_ids=torch.cat(documents).to(device)[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths]).to(device)[None],
        attention_mask=document_mask(bounds, max(lengths)),
        use_cache=False,
    )[0][0]


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal up to the rounding of a deep model in this dtype; a leak is far larger."""
    tolerance = 1e-4 if one.dtype == torch.float32 else 5e-2
    gap = (one.float() - other.float()).abs().max()
    return bool(gap <= tolerance * one.float().abs().max())


@contextmanager
def _quiet(model: PreTrainedModel) -> Iterator[Any]:
    """No gradients and no dropout."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
