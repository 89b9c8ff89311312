"""Which tokens hold the characters that the model has to write, and with what weight.

text      <|assistant|>Hello!<|end|>\n        span (13, 26, 1.0)
tokens    |<|assistant|>|Hello|!|<|end|>|\n|
weights    0             1     1 1       0
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32
from tokenizers import Encoding


def token_weights(
    encoding: Encoding, spans: Sequence[tuple[int, int, float]]
) -> Float32[np.ndarray, " tokens"]:
    """The weight of each token: that of the last span that it shares a character with, else 0.

    Args:
        encoding: Of the whole text.
        spans: (start, end, weight) in characters of the text; later ones win.
    """
    weights = np.zeros(len(encoding), np.float32)
    for start, end, weight in spans:
        bounds = _tokens_of(encoding, start, end)
        if bounds is None:
            return weights_by_offsets(encoding.offsets, spans)
        weights[bounds[0] : bounds[1]] = weight
    return weights


def _tokens_of(encoding: Encoding, start: int, end: int) -> tuple[int, int] | None:
    """Tokens [first, stop) that hold characters [start, end); None where a border has no token.

    Two look-ups in the tokenizer instead of every token's offsets as Python objects, which take a tenth
    of all the time of preparing a row.
    """
    if start >= end:
        return 0, 0
    first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
    if first is None or last is None:
        return None
    stop = last + 1
    while stop < len(encoding):  # a character of several tokens, as byte fall-back makes them
        inside = encoding.token_to_chars(stop)
        if inside is None or inside[0] >= end:
            break
        stop += 1
    return first, stop


def weights_by_offsets(
    offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int, float]]
) -> Float32[np.ndarray, " tokens"]:
    """The same by looking at every token: right for any tokenizer, slower."""
    bounds = np.array(offsets, np.int64).reshape(-1, 2)
    starts, ends = bounds[:, 0], bounds[:, 1]
    weights = np.zeros(len(bounds), np.float32)
    for start, end, weight in spans:
        if start < end:  # an empty span shares no character with a token, even inside one
            weights[(ends > start) & (starts < end)] = weight
    return weights
