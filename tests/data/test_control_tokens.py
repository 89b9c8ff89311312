"""Typed control tokens: text by default, to the token, wherever they are typed."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from tokenizers_on_the_spot import byte_level, llama2_kind
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from burnish.config.schema import DataConfig
from burnish.data.mask import Encoded, Encoder
from burnish.data.tokenizer import builtin_templates
from burnish.records import Conversation, Message

TEMPLATES = builtin_templates()
KINDS = {
    "byte level": (
        byte_level(["<|im_start|>", "<|im_end|>", "<think>", "</think>", "[X]"]),
        TEMPLATES["chatml"],
    ),
    "llama 2": (llama2_kind(), TEMPLATES["plain"]),
}
CASES = [(k, t) for k, (tokenizer, _) in KINDS.items() for t in tokenizer.get_added_vocab()]


def _conversations(word: str) -> dict[str, Conversation]:
    call = {"type": "function", "function": {"name": word, "arguments": {word: [f"x{word}"]}}}
    calling = Message("assistant", "", {"tool_calls": [call]})
    typed = {
        "user": [Message("user", f"a {word} b{word}"), Message("assistant", "c")],
        "system": [Message("system", word), Message("user", "a"), Message("assistant", "c")],
        "assistant": [Message("user", "a"), Message("assistant", f"{word}c {word}{word}")],
        "tool": [Message("user", "a"), calling, Message("tool", f"r{word}"), Message("assistant", "c")],
    }
    return {name: Conversation("s", f"s:{name}", messages=m) for name, m in typed.items()}


def _encode(kind: str, conversation: Conversation, **keys: Any) -> tuple[Encoded, PreTrainedTokenizerBase]:
    tokenizer, template = KINDS[kind]
    data = DataConfig.model_validate({"train": "x", **keys})
    [encoded] = Encoder(tokenizer, template, data).encode([conversation])
    return encoded, tokenizer


@pytest.mark.parametrize(("kind", "token"), CASES)
@pytest.mark.parametrize("where", ["user", "system", "assistant", "tool"])
def test_as_many_control_ids_as_with_a_harmless_word_and_the_text_unchanged(
    kind: str, token: str, where: str
) -> None:
    encoded, tokenizer = _encode(kind, _conversations(token)[where])
    harmless, _ = _encode(kind, _conversations("word")[where])
    assert encoded.example is not None, encoded.problem
    assert harmless.example is not None
    control = set(tokenizer.get_added_vocab().values())

    def count(result: Encoded) -> int:
        assert result.example is not None
        return sum(i in control for i in result.example.token_ids.tolist())

    assert count(encoded) == count(harmless)
    shown = str(tokenizer.decode(encoded.example.token_ids))
    assert shown == str(tokenizer.decode(harmless.example.token_ids)).replace("word", token)
    assert encoded.num_control_tokens_typed >= (1 if where != "tool" or kind == "byte level" else 0)
    assert harmless.num_control_tokens_typed == 0


@pytest.mark.parametrize(("kind", "token"), CASES)
def test_plain_text_too(kind: str, token: str) -> None:
    encoded, tokenizer = _encode(kind, Conversation("s", "s:1", text=f"a {token} b"))
    assert encoded.example is not None, encoded.problem
    inside = encoded.example.token_ids.tolist()[1:-1]
    assert not set(inside) & set(tokenizer.get_added_vocab().values())


def test_allow_and_error() -> None:
    conversation = _conversations("<|im_end|>")["user"]
    escaped, tokenizer = _encode("byte level", conversation)
    allowed, _ = _encode("byte level", conversation, control_tokens="allow")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert escaped.example is not None
    assert allowed.example is not None
    assert escaped.example.token_ids.tolist().count(end) == 2
    assert allowed.example.token_ids.tolist().count(end) == 4
    refused, _ = _encode("byte level", conversation, control_tokens="error")
    assert refused.problem is not None
    assert refused.problem.rule == "control_tokens"


def test_all_other_tokens_come_out_as_ever() -> None:
    """A typed control token far away changes nothing in the rest of the row."""
    text = "The quick brown fox,  jumps\n\nover äöü 你好 {'a': 1}."
    messages = [Message("user", "x <|im_end|>"), Message("assistant", text)]
    plain = [Message("user", "x"), Message("assistant", text)]
    typed, tokenizer = _encode("byte level", Conversation("s", "s:1", messages=messages))
    usual, _ = _encode("byte level", Conversation("s", "s:2", messages=plain))
    assert typed.example is not None
    assert usual.example is not None
    trained = [e.token_ids[e.trained].tolist() for e in (typed.example, usual.example)]
    assert trained[0] == trained[1]
    assert tokenizer.decode(trained[0]) == text + "<|im_end|>"


def test_a_letter_that_the_tokenizer_does_not_know_is_no_control_token() -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "c": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_tokens([AddedToken(t, special=True, normalized=False) for t in ("[UNK]", "<s>", "</s>")])
    for eos in ("</s>", "[UNK]"):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, unk_token="[UNK]")
        encoder = Encoder(tokenizer, None, DataConfig.model_validate({"train": ["d.jsonl"]}))
        for text in ("a </s> c", "a </s> \U0001f600 c", "a [UNK] c"):
            example = encoder.encode([Conversation("s", "s:1", text=text)])[0].example
            assert example is not None and example.token_ids[-1] == tokenizer.eos_token_id
            assert tokenizer.convert_tokens_to_ids("</s>") not in example.token_ids[:-1]


def test_tags_of_leading_reasoning_are_structure() -> None:
    content = "<think>\nplan </x>\n</think>\n\nanswer <think>"
    conversation = Conversation("s", "s:1", messages=[Message("user", "q"), Message("assistant", content)])
    encoded, tokenizer = _encode("byte level", conversation)
    assert encoded.example is not None
    ids = encoded.example.token_ids.tolist()
    assert ids.count(tokenizer.convert_tokens_to_ids("<think>")) == 1
    assert ids.count(tokenizer.convert_tokens_to_ids("</think>")) == 1
    assert encoded.num_control_tokens_typed == 1
