"""Our masks against the hand-marked twins of real families' templates that the trl package ships.

`X.jinja` is what a family ships; `X_training.jinja` is the same with `{% generation %}` marks put in by
hand. transformers turns those marks into a mask, token by token. Ours, found without any mark, has to be
the same, except that ours leaves out (1) what belongs to the generation prompt and (2) white space behind
the end of turn, which some twins mark. Both templates are read from the installed package at test time.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers_on_the_spot import byte_level
from transformers import PreTrainedTokenizerBase

from burnish.config.schema import DataConfig
from burnish.data.jinja import TEMPLATE_FAILURES
from burnish.data.mask import Encoder
from burnish.records import Conversation, Message

_SPEC = importlib.util.find_spec("trl")
_FOLDER = Path(_SPEC.origin).parent / "chat_templates" if _SPEC and _SPEC.origin else Path("missing")
_PAIRS = sorted(f.name.removesuffix("_training.jinja") for f in _FOLDER.glob("*_training.jinja"))

pytestmark = pytest.mark.skipif(not _PAIRS, reason="the trl package is not installed")

_CONTROL = re.compile(
    r"<[|｜][^<>\s'\"{}+|]+[|｜]>|<\|\"\|>|<\|[a-z_]+>|<[a-z_]+\|>|</?think>|</?tool_call>|<(?:start|end)_of_\w+>"
)


def _call(name: str, values: Mapping[str, Any], form: str = "object") -> dict[str, Any]:
    arguments = json.dumps(values) if form == "json" else dict(values)
    return {"id": "call00001", "type": "function", "function": {"name": name, "arguments": arguments}}


def _ask(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _answer(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def _result(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, "name": "get_weather", "tool_call_id": "call00001"}


_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name"}},
                "required": ["city"],
            },
        },
    }
]
_PARIS = _call("get_weather", {"city": "Paris"})
_PARIS_TEXT = _call("get_weather", {"city": "Paris"}, "json")
_ROME = _call("get_weather", {"city": "Rome", "days": 2})
_SYSTEM = {"role": "system", "content": "Be brief."}

_SHAPES: dict[str, list[dict[str, Any]]] = {
    "one turn": [_ask("What is the weather?"), _answer("It is sunny.")],
    "two turns": [_ask("Hello"), _answer("Hi!"), _ask("Weather?"), _answer("Sunny today.")],
    "three turns": [_ask("a"), _answer("b"), _ask("c"), _answer("d"), _ask("e"), _answer("f")],
    "system": [_SYSTEM, _ask("Hello"), _answer("Hi."), _ask("Bye"), _answer("See you.")],
    "white space": [_ask("  Hello \n"), _answer("\n  Hi there  \n\n"), _ask("x"), _answer(" y ")],
    "same words": [_ask("assistant"), _answer("assistant\nuser"), _ask("Hi"), _answer("Hi")],
    "looks like a tag": [_ask("<b>x</b>"), _answer("<b>bold</b> <thin>"), _ask("?"), _answer("<t")],
    "other scripts": [_ask("你好 äöü"), _answer("你好! \U0001f600 ü."), _ask("é"), _answer("e\u0301!")],
    "empty answer": [_ask("Say nothing"), _answer(""), _ask("Hello"), _answer("Hi")],
    "thinking in content": [_ask("2+2?"), _answer("<think>\nTwo and two.\n</think>\n\nFour.")],
    "thinking earlier": [
        _ask("2+2?"),
        _answer("<think>\nTwo and two.\n</think>\n\nFour."),
        _ask("3+3?"),
        _answer("<think>\nThree.\n</think>\n\nSix."),
    ],
    "reasoning": [_ask("2+2?"), _answer("Four.", reasoning_content="Two and two.")],
    "reasoning earlier": [
        _ask("2+2?"),
        _answer("Four.", reasoning_content="Two and two."),
        _ask("3+3?"),
        _answer("Six.", reasoning_content="Three and three."),
    ],
    "tool call": [
        _ask("Weather in Paris?"),
        _answer("", tool_calls=[_PARIS]),
        _result("sunny"),
        _answer("It is sunny."),
    ],
    "tool call, no content": [
        _ask("Weather in Paris?"),
        _answer(None, tool_calls=[_PARIS]),
        _result("sunny"),
        _answer("It is sunny."),
    ],
    "tool call as text": [
        _ask("Weather in Paris?"),
        _answer(None, tool_calls=[_PARIS_TEXT]),
        _result("sunny"),
        _answer("It is sunny."),
    ],
    "tool call with words": [
        _ask("Weather in Paris?"),
        _answer("Let me look.", tool_calls=[_PARIS]),
        _result("sunny"),
        _answer("It is sunny."),
        _ask("Thanks"),
        _answer("Welcome."),
    ],
    "parallel tool calls": [
        _ask("Paris and Rome?"),
        _answer("", tool_calls=[_PARIS, _ROME]),
        _result("sunny"),
        _result("rain"),
        _answer("Sunny and rain."),
    ],
    "tool after tool": [
        _ask("Paris, then Rome?"),
        _answer("", tool_calls=[_PARIS]),
        _result("sunny"),
        _answer("", tool_calls=[_ROME]),
        _result("rain"),
        _answer("Both."),
    ],
    "tool call last": [_ask("Weather in Paris?"), _answer("", tool_calls=[_PARIS])],
    "reasoning and tools": [
        _SYSTEM,
        _ask("Weather in Paris?"),
        _answer("", tool_calls=[_PARIS], reasoning_content="I should look."),
        _result("sunny"),
        _answer("Sunny.", reasoning_content="It said sunny."),
    ],
}


@functools.lru_cache(maxsize=2)
def _encoder(source: str, twin: str) -> tuple[PreTrainedTokenizerBase, Encoder]:
    control = sorted({found for text in (source, twin) for found in _CONTROL.findall(text)})
    tokenizer = byte_level(control, bos="<bos>", eos="<eos>")
    data = DataConfig.model_validate({"train": "x", "max_tokens": 100_000})
    return tokenizer, Encoder(tokenizer, source, data)


def _conversation(messages: Sequence[Mapping[str, Any]], tools: Any) -> Conversation:
    records = [
        Message(m["role"], m["content"], {k: v for k, v in m.items() if k not in ("role", "content")})
        for m in messages
    ]
    return Conversation("twins", "twins:1", messages=records, tools=tools)


def _marked_by_hand(
    tokenizer: PreTrainedTokenizerBase, twin: str, messages: Any, tools: Any
) -> tuple[list[int], np.ndarray] | None:
    """What transformers makes of the twin's marks; None if the twin refuses the conversation."""
    try:
        encoded = tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=twin, return_dict=True, return_assistant_tokens_mask=True
        )
    except TEMPLATE_FAILURES:
        return None
    return list(encoded["input_ids"]), np.array(encoded["assistant_masks"], bool)


