"""Rows of every shape become the same conversations."""

import json

import pytest

from burnish.config.schema import SourceConfig
from burnish.data.format import DEFAULT_POLICIES, RowFormat, detect_format, to_conversation
from burnish.data.problems import RowProblem
from burnish.data.rows import Row
from burnish.data.texts import Mender
from burnish.errors import DataError
from burnish.records import Conversation, Message

CALL = {"type": "function", "function": {"name": "area", "arguments": {"a": [1, 2]}}}
TOOL = {"type": "function", "function": {"name": "area", "description": "d", "parameters": {}}}


def detect(*rows: dict, **source) -> RowFormat:
    return detect_format(SourceConfig(path="x.jsonl", **source), rows)


def convert(row: dict, fmt: RowFormat | None = None, **policies) -> Conversation:
    mender = Mender({**DEFAULT_POLICIES, **policies})
    return to_conversation(Row("x", "x.jsonl:1", row), fmt or detect(row), mender)


def turns(conversation: Conversation) -> list[tuple]:
    assert conversation.messages is not None
    return [(m.role, m.content) for m in conversation.messages]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "messages"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt"),
        (
            {"conversations": [{"role": "user", "content": "q"}, {"role": "model", "content": "a"}]},
            "messages",
        ),
        ({"messages": '[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]'}, "sharegpt"),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca"),
        ({"instruction": "q", "response": "a"}, "alpaca"),
        ({"prompt": "q", "completion": "a"}, "prompt_completion"),
        ({"question": "q", "answer": "a"}, "prompt_completion"),
        ({"prompt": [{"role": "user", "content": "q"}], "completion": "a"}, "prompt_completion"),
        (
            {
                "prompt": [{"role": "user", "content": "q"}],
                "completion": [{"role": "assistant", "content": "a"}],
            },
            "prompt_completion",
        ),
    ],
)
def test_every_shape_is_detected_and_means_the_same(row, name):
    fmt = detect(row)
    assert fmt.name == name
    assert turns(convert(row, fmt)) == [("user", "q"), ("assistant", "a")]
    assert convert(row, detect(row, format=name)) == convert(row, fmt)


@pytest.mark.parametrize(
    ("row", "found", "settled"),
    [
        (
            {"instruction": "Add.", "input": "1 and 2", "completion": "3"},
            "input and instruction may each be the prompt",
            {"format": "alpaca", "columns": {"output": "completion"}},
        ),
        (
            {"prompt": "q", "question": "r", "completion": "a"},
            "prompt and question may each be the prompt",
            {"columns": {"prompt": "question"}},
        ),
        (
            {"question": "q", "answer": "a", "response": "b"},
            "response and answer may each be the completion",
            {"columns": {"completion": "answer"}},
        ),
    ],
)
def test_of_two_columns_for_one_thing_none_is_left_out_in_silence(row, found, settled):
    with pytest.raises(DataError, match=found):
        detect(row)
    with pytest.raises(DataError, match=found):
        detect(row, format="prompt_completion")
    assert detect(row, **settled).name in ("alpaca", "prompt_completion")


def test_text_and_tokens():
    assert convert({"text": "Once upon"}).text == "Once upon"
    tokens = convert({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]})
    assert tokens.token_ids == [1, 2, 3] and tokens.token_weights == [0.0, 1.0, 1.0]
    assert convert({"input_ids": [1, 2], "mask": [0, 1]}).token_weights == [0.0, 1.0]
    assert convert({"input_ids": [1, 2], "weights": [0.5, 2]}).token_weights == [0.5, 2.0]
    assert convert({"tokens": "[1, 2]"}).token_weights == [1.0, 1.0]


def test_alpaca_with_input_system_and_history():
    row = {
        "instruction": "Add",
        "input": "1 2",
        "output": "3",
        "system": "Be brief.",
        "history": [["Hi", "Yo"], ["How?", "So"]],
    }
    assert turns(convert(row)) == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Yo"),
        ("user", "How?"),
        ("assistant", "So"),
        ("user", "Add\n\n1 2"),
        ("assistant", "3"),
    ]


def test_sharegpt_calls_and_results_become_tool_calls():
    row = {
        "system": "Use tools.",
        "tools": json.dumps([TOOL["function"]]),
        "conversations": [
            {"from": "human", "value": "Area?"},
            {"from": "gpt", "value": "Let me see."},
            {"from": "function_call", "value": '{"name": "area", "arguments": {"a": [1, 2]}}'},
            {"from": "observation", "value": '{"area": 2}'},
            {"from": "gpt", "value": "2"},
        ],
    }
    conversation = convert(row)
    assert conversation.tools == [TOOL]
    assert conversation.messages == [
        Message("system", "Use tools."),
        Message("user", "Area?"),
        Message("assistant", "Let me see.", {"tool_calls": [CALL]}),
        Message("tool", '{"area": 2}'),
        Message("assistant", "2"),
    ]


