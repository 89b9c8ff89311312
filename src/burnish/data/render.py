"""A conversation as the model sees it, and which of its characters the model has to write.

`jinja.py` says which message wrote which character. What is left is the part of an assistant's text
that the model does not write itself:

- in front, the *header*: what `add_generation_prompt` puts there when the model is asked to answer.
  It is learned from small made-up conversations, one per situation (what comes before the answer,
  the row's template arguments, tools or none), and then has to be found, letter by letter, at the
  start of the assistant's text of every row;
- behind, what follows the *end of turn*: white space after the last control token, and a BOS.

Everything between them is trained on, reasoning and tool calls included. Tool results that a template
writes inside the assistant's turn belong to the tool's message and are not.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from burnish.data.jinja import (
    NOBODY,
    TEMPLATE_FAILURES,
    Rendering,
    TrackedTemplate,
    UnprovedRenderingError,
)
from burnish.data.manners import Manners
from burnish.data.problems import RowProblem, shorten
from burnish.records import Message

_NUM_SHOWN_CHARACTERS = 160


@dataclass(frozen=True)
class Span:
    """Characters [start, end) that the model has to write, and the message that they belong to."""

    start: int
    end: int
    message: int


@dataclass(frozen=True)
class RenderedChat:
    """A conversation's text, what in it is the assistant's to write, and who wrote the rest."""

    text: str
    spans: Sequence[Span]
    """In order, none overlapping. Every assistant message with any text has one, or several."""
    pieces: Sequence[tuple[int, int, int]]
    """(start, end, message or NOBODY), covering `text`."""
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class _Header:
    """What stands in front of an answer, in one situation."""

    prompt: str
    """What asking for an answer adds; empty where the turn before it ends with the header."""
    bare: str
    """What all answers begin with; shorter than `prompt` where that opens the reasoning."""
    tail: str
    """What all answers end with, without white space around it; empty where nothing ends them."""


class ChatRenderer:
    """Renders conversations with one template.

    Args:
        source: The template.
        special_tokens: `bos_token` and the like, as the template reads them.
        control_tokens: Every added token that can end a turn.
        today: The date that templates stamp.

    Raises:
        jinja2.TemplateSyntaxError: The template is not Jinja.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        control_tokens: Sequence[str],
        today: datetime.date,
    ) -> None:
        self._template = TrackedTemplate(source, today)
        self._special = dict(special_tokens)
        self._control = tuple(control_tokens)
        self._bos = special_tokens.get("bos_token", "")
        self._eos = special_tokens.get("eos_token", "")
        self._headers: dict[tuple[str, str, bool], _Header | None] = {}
        self._manners = Manners(self._plain)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        arguments: Mapping[str, Any],
    ) -> RenderedChat:
        """Render a conversation.

        Raises:
            RowProblem: `template_error` or `mask_unproved`, with the template's words or output.
        """
        try:
            given, warnings = self._manners.adapt(messages)
            rendering = self._template.render(given, self._variables(tools, arguments))
        except UnprovedRenderingError as error:
            raise RowProblem("mask_unproved", str(error)) from error
        except TEMPLATE_FAILURES as error:
            raise RowProblem("template_error", f"the template says: {error}") from error
        spans: list[Span] = []
        for i, message in enumerate(messages):
            if message.role == "assistant":
                spans += self._answer(rendering, messages, i, tools, arguments)
        spans += self._closing_eos(rendering, messages)
        if self._template.has_generation:
            spans = _within(spans, rendering.generated)
        if tools and not self._shows_tools:
            warnings = (*warnings, "the template does not show the tools that the row offers")
        return RenderedChat(rendering.text, spans, rendering.pieces, warnings)

    def _variables(
        self, tools: Sequence[Mapping[str, Any]] | None, arguments: Mapping[str, Any], prompt: bool = False
    ) -> dict[str, Any]:
        standard = {"tools": tools, "documents": None, "add_generation_prompt": prompt}
        return {**self._special, **standard, **arguments}

    def _plain(self, messages: Sequence[Mapping[str, Any]]) -> str:
        return self._template.plain(messages, self._variables(None, {}))

    @cached_property
    def _shows_tools(self) -> bool:
        """Whether the template writes a made-up tool, with or without a system's turn."""
        for lead in (_LEADS[""], _LEADS["system"]):
            try:
                given, _ = self._manners.adapt([*lead, _ASK])
                if "toolqx" in self._template.plain(given, self._variables([_TOOL], {})):
                    return True
            except TEMPLATE_FAILURES:
                continue
        return False

    # -- one answer ------------------------------------------------------------------------------

    def _answer(
        self,
        rendering: Rendering,
        messages: Sequence[Message],
        i: int,
        tools: Sequence[Mapping[str, Any]] | None,
        arguments: Mapping[str, Any],
    ) -> list[Span]:
        """What message i's model has to write: its text without header and without what follows."""
        runs = [(start, end) for start, end, owner in rendering.pieces if owner == i]
        if not runs:
            if messages[i].content or messages[i].extra.get("tool_calls"):
                raise _unproved("the template leaves an assistant's turn out", rendering.text, 0)
            return []
        start, first_end = runs[0]
        before = messages[i - 1].role if i else ""
        learned = self._learned_header(before, tools, arguments)
        header = None if learned is None else _header_of(rendering.text[start:first_end], learned)
        if header is None:
            if not self._template.has_generation:
                raise _unproved("no generation prompt stands in front of an answer", rendering.text, start)
            header = ""
        runs[0] = (start + len(header), first_end)
        runs[-1] = (runs[-1][0], self._end_of_turn(rendering, *runs[-1], learned))
        return [Span(a, b, i) for a, b in runs if a < b]

    def _end_of_turn(self, rendering: Rendering, start: int, end: int, learned: _Header | None) -> int:
        """Where the end of turn ends, within or right behind the characters [start, end).

        It is the last control token of the text, or the words that end every turn of a template made
        without control tokens. A template that ends its turns by nothing (GLM's) leaves it to the next
        turn's first control token, which is then what the model has to write to stop; where nothing
        follows, nothing is invented.
        """
        text = rendering.text
        if learned is not None and not learned.tail:
            follows = [token for token in self._control if text.startswith(token, end) and token != self._bos]
            return end + max((len(token) for token in follows), default=0)
        stop = end
        while True:
            stop = start + len(text[start:stop].rstrip())
            foreign = [token for token in self._not_ours if text.endswith(token, start, stop)]
            if not foreign:
                break
            stop -= len(foreign[0])
        ends = (*self._control, learned.tail) if learned is not None else self._control
        return stop if ends and text.endswith(ends, start, stop) else end

    @cached_property
    def _not_ours(self) -> tuple[str, ...]:
        """Control tokens that may stand behind an answer without being its end: the BOS of what comes
        next, and what opens a tool's result (Gemma 4 writes it although no result follows)."""
        bos = (self._bos,) if self._bos and self._bos != self._eos else ()
        asked = self._try(_LEADS["tool"], None, {})
        run = None if asked is None else _first_run(asked, len(_LEADS["tool"]) - 1)
        if asked is None or run is None:
            return bos
        return bos + tuple(token for token in self._control if asked.text.startswith(token, run[0]))[:1]

    def _closing_eos(self, rendering: Rendering, messages: Sequence[Message]) -> list[Span]:
        """An EOS that the template writes behind the whole conversation (Phi-3's) is learned too."""
        if not self._eos or len(rendering.pieces) < 2 or messages[-1].role != "assistant":
            return []
        (_, before_end, before), (start, end, owner) = rendering.pieces[-2:]
        if owner != NOBODY or before != len(messages) - 1 or before_end != start:
            return []
        rest = rendering.text[start:end]
        if rest.strip() != self._eos:
            return []
        start += rest.index(self._eos)
        return [Span(start, start + len(self._eos), before)]

    # -- headers ---------------------------------------------------------------------------------

    def _learned_header(
        self, before: str, tools: Sequence[Mapping[str, Any]] | None, arguments: Mapping[str, Any]
    ) -> _Header | None:
        given = json.dumps(arguments, sort_keys=True, default=str) if arguments else ""
        key = (before, given, bool(tools))
        if key not in self._headers:
            header = self._learn_header(before, tools, arguments)
            if header is None and before != "user":
                header = self._learned_header("user", tools, arguments)
            self._headers[key] = header
        return self._headers[key]

    def _learn_header(
        self, before: str, tools: Sequence[Mapping[str, Any]] | None, arguments: Mapping[str, Any]
    ) -> _Header | None:
        """See what asking for an answer adds, and how answers begin, after `before`."""
        lead = _LEADS.get(before, _LEADS["user"])
        openings: list[str] = []
        prompt: str | None = None
        for tail in _TAILS:
            full = self._try([*lead, *tail], tools, arguments)
            run = None if full is None else _first_run(full, len(lead))
            if full is None or run is None:
                continue
            openings.append(full.text[run[0] : run[1]])
            if prompt is None:
                prompt = self._prompt(lead, full.text[: run[0]], tools, arguments)
        if prompt is None or len(openings) < 2:
            return None
        # The first three answer with words, the first in others than the next two.
        tails = [_common_start([openings[0][::-1], other[::-1]])[::-1].strip() for other in openings[1:3]]
        tail = max(tails, key=len)
        if prompt:
            return _Header(prompt, _common_start([prompt, *openings]), tail)
        bare = _common_start(openings)
        # White space alone is no header: the model of an "[/INST]" template writes it.
        bare = bare if bare.strip() and self._ignores_prompt(lead, tools, arguments) else ""
        return _Header("", bare, tail)

    def _prompt(
        self,
        lead: Sequence[Message],
        before_answer: str,
        tools: Sequence[Mapping[str, Any]] | None,
        arguments: Mapping[str, Any],
    ) -> str | None:
        """What the generation prompt adds to the text before an answer; None if they differ."""
        given, _ = self._manners.adapt(lead)
        try:
            asked = self._template.plain(given, self._variables(tools, arguments, prompt=True))
        except TEMPLATE_FAILURES:
            return None
        if asked.startswith(before_answer):
            return asked[len(before_answer) :]
        return "" if before_answer.startswith(asked.rstrip()) and asked.strip() else None

    def _ignores_prompt(
        self,
        lead: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        arguments: Mapping[str, Any],
    ) -> bool:
        given, _ = self._manners.adapt(lead)
        asked = self._template.plain(given, self._variables(tools, arguments, prompt=True))
        return asked == self._template.plain(given, self._variables(tools, arguments))

    def _try(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        arguments: Mapping[str, Any],
    ) -> Rendering | None:
        """A made-up conversation rendered; None if the template refuses or hides it."""
        try:
            given, _ = self._manners.adapt(messages)
            return self._template.render(given, self._variables(tools, arguments))
        except (*TEMPLATE_FAILURES, UnprovedRenderingError):
            return None