def _is_exempt(tokens: Sequence[str], ours: np.ndarray, theirs: np.ndarray, prompts: Sequence[str]) -> bool:
    """Whether every token that only the twin marks is a piece of a generation prompt at the start of a
    marked run, or white space behind an end of turn; and no token is only ours."""
    if (ours & ~theirs).any():
        return False
    i = 0
    while i < len(tokens):
        if not theirs[i]:
            i += 1
            continue
        end = i
        while end < len(tokens) and theirs[end]:
            end += 1
        if not _run_is_exempt(tokens, ours, i, end, prompts):
            return False
        i = end
    return True


def _run_is_exempt(
    tokens: Sequence[str], ours: np.ndarray, start: int, end: int, prompts: Sequence[str]
) -> bool:
    left_out = [j for j in range(start, end) if not ours[j]]
    front = [j for j in left_out if ours[start : j + 1].sum() == 0]
    header = "".join(tokens[j] for j in front)
    if header and not any(header in prompt[-60:] for prompt in prompts):
        return False
    rest = [j for j in left_out if j not in front]
    return all(not tokens[j].strip() and _CONTROL_END.search(tokens[j - 1]) for j in rest)


_CONTROL_END = re.compile(r"[>\n]$")


def _compare(name: str, source: str, twin: str, shape: str) -> str:
    """`equal`, or why there is nothing to compare; fails where the masks differ."""
    tokenizer, encoder = _encoder(source, twin)
    messages = _SHAPES[shape]
    tools = _TOOLS if "tool" in shape else None
    for given in (
        messages,
        _adapted(messages, content_none=False),
        _adapted(messages, text=True),
        _parts(messages),
    ):
        marked = _marked_by_hand(tokenizer, twin, given, tools)
        if marked is None:
            continue
        ids, theirs = marked
        [encoded] = encoder.encode([_conversation(given, tools)])
        if encoded.example is None:
            if not theirs.any():
                return "nothing marked"
            if encoded.problem is not None and encoded.problem.rule == "template_error":
                continue
            raise AssertionError(f"{name}, {shape}: {encoded.problem}\n{tokenizer.decode(ids)}")
        ours_ids = encoded.example.token_ids.tolist()
        if ours_ids != ids[: len(ours_ids)]:
            continue  # the twin renders otherwise than the family's own template does
        tokens = [tokenizer.decode([i]) for i in ours_ids]
        ours = encoded.example.weights > 0
        prompts = [*_prompts(tokenizer, source, given, tools), *_prompts(tokenizer, twin, given, tools)]
        if not _is_exempt(tokens, ours, theirs[: len(ours)], prompts):
            shown = [(t, bool(a), bool(b)) for t, a, b in zip(tokens, ours, theirs, strict=False)]
            raise AssertionError(f"{name}, {shape}: (token, ours, by hand)\n" + "\n".join(map(str, shown)))
        return "equal"
    return "not comparable"


