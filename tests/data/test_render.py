"""Who wrote which character of a rendering, and what is refused instead of guessed."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from burnish.data.jinja import NOBODY, TrackedTemplate, UnprovedRenderingError
from burnish.data.problems import RowProblem
from burnish.data.render import ChatRenderer, RenderedChat
from burnish.data.tokenizer import builtin_templates
from burnish.records import Message

TODAY = datetime.date(2024, 5, 6)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CONTROL = ("<|im_start|>", "<|im_end|>", "</s>", "<s>", "<|end|>", "<|call|>", "<|user|>", "<|bot|>")
TURN = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def _render(template: str, *turns: Any, tools: Any = None, **arguments: Any) -> RenderedChat:
    messages = [
        turn if isinstance(turn, Message) else Message("assistant" if i % 2 else "user", turn)
        for i, turn in enumerate(turns)
    ]
    return ChatRenderer(template, SPECIAL, CONTROL, TODAY).render(messages, tools, arguments)


def _learned(template: str, *turns: Any, **more: Any) -> list[str]:
    chat = _render(template, *turns, **more)
    return [chat.text[span.start : span.end] for span in chat.spans]


@pytest.mark.parametrize(
    "loop",
    [
        "{% for m in messages %}" + TURN + "{% endfor %}",
        "{% set ms = messages[:] %}{% for m in ms if m.role %}" + TURN + "{% endfor %}",
        "{% for i in range(messages | length) %}{% set m = messages[i] %}" + TURN + "{% endfor %}",
        "{% macro turn(m) %}" + TURN + "{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}",
        "{% macro all() %}{% for m in messages %}" + TURN + "{% endfor %}{% endmacro %}{{ all() }}",
        "{% set all %}{% for m in messages %}" + TURN + "{% endfor %}{% endset %}{{ all }}",
        "{% for m in messages %}{% if loop.first %}<s>{% endif %}{% if m.role == 'x' %}{% continue %}"
        "{% endif %}" + TURN + "{% endfor %}",
    ],
)
def test_loops_of_every_kind(loop: str) -> None:
    turns = ("Hi", "assistant", "assistant", "<|im_start|>assistant\n")
    assert _learned(loop + PROMPT, *turns) == ["assistant<|im_end|>", "<|im_start|>assistant\n<|im_end|>"]


def test_a_template_that_never_asks_for_an_answer_still_has_a_header() -> None:
    assert _learned("{% for m in messages %}" + TURN + "{% endfor %}", "Hi", "Hello") == ["Hello<|im_end|>"]


def test_a_header_that_ends_the_users_turn() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
    )
    assert _learned(template, "Hi", "Hello", "a", "b") == [" Hello </s>", " b </s>"]


def test_a_prompt_that_opens_the_reasoning_is_not_learned_where_it_was_written() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.role == 'assistant' and loop.last %}{{ '<think>\\n' }}{% endif %}"
        "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
    )
    assert _learned(template, "Hi", "<thin", "a", "b") == ["<thin<|im_end|>", "b<|im_end|>"]


def test_what_follows_the_end_of_turn_is_not_learned() -> None:
    template = (
        "{% for m in messages %}" + TURN.replace("<|im_end|>\\n", "</s><s>\\n ") + "{% endfor %}" + PROMPT
    )
    assert _learned(template, "Hi", "Hello ") == ["Hello </s>"]


def test_a_turn_that_only_the_next_header_ends() -> None:
    template = (
        "{% for m in messages %}{{ ('<|user|>' if m.role == 'user' else '<|bot|>') + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|bot|>{% endif %}"
    )
    assert _learned(template, "Hi", "Hello", "a", "b") == ["Hello<|user|>", "b"]


def test_tool_results_inside_the_assistants_turn_are_not_learned() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content + '<|end|>' }}"
        "{% elif m.role == 'assistant' %}{{ '<|bot|>' if messages[loop.index0 - 1].role == 'user' }}"
        "{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
        "{{ '<|call|>' + c.function.name + (c.function.arguments | tojson) }}{% endfor %}"
        "{% for k in range(loop.index0 + 1, messages | length) %}{% set r = messages[k] %}"
        "{% if r.role == 'tool' %}{{ '(' + r.content + ')' }}{% else %}{% break %}{% endif %}{% endfor %}"
        "{% if loop.last or messages[loop.index0 + 1].role == 'user' %}<|end|>{% endif %}"
        "{% endif %}{% endfor %}{% if add_generation_prompt and messages[-1].role == 'user' %}"
        "<|bot|>{% endif %}"
    )
    call = {"type": "function", "function": {"name": "look", "arguments": {"a": 1}}}
    turns = [
        Message("user", "Hi"),
        Message("assistant", "", {"tool_calls": [call]}),
        Message("tool", "secret"),
        Message("assistant", "Done"),
    ]
    assert _learned(template, *turns) == ['<|call|>look{"a": 1}', "Done<|end|>"]


def test_generation_marks_are_used_less_header_and_trailing_white_space() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}" + TURN + "{% endgeneration %}"
        "{% else %}" + TURN + "{% endif %}{% endfor %}" + PROMPT
    )
    assert _learned(template, "Hi", "Hello") == ["Hello<|im_end|>"]
    only_some = template.replace("{% if m.role == 'assistant' %}", "{% if m.content == 'yes' %}")
    assert _learned(only_some, "Hi", "no", "Hi", "yes") == ["yes<|im_end|>"]


def test_text_that_nobody_wrote_is_nobodys() -> None:
    template = "<s>default{% for m in messages %}" + TURN + "{% endfor %}end"
    chat = _render(template, "Hi", "Hello")
    assert [owner for _, _, owner in chat.pieces] == [NOBODY, 0, 1, NOBODY]
    assert "".join(chat.text[a:b] for a, b, _ in chat.pieces) == chat.text


def test_a_template_that_looks_at_its_own_output_is_refused() -> None:
    template = (
        "{% set all %}{% for m in messages %}"
        + TURN
        + "{% endfor %}{% endset %}{{ all | length }}{{ all }}"
        + PROMPT
    )
    with pytest.raises(RowProblem) as caught:
        _render(template, "Hi", "Hello")
    assert caught.value.rule == "mask_unproved"


def test_a_template_that_writes_two_messages_at_once_is_refused() -> None:
    template = (
        "{% for i in range(0, messages | length, 2) %}{% set u = messages[i] %}{% set a = messages[i + 1] %}"
        "{{ u.content + '->' + a.content }}{% endfor %}"
    )
    with pytest.raises(RowProblem) as caught:
        _render(template, "Hi", "Hello")
    assert caught.value.rule == "mask_unproved"


def test_an_unknown_header_is_refused_and_shown() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + (m.role if m.content != 'odd' else 'assist!') + '\\n' "
        "+ m.content + '<|im_end|>\\n' }}{% endfor %}" + PROMPT
    )
    with pytest.raises(RowProblem, match="assist!") as caught:
        _render(template, "Hi", "odd")
    assert caught.value.rule == "mask_unproved"


def test_what_a_template_says_is_passed_on() -> None:
    template = (
        "{% for m in messages %}{{ raise_exception('no system here') if m.role == 'system' }}{% endfor %}"
    )
    with pytest.raises(RowProblem, match="no system here") as caught:
        _render(template, Message("system", "x"), "Hi", "Hello")
    assert caught.value.rule == "template_error"


def test_dates_are_the_same_for_all_rows_and_can_be_chosen() -> None:
    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT
    assert _render(template, "Hi", "Hello").text.startswith("06 May 2024<|im_start|>")


def test_private_characters_in_a_text_do_not_pass_for_marks() -> None:
    text = "\ue000\ue001 \ue003"
    assert _learned("{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT, text, text) == [
        text + "<|im_end|>"
    ]
    both = text + "\U000f0000"
    with pytest.raises(RowProblem) as caught:
        _learned("{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT, both, both)
    assert caught.value.rule == "mask_unproved"


def test_the_sandbox_holds() -> None:
    for attack in (
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ namespace(__x=1).__init__ }}",
    ):
        with pytest.raises(Exception):  # noqa: B017 - any refusal will do
            template = TrackedTemplate(attack + "{{ x.y }}", TODAY)
            template.render([{"role": "user", "content": ""}], {})
    with pytest.raises(UnprovedRenderingError):
        TrackedTemplate(
            "{% set x %}{% for m in messages %}a{% endfor %}{% endset %}{{ x | length }}", TODAY
        ).render([{"role": "user"}], {})


def test_tools_that_a_template_leaves_out_are_told() -> None:
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
    loop = "{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT
    assert _render(loop, "Hi", "Hello", tools=[tool]).warnings == (
        "the template does not show the tools that the row offers",
    )
    assert _render(loop, "Hi", "Hello").warnings == ()
    listed = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + loop
    assert _render(listed, "Hi", "Hello", tools=[tool]).warnings == ()


def test_the_built_in_chatml_shows_tools_once_beside_the_systems_words() -> None:
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
    turns = (Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hello"))
    chatml = builtin_templates()["chatml"]
    plain = _render(chatml, *turns)
    assert plain.text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi")
    for given, start in ((turns, "system\nBe brief.\n\n# Tools\n"), (turns[1:], "system\n# Tools\n")):
        chat = _render(chatml, *given, tools=[tool])
        assert (chat.text.removeprefix("<|im_start|>").startswith(start), chat.warnings) == (True, ())
        assert chat.text.count("<|im_start|>system") == chat.text.count('"find"') == 1
        assert [chat.text[s.start : s.end] for s in chat.spans] == ["Hello<|im_end|>"]
