"""Examples to a micro-batch: the one place where tokens are shifted into targets.

token_ids        a  b  c  d | e  f  g          two documents, packed end to end
weights as read  0  0  1  1 | 0  1  1          of the token itself
position_ids     0  1  2  3 | 0  1  2
targets          -  c  d  - | f  g  -          position i has to produce token i+1 ...
weights          0  1  1  0 | 1  1  0          ... with the weight of token i+1

Where documents share their beginnings, a b c d and a b e are laid out as a b | c d | e: b has two targets,
c and e, and a's target b has the weights of both documents.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int64

from burnish.data.prefix_tree import PrefixTree, grow, sort_by_tokens
from burnish.records import NO_TARGET, Example, MicroBatch, SharedRow


def collate(
    examples: Sequence[Example],
    example_ids: Sequence[int] | np.ndarray,
    packed: bool,
    pad_token_id: int,
    share_prefixes: bool = False,
) -> MicroBatch:
    """Lay examples out for one forward, with targets and their weights.

    Args:
        examples: The documents of one micro-batch, in order; none gives the stand-in document.
        example_ids: Their numbers, as long as `examples`.
        packed: One row with the documents end to end, or else one row per document.
        pad_token_id: Fills the rest of a padded row, and is the stand-in's only token.
        share_prefixes: Lay tokens that documents of a packed row begin with out once.

    Returns:
        Shapes as in `MicroBatch`. A position has a target when the next token of the same
        document has a positive weight; the last token of a document never has one.

    Raises:
        ValueError: Numbers and examples differ in length, or an example has no tokens.
    """
    if len(examples) != len(example_ids):
        raise ValueError(f"{len(examples)} examples but {len(example_ids)} example numbers")
    if not examples:
        return _stand_in(packed, pad_token_id)
    lengths = np.fromiter((len(e.token_ids) for e in examples), np.int32, len(examples))
    if lengths.min() < 1:
        raise ValueError(f"example {examples[int(lengths.argmin())].row} has no tokens")
    if packed and share_prefixes:
        order, common = sort_by_tokens([e.token_ids for e in examples])
        tree = grow(lengths[order].tolist(), common.tolist())
        if tree.is_shared:
            return _share([examples[i] for i in order], np.asarray(example_ids, np.int64)[order], tree)

    tokens = np.concatenate([e.token_ids for e in examples]).astype(np.int64)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    positions = np.arange(len(tokens)) - np.repeat(starts, lengths)
    targets, weights = _shift(tokens, np.concatenate([e.weights for e in examples]), starts)

    if packed:
        rows = tuple(flat[None, :] for flat in (tokens, positions, targets, weights))
    else:
        shape = (len(examples), int(lengths.max()))
        where = np.repeat(np.arange(len(examples)), lengths), positions
        # Positions go on over the padding: it is masked out, and any value would do.
        grid_positions = np.broadcast_to(np.arange(shape[1]), shape).copy()
        rows = (
            _scatter(tokens, where, shape, pad_token_id),
            grid_positions,
            _scatter(targets, where, shape, NO_TARGET),
            _scatter(weights, where, shape, 0),
        )
    return MicroBatch(
        token_ids=rows[0],
        position_ids=rows[1],
        targets=rows[2],
        weights=rows[3],
        document_lengths=lengths,
        example_ids=np.asarray(example_ids, dtype=np.int64),
        packed=packed,
    )


def _shift(
    tokens: Int64[np.ndarray, " tokens"],
    weights: Float32[np.ndarray, " tokens"],
    starts: Int64[np.ndarray, " documents"],
) -> tuple[Int64[np.ndarray, " tokens"], Float32[np.ndarray, " tokens"]]:
    """Move every token and its weight one position to the left, never across documents."""
    next_weights = np.zeros(len(tokens), np.float32)
    next_weights[:-1] = weights[1:]
    # What stands left of a document's first token is the end of the document before.
    next_weights[starts[1:] - 1] = 0
    has_target = next_weights > 0
    next_weights[~has_target] = 0
    targets = np.full(len(tokens), NO_TARGET, np.int64)
    targets[:-1] = np.where(has_target[:-1], tokens[1:], NO_TARGET)
    return targets, next_weights


def _share(
    examples: Sequence[Example], example_ids: Int64[np.ndarray, " documents"], tree: PrefixTree
) -> MicroBatch:
    """One row for documents in the order of their tree, and every target once for each column."""
    pieces = zip(tree.document.tolist(), tree.first.tolist(), tree.size.tolist(), strict=True)
    tokens = np.concatenate([examples[d].token_ids[first : first + size] for d, first, size in pieces])
    positions = np.concatenate(
        [np.arange(a, a + n) for a, n in zip(tree.first.tolist(), tree.size.tolist(), strict=True)]
    )
    columns, targets, weights = [], [], []
    for document, example in enumerate(examples):
        trained = np.flatnonzero(example.trained)
        columns.append(tree.columns(document)[trained - 1])
        targets.append(example.token_ids[trained].astype(np.int64))
        weights.append(example.weights[trained])
    pairs = np.stack([np.concatenate(columns), np.concatenate(targets)])
    unique, which = np.unique(pairs, axis=1, return_inverse=True)
    summed = np.bincount(which.reshape(-1), np.concatenate(weights), minlength=unique.shape[1])
    begins = tree.begins()
    return MicroBatch(
        token_ids=tokens.astype(np.int64)[None],
        position_ids=positions[None],
        targets=np.full((1, len(tokens)), NO_TARGET, np.int64),
        weights=np.zeros((1, len(tokens)), np.float32),
        document_lengths=np.array([len(e.token_ids) for e in examples], np.int32),
        example_ids=example_ids,
        packed=True,
        shared=SharedRow(
            segments=np.stack([begins, begins + tree.size, tree.ends()]).astype(np.int32),
            columns=unique[0],
            targets=unique[1],
            weights=summed.astype(np.float32),
        ),
    )


def _scatter(
    flat: np.ndarray, where: tuple[np.ndarray, np.ndarray], shape: tuple[int, int], fill: int
) -> np.ndarray:
    grid = np.full(shape, fill, flat.dtype)
    grid[where] = flat
    return grid


def _stand_in(packed: bool, pad_token_id: int) -> MicroBatch:
    """One document of one token and no weight: a forward that adds nothing, for an empty share."""
    return MicroBatch(
        token_ids=np.full((1, 1), pad_token_id, np.int64),
        position_ids=np.zeros((1, 1), np.int64),
        targets=np.full((1, 1), NO_TARGET, np.int64),
        weights=np.zeros((1, 1), np.float32),
        document_lengths=np.ones(1, np.int32),
        example_ids=np.full(1, -1, np.int64),
        packed=packed,
    )
