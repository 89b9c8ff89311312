"""What each token says: together, the decoded whole."""

import pytest
from view_rig import byte_level_tokenizer, sentencepiece_tokenizer, wordpiece_tokenizer

from burnish.report.view_tokens import TokenReader

HARD = [
    "Hello there!",
    " two  spaces\n\n\ttab ",
    "naïve café",
    "日本語とemoji 🙂🇫🇷👩‍👩‍👧‍👦 end",
    "مرحبا",
    "\u202eback\u202c \u200bzero\ufeff",
    "",
]


@pytest.mark.parametrize("text", HARD)
@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_texts_together_are_the_decoded_whole(make, text):
    backend = make().backend_tokenizer
    ids = backend.encode(text, add_special_tokens=False).ids
    said = TokenReader(backend, frozenset()).read(ids)
    assert len(said.texts) == len(ids)
    assert "".join(said.texts) == backend.decode(ids, skip_special_tokens=False)
    assert "\ufffd" not in "".join(said.texts)


def test_control_tokens_are_read_as_they_are_called():
    tokenizer = byte_level_tokenizer()
    backend = tokenizer.backend_tokenizer
    ids = backend.encode("<|im_start|>user\nHé<|im_end|>", add_special_tokens=False).ids
    said = TokenReader(backend, frozenset(tokenizer.all_special_ids)).read(ids)
    assert "".join(said.texts) == "<|im_start|>user\nHé<|im_end|>"
    assert said.texts[0] == "<|im_start|>"
    assert said.texts[-1] == "<|im_end|>"


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_a_character_of_several_tokens_stands_with_the_first(make):
    backend = make().backend_tokenizer
    ids = backend.encode("a🙂", add_special_tokens=False).ids
    said = TokenReader(backend, frozenset()).read(ids)
    assert said.texts[-4:] == ("🙂", "", "", "")
    first = len(ids) - 4
    assert said.parts == {first: "f0", first + 1: "9f", first + 2: "99", first + 3: "82"}


def test_a_token_that_ends_one_character_and_begins_the_next_counts_for_both():
    tokenizer = byte_level_tokenizer()
    backend = tokenizer.backend_tokenizer
    letters = {i: backend.id_to_token(i) for i in range(backend.get_vocab_size())}
    by_piece = {piece: i for i, piece in letters.items()}
    # é is c3 a9: alone c3, then a9 and the c3 of the next é are read as two tokens.
    ids = [by_piece["Ã"], by_piece["©"], by_piece["Ã"], by_piece["©"]]
    assert TokenReader(backend, frozenset()).read(ids).texts == ("é", "", "é", "")


def test_bytes_that_are_no_character_are_shown_and_do_not_spread():
    backend = byte_level_tokenizer().backend_tokenizer
    hello = backend.encode("Hello", add_special_tokens=False).ids
    half = backend.encode("🙂", add_special_tokens=False).ids[:2]
    said = TokenReader(backend, frozenset()).read([*half, *hello])
    assert said.texts[:2] == ("\ufffd", "")
    assert "".join(said.texts[2:]) == "Hello"
    assert said.parts == {0: "f0", 1: "9f"}


def test_ids_beyond_the_vocabulary_are_named():
    backend = byte_level_tokenizer().backend_tokenizer
    assert TokenReader(backend, frozenset()).read([99_999]).texts == ("<id 99999>",)


def test_a_tokenizer_of_another_kind_is_decoded_in_context():
    backend = wordpiece_tokenizer().backend_tokenizer
    ids = backend.encode("capital of France is Paris.", add_special_tokens=False).ids
    said = TokenReader(backend, frozenset()).read(ids)
    assert "".join(said.texts) == backend.decode(ids, skip_special_tokens=False)
    assert "ance" in said.texts