def test_parallel_calls_of_sharegpt_are_one_turn():
    call = {"from": "function_call", "value": {"name": "area", "arguments": '{"a": [1, 2]}'}}
    result = {"from": "observation", "value": "2"}
    row = {
        "conversations": [
            {"from": "human", "value": "Areas?"},
            *([call] * 2),
            *([result] * 2),
            {"from": "gpt", "value": "2, 2"},
        ]
    }
    messages = convert(row).messages
    assert messages is not None
    assert [m.role for m in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert messages[1].extra["tool_calls"] == [CALL, CALL] and messages[1].content is None


@pytest.mark.parametrize(
    "calls",
    [
        [{"id": "c1", "type": "function", "function": {"name": "area", "arguments": '{"a": [1, 2]}'}}],
        [{"id": "c1", "name": "area", "arguments": {"a": [1, 2]}}],
        '[{"id": "c1", "function": {"name": "area", "arguments": "{\\"a\\": [1, 2]}"}}]',
        {"id": "c1", "name": "area", "parameters": {"a": [1, 2]}},
    ],
)
def test_openai_calls_have_objects_for_arguments(calls):
    row = {
        "messages": [
            {"role": "user", "content": "Area?"},
            {"role": "assistant", "content": None, "tool_calls": calls, "reasoning_content": "Hm."},
            {"role": "tool", "tool_call_id": "c1", "name": "area", "content": "2"},
            {"role": "assistant", "content": "2"},
        ],
        "tools": [TOOL],
        "chat_template_kwargs": {"enable_thinking": True},
    }
    conversation = convert(row)
    assert conversation.messages is not None and conversation.template_kwargs == {"enable_thinking": True}
    call, result = conversation.messages[1], conversation.messages[2]
    assert call.content is None
    assert call.extra == {"tool_calls": [{**CALL, "id": "c1"}], "reasoning_content": "Hm.", "thinking": "Hm."}
    assert result.extra == {"tool_call_id": "c1", "name": "area"}


def test_messages_say_whether_they_are_trained_on():
    row = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "train": False},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d", "weight": 0.5},
        ]
    }
    messages = convert(row).messages
    assert messages is not None
    assert [(m.train, m.weight) for m in messages] == [(None, 1), (False, 1), (None, 1), (None, 0.5)]


def test_of_a_prompt_of_messages_nothing_is_trained_on():
    prompt = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    messages = convert({"prompt": prompt, "completion": "d"}).messages
    assert messages is not None
    assert [m.train for m in messages] == [False, False, False, None]


def test_a_null_in_a_prompts_message_does_not_train_on_it():
    prompt = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "train": None},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "train": True},
        {"role": "user", "content": "e"},
    ]
    messages = convert({"prompt": prompt, "completion": "f"}).messages
    assert messages is not None
    assert [m.train for m in messages if m.role == "assistant"] == [False, True, None]


def test_joining_two_turns_of_an_assistant_loses_no_reasoning():
    first = {"role": "assistant", "content": "a", "reasoning_content": "one"}
    calls = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    user, result = {"role": "user", "content": "q"}, {"role": "tool", "content": "2"}
    end = {"role": "assistant", "content": "b"}
    messages = convert({"messages": [user, first, calls, result, end]}).messages
    assert messages is not None and len(messages) == 4
    assert messages[1].extra["reasoning_content"] == "one" and messages[1].extra["tool_calls"] == [CALL]
    for second in ({**calls, "reasoning_content": "two"}, {**first, "content": None}):
        with pytest.raises(RowProblem, match="repeated_role"):
            convert({"messages": [user, first, second, result, end]})


def test_columns_say_how_ours_are_called():
    row = {"q": "question", "a": "answer", "text": "no"}
    fmt = detect(row, columns={"prompt": "q", "completion": "a"})
    assert fmt == RowFormat("prompt_completion", {"prompt": "q", "completion": "a"})
    assert turns(convert(row, fmt)) == [("user", "question"), ("assistant", "answer")]
    dialog = {"dialog": [{"speaker": "user", "says": "q"}, {"speaker": "bot", "says": "a"}]}
    fmt = detect(dialog, columns={"messages": "dialog", "role": "speaker", "content": "says"})
    as_text = {"dialog": json.dumps(dialog["dialog"])}
    assert turns(convert(as_text, fmt)) == turns(convert(dialog, fmt))
    assert turns(convert(dialog, fmt)) == [("user", "q"), ("assistant", "a")]
    sharegpt = {"turns": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert detect(sharegpt, columns={"conversations": "turns"}).name == "sharegpt"


def test_what_cannot_be_detected_says_what_there_is():
    with pytest.raises(DataError, match=r"there is no column 'quesiton'.*\n.*Did you mean 'question'"):
        detect({"question": "q"}, columns={"prompt": "quesiton"})
    with pytest.raises(DataError, match="format text needs the columns text; there are: a, b"):
        detect({"a": 1, "b": 2}, format="text")
    with pytest.raises(DataError, match="no known format"):
        detect({"a": 1})


def test_turns_of_one_role_are_joined_only_when_asked():
    row = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": "d"},
        ]
    }
    with pytest.raises(RowProblem) as caught:
        convert(row, repeated_role="error")
    assert caught.value.rule == "repeated_role"
    assert turns(convert(row, repeated_role="fix")) == [("user", "a\n\nb"), ("assistant", "c")]


def test_texts_are_mended():
    row = {"prompt": "a\x00b", "completion": "\ud83d\ude00 \ud83d!"}
    conversation = convert(row, nul_character="fix", lone_surrogate="fix")
    assert turns(conversation) == [("user", "ab"), ("assistant", "😀 \ufffd!")]
