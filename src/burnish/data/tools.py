"""Tool definitions and tool calls, in the one shape that chat templates expect.

Arguments become objects: datasets keep them as JSON strings (OpenAI's API does), and a template
that writes `arguments | tojson` would quote such a string a second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from burnish.data.problems import RowProblem, shorten
from burnish.data.texts import Mender, clean_value, is_missing, parsed_json


def normal_tools(value: Any, mender: Mender) -> list[dict[str, Any]] | None:
    """Tool definitions as `[{"type": "function", "function": {...}}]`; None where there are none.

    Args:
        value: A list, or one as a JSON string; a definition may stand without its wrapping.
        mender: For NaN and for texts that no tokenizer takes.

    Raises:
        RowProblem: `bad_tools`.
    """
    if is_missing(value, "tools", mender):
        return None
    if isinstance(value, str):
        value = parsed_json(value, "bad_tools", "tools") if value.strip() else []
    if isinstance(value, dict):
        value = [value]
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise RowProblem("bad_tools", f"tools are {shorten(value)}")
    return [_normal_tool(item, mender) for item in value]


def _normal_tool(value: Any, mender: Mender) -> dict[str, Any]:
    if isinstance(value, str):
        value = parsed_json(value, "bad_tools", "a tool")
    if not isinstance(value, dict):
        raise RowProblem("bad_tools", f"a tool is {shorten(value)}")
    tool = clean_value(value, "tools", mender)
    if isinstance(tool.get("function"), dict):
        tool = {"type": "function", **tool}
        name = tool["function"].get("name")
    else:
        name = tool.get("name")
        # Types other than functions ("web_search") stay as they are.
        tool = (
            tool if "type" in tool and tool["type"] != "function" else {"type": "function", "function": tool}
        )
    if tool["type"] == "function" and not (isinstance(name, str) and name):
        raise RowProblem("bad_tools", f"a tool has no name: {shorten(value)}")
    return tool


def normal_tool_calls(value: Any, where: str, mender: Mender) -> list[dict[str, Any]]:
    """Tool calls as `[{"type": "function", "function": {"name", "arguments": {...}}, ...}]`.

    Args:
        value: A list of calls, one call, or either as a JSON string. A call may stand without its
            wrapping, as `{"name", "arguments"}`.
        where: How a message calls the place (`message 3`).
        mender: For texts that no tokenizer takes.

    Raises:
        RowProblem: `bad_tool_calls`.
    """
    if isinstance(value, str):
        value = parsed_json(value, "bad_tool_calls", f"{where}: a tool call") if value.strip() else []
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowProblem("bad_tool_calls", f"{where}: tool calls are {shorten(value)}")
    return [_normal_call(item, where, mender) for item in value]


def _normal_call(value: Any, where: str, mender: Mender) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowProblem("bad_tool_calls", f"{where}: a tool call is {shorten(value)}")
    call = clean_value(value, where, mender)
    wrapped = isinstance(call.get("function"), dict)
    function: Mapping[str, Any] = call["function"] if wrapped else call
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise RowProblem("bad_tool_calls", f"{where}: a tool call has no name: {shorten(value)}")
    arguments = _normal_arguments(function.get("arguments", function.get("parameters")), where, mender)
    rest = {key: item for key, item in call.items() if wrapped and key != "function" and item is not None}
    if not wrapped and isinstance(call.get("id"), str):
        rest["id"] = call["id"]
    return {**rest, "type": "function", "function": {"name": name, "arguments": arguments}}


def _normal_arguments(value: Any, where: str, mender: Mender) -> dict[str, Any]:
    if isinstance(value, str):
        text = value
        value = parsed_json(value, "bad_tool_calls", f"{where}: arguments") if value.strip() else {}
        value = clean_value(value, where, mender)
        if not isinstance(value, dict):
            raise RowProblem("bad_tool_calls", f"{where}: arguments are no object: {shorten(text)}")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RowProblem("bad_tool_calls", f"{where}: arguments are no object: {shorten(value)}")
    return value
