"""Examples that fit into `data.max_tokens`: cut, or split at turns, and every lost token counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32, Int32

from burnish.data.problems import RowProblem
from burnish.records import Conversation, Example


@dataclass(frozen=True)
class Encoded:
    """What became of one conversation, or of one part of it where it was split."""

    index: int
    """Which conversation of the call it is from."""
    example: Example | None
    problem: RowProblem | None
    """Why there is no example; exactly one of the two is None."""
    warnings: tuple[str, ...] = ()
    num_tokens_cut: int = 0
    """Tokens lost to `data.max_tokens`: cut off, or all of them where the row is not used."""
    num_supervised_cut: int = 0
    """Those of them that would have been trained on."""
    num_control_tokens_typed: int = 0
    """Control tokens that somebody typed into the texts, whatever became of them."""


def example_of(
    index: int,
    conversation: Conversation,
    ids: Int32[np.ndarray, " tokens"],
    weights: Float32[np.ndarray, " tokens"],
    num_tokens_cut: int = 0,
    num_supervised_cut: int = 0,
) -> Encoded:
    """The tokens as an example that came through."""
    example = Example(conversation.source, conversation.row, ids, weights)
    return Encoded(index, example, None, num_tokens_cut=num_tokens_cut, num_supervised_cut=num_supervised_cut)


def truncated(
    index: int,
    conversation: Conversation,
    ids: Int32[np.ndarray, " tokens"],
    weights: Float32[np.ndarray, " tokens"],
    limit: int,
) -> Encoded:
    """Cut from the end, behind the last token that is trained on within the limit.

    What follows that token, a user's next turn or half a header, would be read and not learned from.
    A cut answer ends where the limit falls: no end of turn is invented.
    """
    supervised = num_supervised(weights)
    kept = np.flatnonzero(weights[1:limit] > 0)
    if not len(kept):
        what = f"the first token to learn comes after {limit} tokens (data.max_tokens)"
        return Encoded(index, None, RowProblem("prompt_too_long", what), (), len(ids), supervised)
    end = int(kept[-1]) + 2
    return example_of(
        index,
        conversation,
        ids[:end],
        weights[:end],
        len(ids) - end,
        supervised - num_supervised(weights[:end]),
    )


def token_pieces(
    index: int,
    conversation: Conversation,
    ids: Int32[np.ndarray, " tokens"],
    weights: Float32[np.ndarray, " tokens"],
    limit: int,
) -> list[Encoded]:
    """Text or ready-made tokens as pieces of at most `limit` tokens; pieces with nothing to learn are lost.

        tokens     a b c d e f g h      limit 4
        piece 0    a b c d              the first token of all has nothing to be predicted from
        piece 1          d e f g        d again, as context: it has been learned, and e is now a target
        piece 2                g h

    So every target of the whole is a target of exactly one piece.
    """
    parts: list[Encoded] = []
    kept = np.zeros(len(ids), bool)
    for start in range(0, len(ids) - 1, max(limit - 1, 1)):
        piece = slice(start, start + limit)
        own = weights[piece].copy()
        if start:
            own[0] = 0.0
        if num_supervised(own):
            parts.append(example_of(index, conversation, ids[piece], own))
            kept[piece] = True
    lost = len(ids) - int(kept.sum())
    return [replace(parts[0], num_tokens_cut=lost), *parts[1:]] if parts else []


def halves(conversation: Conversation, train_on: str) -> tuple[Conversation, Conversation] | None:
    """The conversation cut before the user's turn that is nearest to its middle; None if it has only one
    exchange. The system turns in front go with both halves."""
    messages = list(conversation.messages or ())
    num_lead = next((i for i, m in enumerate(messages) if m.role not in ("system", "developer")), 0)
    cuts = [i for i, m in enumerate(messages) if m.role == "user" and i > num_lead]
    if not cuts or train_on == "last_assistant":
        return None
    sizes = np.cumsum([len(str(m.content)) + len(str(dict(m.extra))) for m in messages])
    cut = min(cuts, key=lambda i: abs(int(sizes[i - 1]) * 2 - int(sizes[-1])))
    lead = messages[:num_lead]
    return replace(conversation, messages=messages[:cut]), replace(
        conversation, messages=lead + messages[cut:]
    )


def without_idle(parts: Sequence[Encoded]) -> list[Encoded]:
    """Parts of one conversation less those with nothing to learn, whose tokens are lost with the first one
    left: the row is used, and is not to count as dropped because its first turns were only to be read."""
    is_idle = [part.problem is not None and part.problem.rule == "no_supervised_tokens" for part in parts]
    lost = sum(part.num_tokens_cut for part, idle in zip(parts, is_idle, strict=True) if idle)
    kept = [part for part, idle in zip(parts, is_idle, strict=True) if not idle]
    return (
        [replace(kept[0], num_tokens_cut=kept[0].num_tokens_cut + lost), *kept[1:]] if kept else list(parts)
    )


def num_supervised(weights: Float32[np.ndarray, " tokens"]) -> int:
    """Targets; the first token never is one."""
    return int(np.count_nonzero(weights[1:] > 0))
