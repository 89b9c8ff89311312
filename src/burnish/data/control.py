"""Control tokens that somebody typed stay text, to the token.

A text that contains `<|im_end|>` must not end a turn. Where the typed characters are is known before
rendering, so each typed control token is swapped there for one private character (`hide`), which the
template carries along like any letter. In the rendered text every control token that is still spelled
out was written by the template. Those are swapped for private characters of another kind, the typed
ones are spelled out again, and the whole string is tokenised once, by a copy of the tokenizer whose
control tokens are *called* by those private characters. Nothing else about the copy differs, so all
other tokens come out as ever, and the spelled-out ones are no control tokens to it.

Rows without a typed control token, nearly all, skip this.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64
from tokenizers import AddedToken, Tokenizer

from burnish.data.problems import RowProblem

_FIRST_TYPED = 0x100000
"""Private character of the first control token where somebody typed it; the others follow."""
_FIRST_REAL = 0x108000
"""The same where the template wrote it."""
_PRIVATE = re.compile(f"[{chr(_FIRST_TYPED)}-{chr(0x10FFFF)}]")

_REASONING = re.compile(r"\s*(<think>)(?:(?!</think>).)*(</think>)", re.DOTALL)
"""A reasoning block at the start of an assistant's content: its two tags are structure that the
model has to write, not typed text, wherever the tokenizer knows them."""


@dataclass(frozen=True)
class Aliased:
    """A rendered text for the copy of the tokenizer."""

    text: str
    starts: Int64[np.ndarray, " parts"]
    """Where parts of the rendered text start, in order, beginning with 0 …"""
    aliased_starts: Int64[np.ndarray, " parts"]
    """… and where the same parts start in `text`."""
    num_real: int
    """Control tokens that the template wrote, as `ControlTokens.num_control` counts them."""

    def position(self, rendered: int) -> int:
        """A character position of the rendered text, in `text`; never inside a swapped token."""
        part = int(np.searchsorted(self.starts, rendered, side="right")) - 1
        return int(self.aliased_starts[part]) + rendered - int(self.starts[part])


class ControlTokens:
    """The control tokens of a tokenizer, and what keeps typed ones apart from real ones.

    Control tokens are all added tokens, except those that are added for ordinary text: made only of
    white space or only of letters and digits, or not special and beginning with a letter or digit.

    Args:
        backend: The Rust tokenizer; not changed.
    """

    def __init__(self, backend: Tokenizer) -> None:
        added = backend.get_added_tokens_decoder()
        self._ids = {token.content: i for i, token in sorted(added.items()) if _is_control(token)}
        self.names: tuple[str, ...] = tuple(sorted(self._ids, key=len, reverse=True))
        self._number = {name: n for n, name in enumerate(self.names)}
        spelled = "|".join(map(re.escape, self.names)) or "(?!)"
        self._spelled = re.compile(spelled)
        self._swap = re.compile(f"{spelled}|{_PRIVATE.pattern}")
        self._first_letters = tuple(sorted({name[0] for name in self.names}))
        self._backend = backend
        self._copy: Tokenizer | None = None
        self._real_ids: Int32[np.ndarray, " vocabulary"] | None = None

    def count(self, value: Any) -> int:
        """Control tokens spelled out anywhere in a JSON-like value, keys included."""
        if isinstance(value, str):
            if not any(letter in value for letter in self._first_letters):
                return 0
            return len(self._spelled.findall(value))
        if isinstance(value, Mapping):
            return sum(self.count(k) + self.count(v) for k, v in value.items())
        if isinstance(value, list | tuple):
            return sum(self.count(item) for item in value)
        return 0

    def count_in_answer(self, content: Any) -> int:
        """The same for an assistant's content, where the tags of leading reasoning do not count."""
        count = self.count(content)
        return count - len(self._tags(content)) if count and isinstance(content, str) else count

    def hide(self, value: Any) -> Any:
        """The value with each typed control token swapped for its private character.

        Raises:
            RowProblem: `control_tokens`: the text already has such private characters.
        """
        if isinstance(value, str):
            if _PRIVATE.search(value):
                raise RowProblem("control_tokens", "beside private-use characters (U+100000 and up)")
            return self._spelled.sub(lambda m: chr(_FIRST_TYPED + self._number[m[0]]), value)
        if isinstance(value, Mapping):
            return {self.hide(k): self.hide(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        return value

    def hide_in_answer(self, content: Any) -> Any:
        """The same for an assistant's content: the tags of leading reasoning stay what they are."""
        if not isinstance(content, str):
            return self.hide(content)
        shown = []
        position = 0
        for start, end in self._tags(content):
            shown += [self.hide(content[position:start]), content[start:end]]
            position = end
        return "".join([*shown, self.hide(content[position:])])

    def _tags(self, content: str) -> list[tuple[int, int]]:
        block = _REASONING.match(content)
        if block is None or block[1] not in self._ids or block[2] not in self._ids:
            return []
        return [block.span(1), block.span(2)]

    def alias(self, rendered: str) -> Aliased:
        """Spell typed control tokens out, and swap real ones for private characters."""
        parts: list[str] = []
        starts, aliased_starts = [0], [0]
        position = length = num_real = 0
        for match in self._swap.finditer(rendered):
            token = match[0]
            number = self._number.get(token)
            if number is None:
                swapped = self.names[ord(token) - _FIRST_TYPED]
            else:
                swapped = chr(_FIRST_REAL + number)
                num_real += token != self._unknown
            between = rendered[position : match.start()]
            parts += [between, swapped]
            length += len(between)
            starts += [match.start(), match.end()]
            aliased_starts += [length, length + len(swapped)]
            length += len(swapped)
            position = match.end()
        parts.append(rendered[position:])
        return Aliased("".join(parts), np.array(starts), np.array(aliased_starts), num_real)

    def encode(self, texts: Sequence[str]) -> list[tuple[Int32[np.ndarray, " tokens"], Any]]:
        """Tokenise aliased texts: real ids, and the encodings with offsets into the texts."""
        if self._copy is None or self._real_ids is None:
            self._copy = self._make_copy()
            self._real_ids = self._map_ids(self._copy)
        real_ids = self._real_ids
        encodings = self._copy.encode_batch(list(texts), add_special_tokens=False)
        return [(real_ids[np.array(e.ids, np.int64)], e) for e in encodings]

    def num_control(self, ids: Int32[np.ndarray, " tokens"]) -> int:
        """How many of the ids are control tokens, but for the one that stands for unknown letters: it comes
        of ordinary text, and ends no turn."""
        counted = [i for name, i in self._ids.items() if name != self._unknown]
        return int(np.isin(ids, np.array(counted, np.int64)).sum())

    @functools.cached_property
    def _unknown(self) -> str | None:
        """What the tokenizer writes for letters that it does not know; None where it knows all."""
        model = json.loads(self._backend.to_str())["model"]
        if model.get("unk_id") is not None:  # Unigram names it by its number
            return self._backend.id_to_token(model["unk_id"])
        return model.get("unk_token")

    def _make_copy(self) -> Tokenizer:
        """The tokenizer with its control tokens renamed, in the list of added tokens and wherever
        the model's own vocabulary has them too."""
        described = json.loads(self._backend.to_str())
        alias = {name: chr(_FIRST_REAL + number) for name, number in self._number.items()}
        for token in described["added_tokens"]:
            token["content"] = alias.get(token["content"], token["content"])
        model = described["model"]
        vocabulary = model.get("vocab")
        if isinstance(vocabulary, list):
            model["vocab"] = [[alias.get(piece, piece), score] for piece, score in vocabulary]
        elif isinstance(vocabulary, dict):
            merged = {
                "".join(m) if isinstance(m, list) else m.replace(" ", "") for m in model.get("merges", ())
            }
            safe = {name: new for name, new in alias.items() if name not in merged}
            model["vocab"] = {safe.get(piece, piece): i for piece, i in vocabulary.items()}
            if model.get("unk_token") in safe:
                model["unk_token"] = safe[model["unk_token"]]
        return Tokenizer.from_str(json.dumps(described))

    def _map_ids(self, copy: Tokenizer) -> Int32[np.ndarray, " vocabulary"]:
        """What the copy calls a token, in the tokenizer's own numbers."""
        size = max(copy.get_vocab_size(), self._backend.get_vocab_size(), *self._ids.values()) + 1
        real_ids = np.arange(size, dtype=np.int32)
        for i, token in copy.get_added_tokens_decoder().items():
            number = ord(token.content) - _FIRST_REAL if len(token.content) == 1 else -1
            name = self.names[number] if 0 <= number < len(self.names) else token.content
            real = self._backend.token_to_id(name)
            if real is not None:
                real_ids[i] = real
        return real_ids


def _is_control(token: AddedToken) -> bool:
    content = token.content.strip()
    word = content.replace(" ", "").replace("▁", "").isalnum()
    return bool(content) and not word and (token.special or not content[0].isalnum())