def _common_start(texts: Sequence[str]) -> str:
    """The longest text that all of them start with."""
    low, high = min(texts), max(texts)
    same = 0
    while same < min(len(low), len(high)) and low[same] == high[same]:
        same += 1
    return low[:same]


def _first_run(rendering: Rendering, message: int) -> tuple[int, int] | None:
    for start, end, owner in rendering.pieces:
        if owner == message:
            return start, end
    return None


def _header_of(text: str, learned: _Header) -> str | None:
    """The header at the start of an assistant's text; None if it cannot be told."""
    if text.startswith(learned.prompt):
        # Nothing of a prompt that was written with the turn before is left to be found here.
        return learned.prompt or (learned.bare if text.startswith(learned.bare) else "")
    if learned.bare and text.startswith(learned.bare):
        return learned.bare
    # A turn that goes on after a tool's result has no header: not one letter of it is there.
    return "" if not _common_start([text, learned.prompt]) else None


def _within(spans: Sequence[Span], marked: Sequence[tuple[int, int]]) -> list[Span]:
    """The parts of the spans that stand between the template's own generation marks."""
    parts = [
        Span(max(span.start, start), min(span.end, end), span.message)
        for span in spans
        for start, end in marked
    ]
    return [part for part in parts if part.start < part.end]


