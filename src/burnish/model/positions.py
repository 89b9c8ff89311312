"""How far a model's positions reach, and whether they depend on what else is in a row."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from burnish.errors import ConfigError, Problem

_PROBE_TOKENS = 5


def require_positions(model: PreTrainedModel, max_tokens: int | None, alone: bool = False) -> None:
    """Refuse documents that are longer than a model has positions of their own for.

    Rotary, ALiBi and recurrent models have no end; a table of learned positions has one. And where positions
    are scaled by the longest document of a micro-batch, others must not be beside it.

    Args:
        model: In evaluation mode, its positions as in the real model.
        max_tokens: Tokens of the longest document; None if that is not known.
        alone: Every micro-batch holds one document.

    Raises:
        ConfigError: Documents may be longer than that.
    """
    if max_tokens is None:
        return
    limit = position_limit(model)
    if limit is not None and max_tokens > limit:
        what = f"is {max_tokens}, but {type(model).__name__} knows {limit} positions and none beyond"
        raise ConfigError(Problem("data.max_tokens", what, f"Set it to {limit} or less."))
    mixing = rope_mixes(model, max_tokens)
    if mixing is not None and not alone:
        cure = "Set data.max_tokens to that, or batch.micro_examples to 1, so that each document is alone."
        raise ConfigError(Problem("data.max_tokens", f"is {max_tokens}, but in this model {mixing}", cure))


def position_limit(model: PreTrainedModel) -> int | None:
    """Tokens of the longest document that the model has positions for; None where there is no end.

    Found by watching: a table whose rows 0, 1, 2 ... (or with an offset, as OPT has) are looked up for a
    document's tokens is one of positions. Its last row is the last token's.
    """
    found: list[int] = []

    def watch(module: nn.Module, inputs: tuple[object, ...], _output: object) -> None:
        assert isinstance(module, nn.Embedding)
        offset = _offset(inputs)
        if offset is not None:
            found.append(module.num_embeddings - offset)

    # The same token over and over: no table of tokens can be taken for one of positions.
    tokens = torch.ones(1, _PROBE_TOKENS, dtype=torch.int64, device=model.device)
    hooks = [m.register_forward_hook(watch) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return min(found, default=None)


def _offset(inputs: tuple[object, ...]) -> int | None:
    """The first of the consecutive rows that are looked up; None if they are others."""
    rows = next((x for x in inputs if isinstance(x, torch.Tensor) and x.dtype == torch.int64), None)
    if rows is None or rows.numel() != _PROBE_TOKENS:
        return None
    rows = rows.reshape(-1)
    first = int(rows[0])
    expected = torch.arange(first, first + _PROBE_TOKENS, device=rows.device)
    return first if torch.equal(rows, expected) else None


def rope_mixes(model: PreTrainedModel, max_tokens: int | None) -> str | None:
    """Rotations that are chosen by the longest document of a row (dynamic NTK, LongRoPE) are another
    one's business too, as soon as one is longer than the context the model was first trained with.

    Args:
        model: Its config is read.
        max_tokens: Tokens of the longest document; None if that is not known.

    Returns:
        None where a document's positions are its own; otherwise what is wrong.
    """
    text = model.config.get_text_config(decoder=True).to_dict()
    rope = text.get("rope_parameters") or {}
    kinds = {str(r.get("rope_type")) for r in (rope, *rope.values()) if isinstance(r, dict)}
    if not kinds & {"dynamic", "longrope"}:
        return None
    limit = rope.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
    limit = limit or text.get("max_position_embeddings")
    if max_tokens is not None and limit is not None and max_tokens <= limit:
        return None
    return f"positions are scaled by the longest document of a micro-batch beyond {limit} tokens"