def _prompts(tokenizer: PreTrainedTokenizerBase, source: str, messages: Any, tools: Any) -> list[str]:
    """What the model sees before each of its answers."""
    asked = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            with contextlib.suppress(*TEMPLATE_FAILURES):
                text = tokenizer.apply_chat_template(
                    messages[:i],
                    tools=tools,
                    chat_template=source,
                    add_generation_prompt=True,
                    tokenize=False,
                )
                asked.append(str(text))
    return asked


def _adapted(
    messages: Sequence[Mapping[str, Any]], content_none: bool = False, text: bool = False
) -> list[Any]:
    adapted = []
    for message in messages:
        changed = dict(message)
        if "tool_calls" in message:
            changed["tool_calls"] = [
                _call(c["function"]["name"], {"city": "Paris"}, "json" if text else "object")
                for c in message["tool_calls"]
            ]
            changed["content"] = message["content"] or (None if text else "")
        adapted.append(changed)
    return adapted


def _parts(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}]}
        if isinstance(m["content"], str)
        else dict(m)
        for m in messages
    ]


@pytest.mark.parametrize("name", _PAIRS)
def test_masks_found_without_marks_are_those_made_by_hand(name: str) -> None:
    source = (_FOLDER / f"{name}.jinja").read_text()
    twin = (_FOLDER / f"{name}_training.jinja").read_text()
    seen = {shape: _compare(name, source, twin, shape) for shape in _SHAPES}
    # Some twins render otherwise than what the family ships; guard against comparing nothing.
    assert seen["one turn"] == "equal", seen
    assert list(seen.values()).count("equal") >= 5, seen


@pytest.mark.parametrize("name", _PAIRS)
def test_marks_of_a_template_are_used(name: str) -> None:
    twin = (_FOLDER / f"{name}_training.jinja").read_text()
    seen = {shape: _compare(name, twin, twin, shape) for shape in _SHAPES}
    assert list(seen.values()).count("equal") >= 5, seen
