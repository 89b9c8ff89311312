"""How far a model's positions reach, and whether they depend on what else is in a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from burnish.errors import ConfigError, Problem

_PROBE_TOKENS = 5
_LOOKED_UP = (nn.functional.embedding, torch.Tensor.__getitem__, torch.Tensor.index_select)


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

    Found by watching: a table of the model whose rows 0, 1, 2 ... (or with an offset, as OPT has) are looked
    up for a document's tokens is one of positions. Its last row is the last token's.
    """
    watch = _Watch(model)
    # The same token over and over: no table of tokens can be taken for one of positions.
    tokens = torch.ones(1, _PROBE_TOKENS, dtype=torch.int64, device=model.device)
    with torch.no_grad(), watch:
        model(input_ids=tokens, use_cache=False)
    return min(watch.limits, default=None)


@final
class _Watch(TorchFunctionMode):
    """Notes, while entered, how many rows a table of positions has from its first token's on."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._learned = {p.data_ptr() for p in model.parameters() if p.dim() == 2}
        # Of computed tables, these are never made longer: CodeGen's, indexed, and GPT-J's, gathered from.
        computed = [b for b in model.buffers() if b.dim() == 2]
        self._computed = {b.data_ptr() for b in computed}
        self._heights = {b.shape[0] for b in computed}
        self.limits: list[int] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        tensors = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)]
        if func in _LOOKED_UP and len(tensors) > 1:
            fixed = self._learned | (self._computed if func is torch.Tensor.__getitem__ else set())
            for table in tensors:
                if table.data_ptr() in fixed:
                    self._note(table.shape[0], tensors)
        elif func is torch.gather and tensors[0].dim() == 3 and tensors[0].shape[1] in self._heights:
            self._note(tensors[0].shape[1], [tensors[1][0, :, 0]])
        return func(*args, **(kwargs or {}))

    def _note(self, height: int, tensors: Sequence[torch.Tensor]) -> None:
        for rows in tensors:
            if rows.dtype in (torch.int32, torch.int64) and rows.numel() == _PROBE_TOKENS:
                found = rows.flatten().tolist()
                if found == list(range(found[0], found[0] + _PROBE_TOKENS)):
                    self.limits.append(height - found[0])


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
