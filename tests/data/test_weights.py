"""The quick way to a token's weight gives what looking at every token gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers_on_the_spot import byte_level, llama2_kind

from burnish.data.mask import _without_post_processor
from burnish.data.tiling import _GIVE_UP_TEXTS, TextTokenizer
from burnish.data.weights import token_weights, weights_by_offsets

_BACKENDS = {
    "bytes": _without_post_processor(byte_level(["<|im_end|>"]).backend_tokenizer),
    "pieces": _without_post_processor(llama2_kind().backend_tokenizer),
}


def _changed(kind: str, normalizer: normalizers.Normalizer | None, prepend: str | None = None) -> Tokenizer:
    """One of them with another normaliser, or a space before every part of a text."""
    backend = Tokenizer.from_str(_BACKENDS[kind].to_str())
    backend.normalizer = normalizer
    if prepend:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
        backend.add_special_tokens([AddedToken("<|im_end|>", normalized=False)])
    return backend


def _words() -> Tokenizer:
    """White space is lost, and unknown words become one token."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "ab": 1, "z": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


_LOSSLESS = {
    **_BACKENDS,
    "a space before every part": _changed("pieces", None, "always"),
    "no space before anything": _changed("pieces", None, "never"),
    "as Llama 2 once was": _changed("pieces", normalizers.Prepend("▁")),
}
_LOSSY = {
    "small letters": _changed("bytes", normalizers.Lowercase()),
    "composed letters": _changed("bytes", normalizers.NFKC()),
    "words": _words(),
}
_LETTERS = st.sampled_from([*"abz  \n", "<|im_end|>", "é", "e\u0301", "你", "\U0001f600", "\u200b", "\u2581"])


def _spans(text: str) -> st.SearchStrategy[list[tuple[int, int, float]]]:
    position = st.integers(0, len(text))
    span = st.tuples(position, position, st.sampled_from([0.5, 1.0, 2.0]))
    return st.lists(span.map(lambda s: (min(s[:2]), max(s[:2]), s[2])), max_size=4)


@pytest.mark.parametrize("kind", _BACKENDS)
@settings(max_examples=200, deadline=None)
@given(parts=st.lists(_LETTERS, min_size=1, max_size=30), data=st.data())
def test_looking_up_borders_is_looking_at_every_token(kind, parts, data):
    text = "".join(parts)
    spans = data.draw(_spans(text))
    encoding = _BACKENDS[kind].encode(text, add_special_tokens=False)
    expected = weights_by_offsets(encoding.offsets, spans)
    assert np.array_equal(token_weights(encoding, spans), expected), (text, spans, encoding.offsets)


@pytest.mark.parametrize("kind", [*_LOSSLESS, *_LOSSY])
@settings(max_examples=200, deadline=None)
@given(parts=st.lists(_LETTERS, max_size=30), data=st.data())
def test_places_by_lengths_are_places_by_offsets(kind, parts, data):
    backend = {**_LOSSLESS, **_LOSSY}[kind]
    text = "".join(parts)
    spans = data.draw(_spans(text))
    encoding = backend.encode(text, add_special_tokens=False)
    ((ids, weights),) = TextTokenizer(backend).encode([text], [spans])
    expected = weights_by_offsets(encoding.offsets, spans)
    assert ids.tolist() == encoding.ids
    assert np.array_equal(weights, expected), (text, spans, encoding.tokens, encoding.offsets)


def test_an_empty_span_inside_a_token_weighs_nothing():
    assert weights_by_offsets([(0, 1), (1, 3)], [(2, 2, 0.5)]).tolist() == [0.0, 0.0]


_TEXTS = ["Ab z", "<|im_end|>Ab<|im_end|>Ab é\n", "", "你Ab"]


@pytest.mark.parametrize("kind", _LOSSLESS)
def test_most_texts_need_no_offsets(kind, monkeypatch):
    tokenizer = TextTokenizer(_LOSSLESS[kind])
    monkeypatch.setattr(TextTokenizer, "_by_offsets", lambda self, texts, spans: [None] * len(texts))
    assert None not in tokenizer.encode(_TEXTS, [[(0, 1, 1.0)]] * 4)


@pytest.mark.parametrize("kind", _LOSSY)
def test_a_tokenizer_that_loses_letters_is_not_tried_twice_for_ever(kind):
    tokenizer = TextTokenizer(_LOSSY[kind])
    for _ in range(_GIVE_UP_TEXTS):
        tokenizer.encode(["Ab \ufb01 z"], [[(0, 1, 1.0)]])
    assert tokenizer._pieces is None or tokenizer._num_unproved == _GIVE_UP_TEXTS
    before = tokenizer._num_texts
    tokenizer.encode(["Ab \ufb01 z"] * 2, [[(0, 1, 1.0)]] * 2)
    tokenizer.encode(["Ab"], [[]])
    assert tokenizer._pieces is None or tokenizer._num_texts == before + 2
