"""What each token says: a text per token, so that the texts of all of them are the decoded whole.

    bytes    48 65 6c 6c 6f | f0 9f | 99 82 | 21
    texts    "Hello"          "🙂"    ""      "!"       parts {1: "f0 9f", 2: "99 82"}

A character whose bytes are spread over several tokens stands with the first of them; the rest of them
have no text of their own, and `parts` says which bytes each one holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, final

from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""How tokenizers with byte fall-back call the token of a single byte."""


@dataclass(frozen=True)
class TokenTexts:
    """The texts of a sequence of tokens."""

    texts: tuple[str, ...]
    """One per token."""
    parts: dict[int, str]
    """Position of every token that holds only part of a character: its bytes, in hex."""


@final
class TokenReader:
    """Reads tokens one by one, by the pieces of the tokenizer's vocabulary.

    Tokenizers of the byte-level and of the sentencepiece kind are read by their bytes; others (WordPiece)
    by decoding each token behind the one before it.

    Args:
        backend: The Rust tokenizer.
        control_ids: Tokens that are read as they are called.
    """

    def __init__(self, backend: Tokenizer, control_ids: Collection[int]) -> None:
        self._backend = backend
        self._added = {i: t.content for i, t in backend.get_added_tokens_decoder().items()}
        self._control_ids = frozenset(control_ids)
        steps = _decoder_steps(backend)
        kinds = {step.get("type") for step in steps}
        self._strips_first_space = any(
            step.get("type") == "Strip" and step.get("content") == " " and step.get("start", 0) > 0
            for step in steps
        ) or any(step.get("type") == "Metaspace" for step in steps)
        self._to_bytes: Callable[[str], bytes] | None = None
        if "ByteLevel" in kinds:
            self._to_bytes = _byte_level_bytes
        elif "ByteFallback" in kinds or "Metaspace" in kinds:
            self._to_bytes = _sentencepiece_bytes
        self._known: dict[int, bytes | str] = {}

    def read(self, token_ids: Sequence[int]) -> TokenTexts:
        """Texts and parts of a sequence; ids beyond the vocabulary are shown as `<id 123>`."""
        if self._to_bytes is None:
            return TokenTexts(tuple(self._in_context(token_ids)), {})
        texts: list[str] = []
        parts: dict[int, str] = {}
        pending: list[bytes] = []
        for token_id in token_ids:
            said = self._known.get(token_id)
            if said is None:
                said = self._known[token_id] = self._piece(token_id)
            if isinstance(said, str):
                # Whole characters: what is pending was never a character's beginning.
                _close(pending, texts, parts)
                texts.append(said)
                continue
            pending.append(said)
            if _is_whole(b"".join(pending)):
                _close(pending, texts, parts)
        _close(pending, texts, parts)
        if self._strips_first_space and texts and token_ids[0] not in self._control_ids:
            texts[0] = texts[0].removeprefix(" ")
        return TokenTexts(tuple(texts), parts)

    def _piece(self, token_id: int) -> bytes | str:
        """A token's text where it is whole characters, else its bytes."""
        if token_id in self._added:
            return self._added[token_id]
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return f"<id {token_id}>"
        assert self._to_bytes is not None
        raw = self._to_bytes(piece)
        return raw.decode("utf-8") if _is_whole(raw) else raw

    def _in_context(self, token_ids: Sequence[int]) -> list[str]:
        texts: list[str] = []
        for i, token_id in enumerate(token_ids):
            before = [token_ids[i - 1]] if i and token_ids[i - 1] not in self._added else []
            if token_id in self._added:
                texts.append(self._added[token_id])
            elif self._backend.id_to_token(token_id) is None:
                texts.append(f"<id {token_id}>")
            else:
                head = self._backend.decode(before, skip_special_tokens=False)
                both = self._backend.decode([*before, token_id], skip_special_tokens=False)
                texts.append(both.removeprefix(head))
        return texts


def _decoder_steps(backend: Tokenizer) -> list[dict[str, Any]]:
    """The tokenizer's decoder as its file describes it, sequences taken apart."""
    decoder = backend.decoder
    if decoder is None:
        return []
    described: dict[str, Any] = json.loads(decoder.__getstate__())
    return described.get("decoders", [described])


def _letters_of_bytes() -> dict[str, int]:
    """The letter that byte-level BPE writes for each byte (GPT-2's `bytes_to_unicode`): printable ones
    stand for themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_LETTER = _letters_of_bytes()


def _byte_level_bytes(piece: str) -> bytes:
    if all(letter in _BYTE_OF_LETTER for letter in piece):
        return bytes(_BYTE_OF_LETTER[letter] for letter in piece)
    return piece.encode("utf-8")


def _sentencepiece_bytes(piece: str) -> bytes:
    byte = _BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode("utf-8")


def _is_whole(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _close(pending: list[bytes], texts: list[str], parts: dict[int, str]) -> None:
    """Give the characters of the pending tokens to the tokens that hold their first bytes.

    Bytes that are no UTF-8 become U+FFFD, with the first of the tokens.
    """
    if not pending:
        return
    raw = b"".join(pending)
    shares = [""] * len(pending)
    if _is_whole(raw):
        ends = [sum(map(len, pending[: n + 1])) for n in range(len(pending))]
        position = 0
        for letter in raw.decode("utf-8"):
            shares[next(n for n, end in enumerate(ends) if position < end)] += letter
            position += len(letter.encode("utf-8"))
    else:
        shares[0] = raw.decode("utf-8", errors="replace")
    for piece, text in zip(pending, shares, strict=True):
        parts[len(texts)] = piece.hex(" ")
        texts.append(text)
    pending.clear()
