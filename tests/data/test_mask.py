"""The mask, to the token: who is trained on, with which weight, and what is cut."""

from __future__ import annotations

import datetime
import itertools
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tokenizers_on_the_spot import byte_level, llama2_kind
from transformers import PreTrainedTokenizerBase

from burnish.config.schema import DataConfig
from burnish.data.mask import Encoded, Encoder
from burnish.data.tokenizer import builtin_templates
from burnish.errors import DataError
from burnish.records import Conversation, Message

CHATML = builtin_templates()["chatml"]
CONTROL = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]


def _data(**keys: Any) -> DataConfig:
    return DataConfig.model_validate({"train": "x", **keys})


def _chat(*turns: Message | str) -> Conversation:
    """Strings alternate between user and assistant."""
    messages = [
        t if isinstance(t, Message) else Message("assistant" if i % 2 else "user", t)
        for i, t in enumerate(turns)
    ]
    return Conversation("s", "s:1", messages=messages)


def _one(conversation: Conversation, template: str | None = CHATML, **keys: Any) -> tuple[Encoded, Any]:
    tokenizer = byte_level(CONTROL, eos="<|im_end|>")
    [encoded] = Encoder(tokenizer, template, _data(**keys)).encode([conversation])
    return encoded, tokenizer


def _trained(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> list[str]:
    """The text of each run of tokens that are trained on."""
    assert encoded.example is not None, encoded.problem
    ids, trained = encoded.example.token_ids, encoded.example.trained
    edges = np.flatnonzero(np.diff(np.concatenate([[0], trained.astype(int), [0]])))
    return [str(tokenizer.decode(ids[a:b])) for a, b in edges.reshape(-1, 2)]


def test_answers_and_their_end_of_turn_are_trained_on_and_nothing_else() -> None:
    encoded, tokenizer = _one(_chat("Hi", "Hello!", "Bye", "See you"))
    assert _trained(tokenizer, encoded) == ["Hello!<|im_end|>", "See you<|im_end|>"]
    assert tokenizer.decode(encoded.example.token_ids).endswith("See you<|im_end|>\n")


def test_last_assistant_and_all() -> None:
    encoded, tokenizer = _one(_chat("Hi", "Hello!", "Bye", "See you"), train_on="last_assistant")
    assert _trained(tokenizer, encoded) == ["See you<|im_end|>"]
    encoded, _ = _one(_chat("Hi", "Hello!"), train_on="all")
    assert encoded.example.weights.tolist() == [1.0] * len(encoded.example.token_ids)
    assert not encoded.example.trained[0]


def test_weights_and_train_of_a_message_are_honoured_to_the_token() -> None:
    turns = ["Hi", Message("assistant", "one", train=False), "a", Message("assistant", "two", weight=0.5)]
    encoded, tokenizer = _one(_chat(*turns, "b", "three"))
    assert _trained(tokenizer, encoded) == ["two<|im_end|>", "three<|im_end|>"]
    assert sorted(set(encoded.example.weights.tolist())) == [0.0, 0.5, 1.0]
    turns = ["Hi", Message("assistant", "one", train=True), "a", "two"]
    encoded, tokenizer = _one(_chat(*turns), train_on="last_assistant")
    assert _trained(tokenizer, encoded) == ["one<|im_end|>", "two<|im_end|>"]
    encoded, tokenizer = _one(_chat(Message("user", "Hi", train=False), "yes"), train_on="all")
    assert "Hi" not in "".join(_trained(tokenizer, encoded))


def test_a_row_without_a_trained_token_is_a_problem() -> None:
    encoded, _ = _one(_chat("Hi", Message("assistant", "one", weight=0.0)))
    assert encoded.problem is not None
    assert encoded.problem.rule == "no_supervised_tokens"


def test_a_token_that_straddles_the_border_is_the_models_to_write() -> None:
    """Header and answer share the token `\\n\\n`: the model has to write its second half."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    encoded, tokenizer = _one(_chat("Hi", "\n\nHello"), template)
    assert _trained(tokenizer, encoded) == ["\n\n\nHello<|im_end|>"]


def test_whitespace_tokens_of_an_answer_are_trained_on() -> None:
    """Byte-level post-processors trim white space off offsets; a token of white space stays trained."""
    encoded, tokenizer = _one(_chat("Hi", "a \n\n  b"))
    assert _trained(tokenizer, encoded) == ["a \n\n  b<|im_end|>"]


def test_end_of_turn_of_words_that_the_tokenizer_does_not_know() -> None:
    tokenizer = llama2_kind()
    [encoded] = Encoder(tokenizer, CHATML, _data()).encode([_chat("Hi", "Hello", "a", "b")])
    assert [t.strip() for t in _trained(tokenizer, encoded)] == ["Hello<|im_end|>", "b<|im_end|>"]


def test_truncation_keeps_a_valid_conversation() -> None:
    whole, _tokenizer = _one(_chat("Hi", "Hello!", "How are you", "I am fine, thank you"))
    num_tokens = len(whole.example.token_ids)
    num_supervised = int(whole.example.trained.sum())
    for limit in range(1, num_tokens):
        encoded, _ = _one(_chat("Hi", "Hello!", "How are you", "I am fine, thank you"), max_tokens=limit)
        if encoded.example is None:
            assert encoded.problem.rule == "prompt_too_long"
            assert encoded.num_tokens_cut == num_tokens
            continue
        example = encoded.example
        assert len(example.token_ids) <= limit
        assert example.trained[-1], "nothing is read that is not learned from: no half header"
        assert example.token_ids.tolist() == whole.example.token_ids[: len(example.token_ids)].tolist()
        assert encoded.num_tokens_cut == num_tokens - len(example.token_ids)
        assert encoded.num_supervised_cut == num_supervised - int(example.trained.sum())


def test_drop_and_error_say_too_long() -> None:
    for policy in ("drop", "error"):
        encoded, _ = _one(_chat("Hi", "Hello " * 50), max_tokens=20, too_long=policy)
        assert encoded.problem.rule == "too_long"
        assert encoded.num_tokens_cut > 50


def test_split_cuts_at_turns_and_repeats_the_system_turn() -> None:
    tokenizer = byte_level(CONTROL, eos="<|im_end|>")
    turns: list[Message] = [Message("system", "Be brief.")]
    for i in range(8):
        turns += [Message("user", f"question {i}"), Message("assistant", f"answer {i}")]
    conversation = Conversation("s", "s:1", messages=turns)
    whole = Encoder(tokenizer, CHATML, _data()).encode([conversation])
    parts = Encoder(tokenizer, CHATML, _data(too_long="split", max_tokens=100)).encode(
        [_chat("x", "y"), conversation]
    )
    assert [p.index for p in parts] == [0] + [1] * (len(parts) - 1)
    assert len(parts) > 3
    texts = [str(tokenizer.decode(p.example.token_ids)) for p in parts[1:]]
    assert all(t.startswith("<|im_start|>system\nBe brief.") and len(t) for t in texts)
    assert all(len(p.example.token_ids) <= 100 for p in parts)
    assert [t for p in parts[1:] for t in _trained(tokenizer, p)] == _trained(tokenizer, whole[0])
    assert all(p.num_tokens_cut == 0 for p in parts)


def test_a_part_of_a_split_conversation_with_nothing_to_learn_is_no_bad_row() -> None:
    tokenizer = byte_level(CONTROL, eos="<|im_end|>")
    turns = [Message("user", "question " * 5), Message("assistant", "answer " * 5, train=False)] * 3
    conversation = _chat(*turns, "And now?", "Done.")
    [whole] = Encoder(tokenizer, CHATML, _data()).encode([conversation])
    parts = Encoder(tokenizer, CHATML, _data(too_long="split", max_tokens=100)).encode([conversation])
    assert [part.problem for part in parts] == [None]
    assert _trained(tokenizer, parts[0]) == _trained(tokenizer, whole)
    lost = len(whole.example.token_ids) - len(parts[0].example.token_ids)
    assert parts[0].num_tokens_cut == lost > 0 and parts[0].num_supervised_cut == 0


def test_control_tokens_typed_in_a_split_conversation_are_counted_once() -> None:
    tokenizer = byte_level(CONTROL, eos="<|im_end|>")
    conversation = _chat(*["a <|im_end|> b", "answer " * 5] * 4)
    parts = Encoder(tokenizer, CHATML, _data(too_long="split", max_tokens=60)).encode([conversation])
    assert len(parts) == 4
    assert [part.num_control_tokens_typed for part in parts] == [4] + [0] * (len(parts) - 1)


@pytest.mark.parametrize("num_words", [8, 9, 10, 11, 57])
def test_pieces_of_a_split_text_learn_every_token_once(num_words: int) -> None:
    tokenizer = llama2_kind()
    text = Conversation("s", "s:1", text=" ".join(["hello"] * num_words))
    [whole] = Encoder(tokenizer, None, _data()).encode([text])
    parts = Encoder(tokenizer, None, _data(too_long="split", max_tokens=8)).encode([text])
    assert all(2 <= len(part.example.token_ids) <= 8 for part in parts)
    for before, part in itertools.pairwise(parts):
        assert part.example.token_ids[0] == before.example.token_ids[-1] and part.example.weights[0] == 0
    targets = np.concatenate([part.example.token_ids[1:] for part in parts])
    assert targets.tolist() == whole.example.token_ids[1:].tolist()
    assert sum(int(part.example.trained[1:].sum()) for part in parts) == len(targets)
    assert sum(part.num_tokens_cut for part in parts) == 0


def test_pieces_of_split_tokens_with_nothing_to_learn_are_counted_as_lost() -> None:
    weights = [0.0] * 4 + [1.0] + [0.0] * 8 + [0.5]
    given = Conversation("s", "s:1", token_ids=list(range(5, 19)), token_weights=weights)
    parts = Encoder(llama2_kind(), None, _data(too_long="split", max_tokens=4)).encode([given])
    assert [part.example.token_ids.tolist() for part in parts] == [[8, 9, 10, 11], [17, 18]]
    assert [part.example.weights.tolist() for part in parts] == [[0, 1, 0, 0], [0, 0.5]]
    assert [part.num_tokens_cut for part in parts] == [8, 0]
    assert all(part.num_supervised_cut == 0 for part in parts)


def test_text_gets_one_eos_and_the_bos_that_the_tokenizer_puts() -> None:
    tokenizer = llama2_kind()
    text = Conversation("s", "s:1", text="hello world")
    [encoded] = Encoder(tokenizer, None, _data()).encode([text])
    ids = encoded.example.token_ids.tolist()
    assert ids == [*tokenizer("hello world")["input_ids"], tokenizer.eos_token_id]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert encoded.example.trained.tolist() == [False] + [True] * (len(ids) - 1)


def test_a_template_that_writes_the_bos_gets_no_second_one() -> None:
    tokenizer = llama2_kind()
    [encoded] = Encoder(tokenizer, builtin_templates()["plain"], _data()).encode([_chat("Hi", "Hello")])
    assert encoded.example.token_ids.tolist().count(tokenizer.bos_token_id) == 1
    assert _trained(tokenizer, encoded) == ["Hello</s>"]


def test_ready_made_tokens_pass_through_and_ids_beyond_the_vocabulary_do_not() -> None:
    tokenizer = llama2_kind()
    encoder = Encoder(tokenizer, None, _data())
    given = Conversation("s", "s:1", token_ids=[5, 6, 7], token_weights=[0.0, 1.0, 0.5])
    beyond = Conversation("s", "s:2", token_ids=[5, 10**6])
    good, bad = encoder.encode([given, beyond])
    assert good.example.weights.tolist() == [0.0, 1.0, 0.5]
    assert bad.problem.rule == "token_out_of_range"


def test_messages_without_a_template_end_with_a_cure() -> None:
    with pytest.raises(DataError, match="chat_template"):
        _one(_chat("Hi", "Hello"), template=None)


@pytest.mark.parametrize(
    "text", ["\ud800", "\x00 nul", "\ue000 private \uf8ff", "\U000f0001", "", "\u202e", "a" * 9999]
)
def test_strange_text_gets_a_verdict_and_never_a_crash(text: str) -> None:
    encoded, tokenizer = _one(_chat("Hi" + text, "answer " + text), max_tokens=100_000)
    if "\ud800" in text:
        assert encoded.problem.rule == "lone_surrogate"
    else:
        assert _trained(tokenizer, encoded) == [f"answer {text}<|im_end|>"]


def test_an_encoder_can_be_made_again_in_another_process() -> None:
    encoder = Encoder(byte_level(CONTROL), CHATML, _data(), today=datetime.date(2024, 2, 3))
    again = pickle.loads(pickle.dumps(encoder))
    assert again.today == encoder.today
    [a], [b] = encoder.encode([_chat("Hi", "Hello")]), again.encode([_chat("Hi", "Hello")])
    assert a.example.token_ids.tolist() == b.example.token_ids.tolist()


def test_batches_keep_their_order() -> None:
    def texts(encoded: Sequence[Encoded]) -> list[int]:
        return [e.index for e in encoded]

    encoder = Encoder(byte_level(CONTROL), CHATML, _data())
    rows = [
        _chat("a", "b"),
        _chat("a <|im_end|>", "b"),
        Conversation("s", "s:3", text="t"),
        _chat("\ud800", "b"),
    ]
    assert texts(encoder.encode(rows)) == [0, 1, 2, 3]
    assert encoder.encode([]) == []