def _unproved(what: str, text: str, position: int) -> RowProblem:
    """A problem that shows the template's output around the spot."""
    around = text[max(0, position - _NUM_SHOWN_CHARACTERS // 2) : position + _NUM_SHOWN_CHARACTERS]
    return RowProblem(
        "mask_unproved", f"{what}; its output there: {shorten(around, 2 * _NUM_SHOWN_CHARACTERS)}"
    )


_CALL = {"id": "call00000", "type": "function", "function": {"name": "fqx", "arguments": {"kqx": "vqx"}}}
_TOOL = {
    "type": "function",
    "function": {
        "name": "toolqx",
        "description": "dqx",
        "parameters": {"type": "object", "properties": {"kqx": {"type": "string", "description": "pqx"}}},
    },
}
_ASK = Message("user", "uqx")
_RESULT = Message("tool", "rqx", {"tool_call_id": "call00000", "name": "fqx"})
_CALLING = Message("assistant", "", {"tool_calls": [_CALL]})
_ANSWER = Message("assistant", "Aqx")
_OTHER = Message("assistant", "Zjk")

_LEADS: Mapping[str, Sequence[Message]] = {
    "": (),
    "system": (Message("system", "sqx"),),
    "user": (_ASK,),
    "tool": (_ASK, _CALLING, _RESULT),
    "assistant": (_ASK, _ANSWER),
}
"""What stands before an answer, by the role just before it."""

_TAILS: Sequence[Sequence[Message]] = (
    (_ANSWER,),
    (_OTHER,),
    (_OTHER, _ASK, _ANSWER),
    (_CALLING, _RESULT, _ANSWER),
)
"""Answers that begin differently: no two share a letter that the template did not write."""

__all__ = ["ChatRenderer", "RenderedChat", "Span"]
