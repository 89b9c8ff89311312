"""Texts to token ids and weights, every token's place in the text proved.

The tokenizer can say where each token stands (its offsets), but keeping track of that takes a quarter of
its time. Most tokenizers lose nothing of a text: the bytes that their tokens stand for, laid end to end,
are the text, so each token's place is the sum of the lengths before it.

    text     <|user|>Hi é<|end|>
    tokens   |<|user|>|Hi| |0xC3|0xA9|<|end|>|
    ends     8        10 11  12   13      20      bytes

That is checked for every text, byte for byte. A text for which it does not hold (its normaliser changed a
letter, an unknown one became `<unk>`) is tokenised again with offsets. Both ways give the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from operator import itemgetter
from typing import final

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64
from tokenizers import Tokenizer, pre_tokenizers

from burnish.data.weights import token_weights

Weighted = tuple[Int32[np.ndarray, " tokens"], Float32[np.ndarray, " tokens"]]
Span = tuple[int, int, float]
"""(start, end, weight) in characters; later ones win."""

_NO_BYTES = b"\xff"
"""For tokens of which nobody knows what they stand for: a byte that UTF-8 never has."""
_PROBE = b"a b"
_GIVE_UP_TEXTS = 64
_GIVE_UP_SHARE = 0.25
"""Where so many texts, and this share of all, had no proof, the next get offsets right away."""


@final
class TextTokenizer:
    """Tokenises whole texts, and gives each token the weight of the characters it holds.

    Args:
        backend: A tokenizer that adds no special tokens and neither cuts nor pads; not changed.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._num_texts = 0
        self._num_unproved = 0

    def encode(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[Weighted]:
        """Token ids and weights of each text.

        Args:
            texts: Valid Unicode, no lone surrogates.
            spans: Of each text, which characters have a weight other than 0.
        """
        if self._pieces is None or self._num_unproved > max(_GIVE_UP_TEXTS, _GIVE_UP_SHARE * self._num_texts):
            return self._by_offsets(texts, spans)
        pieces = self._pieces
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        found = [
            _weighted(pieces, e.ids, text, own) for e, text, own in zip(encodings, texts, spans, strict=True)
        ]
        unproved = [i for i, weighted in enumerate(found) if weighted is None]
        again = self._by_offsets([texts[i] for i in unproved], [spans[i] for i in unproved])
        for i, weighted in zip(unproved, again, strict=True):
            found[i] = weighted
        self._num_texts += len(texts)
        self._num_unproved += len(unproved)
        return [weighted for weighted in found if weighted is not None]

    def _by_offsets(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[Weighted]:
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False) if texts else []
        return [
            (np.array(e.ids, np.int32), token_weights(e, own))
            for e, own in zip(encodings, spans, strict=True)
        ]

    @cached_property
    def _pieces(self) -> Pieces | None:
        """What tokens stand for, spelled as this tokenizer spells it; None if it is some other way."""
        ids = self._backend.encode_batch_fast([_PROBE.decode()], add_special_tokens=False)[0].ids
        for spelled in (_sentencepiece_bytes, _byte_level_bytes):
            pieces = Pieces(self._backend, spelled(self._backend.get_vocab(with_added_tokens=False)))
            if pieces.joined(ids).lstrip() == _PROBE:
                return pieces
        return None


@final
class Pieces:
    """The bytes of every token.

    Args:
        backend: Its added tokens stand for themselves.
        spelled: The other tokens' bytes, by id.
    """

    def __init__(self, backend: Tokenizer, spelled: Mapping[int, bytes]) -> None:
        added = backend.get_added_tokens_decoder()
        size = max((*added, *spelled), default=-1) + 1
        known = {**spelled, **{i: token.content.encode() for i, token in added.items()}}
        self._bytes = [known.get(i) or _NO_BYTES for i in range(size)]
        self._lengths: Int64[np.ndarray, " vocabulary"] = np.array([len(b) for b in self._bytes], np.int64)
        self._is_added: Bool[np.ndarray, " vocabulary"] = np.zeros(size, np.bool_)
        self._is_added[list(added)] = True
        self._is_spaced: Bool[np.ndarray, " vocabulary"] = np.array(
            [len(b) > 1 and b[:1] == b" " for b in self._bytes], np.bool_
        )

    def joined(self, ids: Sequence[int]) -> bytes:
        """The bytes of these tokens, end to end."""
        return b"".join(self._bytes[i] for i in ids)

    def place(
        self, ids: Sequence[int], text: bytes
    ) -> tuple[Int32[np.ndarray, " tokens"], Int64[np.ndarray, " tokens"]] | None:
        """The ids, and where each token ends in the text, in bytes; None unless their bytes are the text."""
        numbers = np.fromiter(ids, np.int32, len(ids))
        ends = self._lengths.take(numbers).cumsum()
        parts: Sequence[bytes] = (
            itemgetter(*ids)(self._bytes) if len(ids) > 1 else [self._bytes[i] for i in ids]
        )
        surplus = int(ends[-1]) - len(text) if ids else 0
        if surplus:
            invented = self._invented_spaces(numbers, surplus)
            if invented is None:
                return None
            parts = [part[1:] if i in invented else part for i, part in enumerate(parts)]
            ends = np.cumsum([len(part) for part in parts])
        return (numbers, ends) if b"".join(parts) == text else None

    def _invented_spaces(self, ids: Int32[np.ndarray, " tokens"], surplus: int) -> frozenset[int] | None:
        """Tokens with a space in front that is not in the text: SentencePiece puts one before the whole
        text, older tokenizers before what follows an added token too.

        A space that is a token of its own is left to the tokenizer's offsets.
        """
        starts = np.ones(len(ids), np.bool_)
        starts[1:] = self._is_added[ids[:-1]]
        spaced = np.flatnonzero(starts & self._is_spaced[ids] & ~self._is_added[ids])
        if surplus == len(spaced):
            return frozenset(spaced.tolist())
        return frozenset({0}) if surplus == 1 and 0 in spaced else None


def _weighted(pieces: Pieces, ids: Sequence[int], text: str, spans: Sequence[Span]) -> Weighted | None:
    raw = text.encode()
    placed = pieces.place(ids, raw)
    if placed is None:
        return None
    numbers, ends = placed
    weights = np.zeros(len(ids), np.float32)
    is_ascii = len(raw) == len(text)
    for first, stop, weight in spans:
        if first >= stop:
            continue
        start = first if is_ascii else len(text[:first].encode())
        end = stop if is_ascii else len(text[:stop].encode())
        # A token holds a byte of [start, end) if it ends behind start and the one before it ends before end.
        weights[ends.searchsorted(start, "right") : ends.searchsorted(end, "left") + 1] = weight
    return numbers, weights


def _sentencepiece_bytes(vocabulary: Mapping[str, int]) -> dict[int, bytes]:
    """`▁` is a space, `<0x0A>` a byte."""
    found = {i: piece.replace("▁", " ").encode() for piece, i in vocabulary.items()}
    for byte in range(256):
        i = vocabulary.get(f"<0x{byte:02X}>")
        if i is not None:
            found[i] = bytes([byte])
    return found


def _byte_level_bytes(vocabulary: Mapping[str, int]) -> dict[int, bytes]:
    """Every byte is a letter: the printable ones of Latin-1 are themselves, the others U+0100 and up."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    itself = [ord(letter) for letter in letters if ord(letter) < 256]
    others = [byte for byte in range(256) if byte not in itself]
    to_byte = {**{b: b for b in itself}, **{256 + n: byte for n, byte in enumerate(others)}}
    found = {}
    for piece, i in vocabulary.items():
        byte_values = [to_byte.get(ord(letter), -1) for letter in piece]
        if -1 not in byte_values:
            found[i] = bytes(byte_values)
    return found
