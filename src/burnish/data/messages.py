"""One conversation, normalised: roles, contents, tool calls, weights, and the order of turns.

OpenAI's shape (`role`, `content`, `tool_calls`) and ShareGPT's (`from`, `value`, with
`function_call` and `observation` as speakers) come out as the same `Message`s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from burnish.data.problems import RowProblem, shorten
from burnish.data.texts import Mender, as_text, clean_value, is_missing, parsed_json
from burnish.data.tools import normal_tool_calls
from burnish.records import Message

ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool_calls": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
"""How sources call the speakers, and how templates do."""

CALLERS = ("function_call", "tool_call", "tool_calls")
"""Speakers whose text is the tool calls, as JSON."""

_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value")
_TRAIN_KEYS = ("train", "training")
_WEIGHT_KEYS = ("weight", "loss_weight")
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_MAX_WEIGHT = 3.4e38
"""Just below the largest float32."""
_CONSUMED = frozenset(
    (
        *_ROLE_KEYS,
        *_CONTENT_KEYS,
        *_TRAIN_KEYS,
        *_WEIGHT_KEYS,
        *_REASONING_KEYS,
        "tool_calls",
        "function_call",
    )
)


def message_list(value: Any, mender: Mender) -> list[Any]:
    """A row's cell of messages: a list, or one as a JSON string.

    Raises:
        RowProblem: It is neither, or is not to be read as JSON.
    """
    if isinstance(value, str):
        mender.mend("messages_as_text", f"messages are the text {shorten(value, 30)}")
        value = parsed_json(value, "messages_not_a_list", "messages")
    if not isinstance(value, list):
        raise RowProblem("messages_not_a_list", f"messages are {shorten(value)}")
    return value


def normal_messages(values: Sequence[Any], system: str | None, mender: Mender) -> list[Message]:
    """A row's messages, normalised, in an order of turns that can be trained on.

    Args:
        values: The messages, as `normal_message` takes each.
        system: Text of a system turn that the row keeps apart; ignored where there is one.
        mender: What to do about flaws.

    Raises:
        RowProblem: The conversation cannot be used as it is.
    """
    messages = [normal_message(item, f"message {index + 1}", mender) for index, item in enumerate(values)]
    if system and not (messages and messages[0].role in ("system", "developer")):
        messages.insert(0, Message("system", system))
    return ordered_turns(messages, mender)


def normal_message(value: Any, where: str, mender: Mender) -> Message:
    """One message, normalised.

    Args:
        value: An object with `role` or `from`, `content` or `value`, and what else there is.
        where: How messages about it call it (`message 3`).
        mender: What to do about flaws.

    Raises:
        RowProblem: It cannot be used as it is.
    """
    if not isinstance(value, dict):
        raise RowProblem("message_not_an_object", f"{where} is {shorten(value)}")
    speaker = _first(value, _ROLE_KEYS)
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise RowProblem("unknown_role", f"{where} has the role {shorten(speaker)}")
    extra = _extra(value, where, mender)
    content_value = _first(value, _CONTENT_KEYS)
    calls = value.get("tool_calls")
    if isinstance(speaker, str) and speaker.lower() in CALLERS:
        calls, content_value = _calls_of_text(content_value, where, mender), None
    elif not calls and isinstance(value.get("function_call"), (dict, str)):
        calls = value["function_call"]  # OpenAI's older form
    if calls and not is_missing(calls, where, mender):
        extra["tool_calls"] = normal_tool_calls(calls, where, mender)
    content = as_text(content_value, where, mender)
    if content is None and not ("tool_calls" in extra or "reasoning_content" in extra):
        raise RowProblem("content_missing", f"{where} ({role}) has no content")
    return Message(role, content, extra, *_training(value, where))


def _first(value: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """The first of the keys that is given; None where none is."""
    for key in keys:
        found = value.get(key)
        if found is not None:
            return found
    return None


def _extra(value: Mapping[str, Any], where: str, mender: Mender) -> dict[str, Any]:
    extra = {
        key: clean_value(item, where, mender)
        for key, item in value.items()
        if key not in _CONSUMED and item is not None
    }
    reasoning = as_text(_first(value, _REASONING_KEYS), f"reasoning of {where}", mender)
    if reasoning:
        # Qwen and DeepSeek templates read the one name, gpt-oss's the other.
        extra["reasoning_content"] = extra["thinking"] = reasoning
    return extra


def _calls_of_text(value: Any, where: str, mender: Mender) -> Any:
    text = as_text(value, where, mender) if not isinstance(value, (dict, list)) else value
    if not text:
        raise RowProblem("bad_tool_calls", f"{where} calls no tool")
    return text


def _training(value: Mapping[str, Any], where: str) -> tuple[bool | None, float]:
    train = _first(value, _TRAIN_KEYS)
    if train is not None and not isinstance(train, bool):
        if train not in (0, 1):
            raise RowProblem("bad_weight", f"{where} has train: {shorten(train)}")
        train = bool(train)
    weight = _first(value, _WEIGHT_KEYS)
    if weight is None:
        return train, 1.0
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise RowProblem("bad_weight", f"{where} has weight: {shorten(weight)}")
    if not is_weight(weight):
        raise RowProblem("bad_weight", f"{where} has weight: {shorten(weight)}")
    return train, float(weight)


def is_weight(value: int | float) -> bool:
    """Whether a token can have this weight: 0 or more, and finite as the float32 that is stored."""
    return 0 <= value <= _MAX_WEIGHT  # compared as they are: NaN fails, and no integer is too large to


def ordered_turns(messages: list[Message], mender: Mender) -> list[Message]:
    """Messages whose order makes sense, mended where it does not.

    Raises:
        RowProblem: There is nothing to learn, or the order is wrong and is not to be mended.
    """
    if not messages:
        raise RowProblem("empty_messages")
    last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
    if last < 0:
        roles = ", ".join(message.role for message in messages[:5])
        raise RowProblem("no_assistant_turn", f"only turns of: {roles}")
    if last + 1 < len(messages):
        mender.mend("last_turn_not_assistant", f"the last turn is the {messages[-1].role}'s")
        messages = messages[: last + 1]
    messages = _joined(messages, mender)
    first = next(m.role for m in messages if m.role not in ("system", "developer"))
    if first == "assistant":
        mender.mend("assistant_first", "the assistant speaks before any user")
    for index, message in enumerate(messages):
        _check_filled(message, f"message {index + 1}", mender)
    return messages


def _joined(messages: list[Message], mender: Mender) -> list[Message]:
    joined: list[Message] = []
    for index, message in enumerate(messages):
        before = joined[-1] if joined else None
        if before is None or before.role != message.role or message.role == "tool":
            joined.append(message)  # results of parallel calls follow each other rightly
            continue
        if message.role == "assistant" and _only_calls_more(before, message):
            joined[-1] = _with_calls(before, message)  # ShareGPT splits a turn that talks and calls
            continue
        mender.mend("repeated_role", f"messages {index} and {index + 1} are both the {message.role}'s")
        joined[-1:] = _merged(before, message)
    return joined


def _same_training(a: Message, b: Message) -> bool:
    return (a.train, a.weight) == (b.train, b.weight)


def _only_calls_more(talk: Message, call: Message) -> bool:
    """Whether the second message only adds tool calls, and says nothing else that differs from the first."""
    said = {key: value for key, value in call.extra.items() if key != "tool_calls"}
    is_new = all(talk.extra.get(key, value) == value for key, value in said.items())
    return call.content is None and "tool_calls" in call.extra and is_new and _same_training(talk, call)


def _with_calls(talk: Message, call: Message) -> Message:
    calls = [*talk.extra.get("tool_calls", ()), *call.extra.get("tool_calls", ())]
    extra = {**talk.extra, **call.extra, "tool_calls": calls}
    return dataclasses.replace(talk, extra=extra)


def _merged(a: Message, b: Message) -> list[Message]:
    """One message of two, or both where joining would lose a weight or a tool call."""
    if a.extra or b.extra or not _same_training(a, b):
        return [a, b]
    return [dataclasses.replace(a, content=f"{a.content}\n\n{b.content}")]


def _check_filled(message: Message, where: str, mender: Mender) -> None:
    if isinstance(message.content, str) and message.content.strip():
        return
    if message.role == "user":
        mender.mend("empty_prompt", f"{where} (user) is empty")
        return
    trained = message.role == "assistant" and message.train is not False and message.weight > 0
    if trained and not message.extra.get("tool_calls"):
        mender.mend("empty_answer", f"{where} (assistant) is empty")
