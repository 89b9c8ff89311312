"""Documents with multi-turn masks, and micro-batches of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from breadth.families import VOCABULARY
from burnish.records import NO_TARGET, MicroBatch

LENGTHS = (9, 17, 12, 5)
Documents = Sequence[tuple[np.ndarray, np.ndarray]]


def make_documents(seed: int = 0, lengths: Sequence[int] = LENGTHS) -> Documents:
    """Tokens, and their weights as targets: two turns each, the second of half weight."""
    generator = np.random.default_rng(seed)
    documents = []
    for length in lengths:
        weights = np.zeros(length, np.float32)
        weights[length // 4 : length // 2] = 1.0
        weights[-2:] = 0.5
        documents.append((generator.integers(3, VOCABULARY, length), weights))
    return documents


def collate(documents: Documents, packed: bool) -> MicroBatch:
    """One micro-batch, written out by hand: the test of data/collate.py is elsewhere."""
    lengths = [len(tokens) for tokens, _ in documents]
    shape = (1, sum(lengths)) if packed else (len(lengths), max(lengths))
    token_ids, position_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    targets, loss_weights = np.full(shape, NO_TARGET, np.int64), np.zeros(shape, np.float32)
    start = 0
    for row, (tokens, weights) in enumerate(documents):
        length = len(tokens)
        place = (0, slice(start, start + length)) if packed else (row, slice(0, length))
        token_ids[place], position_ids[place] = tokens, np.arange(length)
        shifted = np.append(weights[1:], 0).astype(np.float32)
        loss_weights[place] = shifted
        targets[place] = np.where(shifted > 0, np.append(tokens[1:], 0), NO_TARGET)
        start += length
    return MicroBatch(
        token_ids=token_ids,
        position_ids=position_ids,
        targets=targets,
        weights=loss_weights,
        document_lengths=np.asarray(lengths, np.int32),
        example_ids=np.arange(len(lengths), dtype=np.int64),
        packed=packed,
    )


def total_weight(documents: Documents) -> float:
    """Of all targets: the first token is none."""
    return float(sum(weights[1:].sum() for _, weights in documents))
