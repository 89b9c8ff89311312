"""What shapes of message a template takes, found by asking it, and messages put into those shapes.

Templates disagree: content as text or as a list of parts, tool arguments as an object or as JSON text,
no content beside tool calls as no key at all (what transformers makes of None), as None, or as "". Each
question is asked once, with a made-up conversation; a message goes through as it is wherever the
template shows it that way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from burnish.data.jinja import TEMPLATE_FAILURES
from burnish.records import Message

_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
"""Names that data give reasoning; templates read the first or the second, as transformers does."""

Render = Callable[[Sequence[Mapping[str, Any]]], str]


def plain_message(message: Message) -> dict[str, Any]:
    """A message as templates read it, reasoning under every name that they know."""
    if not message.extra:
        return {"role": message.role, "content": message.content}
    extra = {name: value for name, value in message.extra.items() if value is not None}
    given = {"role": message.role, "content": message.content, **extra}
    for name in _REASONING_NAMES:
        if given.get(name) is not None:
            return {"thinking": given[name], **given, "reasoning_content": given[name]}
    return given


class Manners:
    """Puts messages into the shapes that a template takes.

    Args:
        render: Renders made-up messages plainly, or raises what templates raise.
    """

    def __init__(self, render: Render) -> None:
        self._render = render
        self._tool_shapes: dict[tuple[str, bool], tuple[str, bool] | None] = {}

    def adapt(self, messages: Sequence[Message]) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
        """Messages for the template, and warnings about what it will not show."""
        adapted = [plain_message(message) for message in messages]
        warnings: tuple[str, ...] = ()
        for message in adapted:
            content = message["content"]
            if message.get("tool_calls"):
                warnings = self._adapt_tool_calls(message) or warnings
            elif content is None:
                message["content"] = "" if self.takes_text else []
            elif isinstance(content, str):
                if not self.takes_text:
                    message["content"] = [{"type": "text", "text": content}]
            elif self.takes_text and not self.takes_parts and _only_text(content):
                message["content"] = "".join(part["text"] for part in content)
        return adapted, warnings

    @cached_property
    def takes_text(self) -> bool:
        """Whether content may be a string. True for a template that takes neither, which will say so."""
        return self._shows_content("uqx", "Aqx") or not self.takes_parts

    @cached_property
    def takes_parts(self) -> bool:
        """Whether content may be a list of parts."""
        return self._shows_content([{"type": "text", "text": "uqx"}], [{"type": "text", "text": "Aqx"}])

    def _shows_content(self, asked: Any, answered: Any) -> bool:
        ask, answer = {"role": "user", "content": asked}, {"role": "assistant", "content": answered}
        try:
            text = self._render([ask, answer])
        except TEMPLATE_FAILURES:
            return False
        return "uqx" in text and "Aqx" in text and "'uqx'" not in text

    def _adapt_tool_calls(self, message: dict[str, Any]) -> tuple[str, ...]:
        calls = message["tool_calls"]
        content = message["content"]
        kind = "none" if content is None else "text" if content else "empty"
        as_json = any(isinstance(_function(call).get("arguments"), str) for call in calls)
        key = (kind, as_json)
        if key not in self._tool_shapes:
            self._tool_shapes[key] = self._find_tool_shape(kind, as_json)
        shape = self._tool_shapes[key]
        if shape is None:
            return ("the template does not show tool calls",)
        form, as_json = shape
        if form == "missing":
            del message["content"]
        elif form != "text":
            message["content"] = None if form == "none" else ""
        message["tool_calls"] = [_with_arguments(call, as_json) for call in calls]
        return ()

    def _find_tool_shape(self, kind: str, as_json: bool) -> tuple[str, bool] | None:
        """(form of the content, arguments are JSON text) that the template shows, as given if it can."""
        kinds = {"none": ("missing", "none", "empty"), "empty": ("empty", "missing", "none")}
        for form in kinds.get(kind, (kind,)):
            for json_form in (as_json, not as_json):
                if self._shows_call(form, json_form):
                    return form, json_form
        return None

    def _shows_call(self, form: str, as_json: bool) -> bool:
        values = {"kqx": "vqx"}
        function = {"name": "fqx", "arguments": json.dumps(values) if as_json else values}
        call = {"id": "call00000", "type": "function", "function": function}
        ask = {"role": "user", "content": "uqx"}
        answer: dict[str, Any] = {"role": "assistant", "tool_calls": [call]}
        if form != "missing":
            answer["content"] = {"none": None, "empty": "", "text": "Aqx"}[form]
        result = {"role": "tool", "content": "rqx", "name": "fqx", "tool_call_id": "call00000"}
        try:
            text = self._render([ask, answer, result])
        except TEMPLATE_FAILURES:
            return False
        shown = "vqx" in text and "fqx" in text and '\\"kqx' not in text and "'kqx'" not in text
        return shown and "None" not in text


def _only_text(parts: Sequence[Any]) -> bool:
    return all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts)


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function")
    return function if isinstance(function, Mapping) else call


def _with_arguments(call: Mapping[str, Any], as_json: bool) -> Mapping[str, Any]:
    """The call with its arguments as JSON text, or as the object that the text says."""
    function = _function(call)
    arguments = function.get("arguments")
    if as_json and arguments is not None and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not as_json and isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return call
    else:
        return call
    changed = {**function, "arguments": arguments}
    return changed if function is call else {**call, "function": changed}
