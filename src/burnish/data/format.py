"""What shape a source's rows have, and how a row of each shape becomes a conversation."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from burnish.config.row_rules import RULES, Policy
from burnish.config.schema import SourceConfig
from burnish.data.messages import is_weight, message_list, normal_messages, ordered_turns
from burnish.data.problems import RowProblem, shorten
from burnish.data.rows import Row
from burnish.data.texts import Mender, as_text, clean_value, is_missing, parsed_json
from burnish.data.tools import normal_tools
from burnish.errors import DataError, Problem
from burnish.records import Conversation, Message

IGNORED_LABEL = -100
"""The label of a token that is not trained on, in ready-made `labels`."""


@dataclass(frozen=True)
class RowFormat:
    """The shape of a source's rows."""

    name: str
    """messages, sharegpt, alpaca, prompt_completion, text or tokens."""
    columns: Mapping[str, str]
    """Our name of a column: the source's name. Only columns that are there."""


@dataclass(frozen=True)
class _Shape:
    """Our columns of one format, each with the names under which it is looked for."""

    required: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, tuple[str, ...]]


_TEMPLATE_COLUMNS = {
    "tools": ("tools", "functions"),
    "template_kwargs": ("template_kwargs", "chat_template_kwargs"),
}
_SYSTEM = {"system": ("system", "system_prompt")}
_MESSAGE_KEYS: Mapping[str, tuple[str, ...]] = {"role": (), "content": ()}
"""Keys of a message, not columns of a row: only `columns` of the source can name them."""
_PROMPTS = ("prompt", "question", "query", "input", "instruction")
_COMPLETIONS = ("completion", "response", "answer", "output")

SHAPES: Mapping[str, _Shape] = {
    "tokens": _Shape(
        {"input_ids": ("input_ids", "token_ids", "tokens")},
        {
            "labels": ("labels",),
            "mask": ("mask", "loss_mask", "assistant_masks", "completion_mask"),
            "weights": ("weights", "loss_weights"),
        },
    ),
    "messages": _Shape(
        {"messages": ("messages", "conversations", "conversation")},
        {**_SYSTEM, **_TEMPLATE_COLUMNS, **_MESSAGE_KEYS},
    ),
    "sharegpt": _Shape(
        {"messages": ("conversations", "conversation", "messages")},
        {**_SYSTEM, **_TEMPLATE_COLUMNS, **_MESSAGE_KEYS},
    ),
    "alpaca": _Shape(
        {"instruction": ("instruction",), "output": ("output", "response")},
        {"input": ("input", "context"), "history": ("history",), **_SYSTEM},
    ),
    "prompt_completion": _Shape(
        {"prompt": _PROMPTS, "completion": _COMPLETIONS}, {**_SYSTEM, **_TEMPLATE_COLUMNS}
    ),
    "text": _Shape({"text": ("text",)}, {}),
}
"""Formats in the order in which they are tried."""

DEFAULT_POLICIES: Mapping[str, Policy] = MappingProxyType(
    {name: rule.default or "error" for name, rule in RULES.items()}
)


def detect_format(source: SourceConfig, first_rows: Sequence[Mapping[str, Any]]) -> RowFormat:
    """Find the shape of a source's rows from its config and its first rows.

    `columns` of the source wins over every name that is looked for, `format` over what is found.

    Args:
        source: The source.
        first_rows: Some of its rows; more than one, as a column may be missing in the first.

    Raises:
        DataError: The rows have none of the shapes, or not the one that the config names, or two columns
            that may be the prompt.
    """
    present = list(dict.fromkeys(key for row in first_rows for key in row))
    ours_theirs = {"messages" if k == "conversations" else k: v for k, v in source.columns.items()}
    for ours, theirs in ours_theirs.items():
        if ours not in _MESSAGE_KEYS and theirs not in present:
            near = difflib.get_close_matches(theirs, present, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            found = f"columns says {ours}: {theirs}, but there is no column {theirs!r}"
            raise DataError(Problem(source.path, found, f"Columns are: {', '.join(present)}.{hint}"))
    names = [source.format] if source.format != "auto" else _candidates(first_rows, present, ours_theirs)
    for name in names:
        columns = _match(SHAPES[name], present, ours_theirs)
        if columns is not None:
            if name == "prompt_completion":
                _require_one_of_each(source, present)
            return RowFormat(name, columns)
    raise DataError(_no_match(source, present))


def _candidates(
    rows: Iterable[Mapping[str, Any]], present: Sequence[str], ours: Mapping[str, str]
) -> list[str]:
    """Formats to try: conversations by the keys of their messages, the rest by columns alone."""
    speaker = "messages"
    theirs = ours.get("messages")
    for column in (theirs,) if theirs else SHAPES["messages"].required["messages"]:
        if column in present:
            message = _first_message(row.get(column) for row in rows)
            speaker = "sharegpt" if "from" in message else "messages"
            break
    other = {"messages": "sharegpt", "sharegpt": "messages"}[speaker]
    return [name for name in SHAPES if name != other]


def _first_message(cells: Iterable[Any]) -> Mapping[str, Any]:
    for cell in cells:
        messages = cell
        if isinstance(cell, str):
            try:
                messages = parsed_json(cell, "messages_not_a_list", "")
            except RowProblem:
                continue
        if isinstance(messages, list) and messages and isinstance(messages[0], dict):
            return messages[0]
    return {}


def _match(shape: _Shape, present: Sequence[str], ours: Mapping[str, str]) -> dict[str, str] | None:
    known = {**shape.required, **shape.optional}
    if not set(ours) <= set(known):
        return None
    columns: dict[str, str] = {}
    for name, spellings in known.items():
        theirs = ours.get(name) or next((s for s in spellings if s in present), None)
        if theirs is not None:
            columns[name] = theirs
    return columns if set(shape.required) <= set(columns) else None


def _require_one_of_each(source: SourceConfig, present: Sequence[str]) -> None:
    """Of two columns that may be the prompt (or the completion), one would be left out in silence."""
    for ours, spellings in SHAPES["prompt_completion"].required.items():
        found = [name for name in spellings if name in present]
        if len(found) > 1 and ours not in source.columns:
            what = f"the columns {' and '.join(found)} may each be the {ours}"
            cure = f"Say which: `columns: {{{ours}: {found[0]}}}`."
            if "instruction" in found:
                cure += " For an instruction and its input: `format: alpaca` and `columns: {output: …}`."
            raise DataError(Problem(source.path, what, cure))


def _no_match(source: SourceConfig, present: Sequence[str]) -> Problem:
    shown = ", ".join(present) or "none"
    if source.format != "auto":
        needed = ", ".join(SHAPES[source.format].required)
        found = f"format {source.format} needs the columns {needed}; there are: {shown}"
        return Problem(source.path, found, "Map them: `columns: {our name: their name}`.")
    shapes = "; ".join(f"{name}: {', '.join(shape.required)}" for name, shape in SHAPES.items())
    found = f"the columns ({shown}) are of no known format"
    if source.columns:
        found += f", with {dict(source.columns)}"
    return Problem(
        source.path, found, f"Map them with `columns: {{our name: their name}}`. Formats are {shapes}."
    )


def to_conversation(row: Row, fmt: RowFormat, mender: Mender | None = None) -> Conversation:
    """A row of any format as a conversation.

    Args:
        row: As it was read.
        fmt: The shape of its source's rows.
        mender: What to do about flaws; None mends those that are mended by default.

    Raises:
        RowProblem: The row cannot be trained on.
    """
    mender = mender or Mender(DEFAULT_POLICIES)
    if row.problem is not None:
        if row.value is None:
            raise row.problem
        mender.mend(row.problem.rule, row.problem.message)
    assert row.value is not None
    cells = _Cells(row.value, fmt, mender)
    return _BUILDERS[fmt.name](row, cells)


class _Cells:
    """A row's cells by our names, and the mender of its flaws."""

    def __init__(self, value: Mapping[str, Any], fmt: RowFormat, mender: Mender) -> None:
        self._value = value
        self.columns = fmt.columns
        self.mender = mender

    def get(self, name: str) -> Any:
        """The cell; None where it is not given."""
        theirs = self.columns.get(name)
        return None if theirs is None else self._value.get(theirs)

    def need(self, name: str) -> Any:
        """The cell of a required column."""
        theirs = self.columns[name]
        value = self._value.get(theirs)
        if is_missing(value, theirs, self.mender):
            if theirs not in self._value:
                raise RowProblem("missing_column", f"no column {theirs!r}, only {shorten(list(self._value))}")
            found = "empty" if value is None else "NaN, as pandas writes an empty cell"
            raise RowProblem("content_missing", f"{theirs} is {found}")
        return value

    def text(self, name: str) -> str:
        """The text of an optional column; empty where it is not given."""
        return as_text(self.get(name), self.columns.get(name, name), self.mender) or ""

    def needed_text(self, name: str) -> str:
        """The text of a required column."""
        theirs = self.columns[name]
        text = as_text(self.need(name), theirs, self.mender)
        if text is None:
            raise RowProblem("content_missing", f"{theirs} is empty")
        return text

    def conversation(self, row: Row, messages: Sequence[Message]) -> Conversation:
        """A conversation of these messages, with the row's tools and template arguments."""
        kwargs = self.get("template_kwargs")
        if isinstance(kwargs, str):
            kwargs = parsed_json(kwargs, "bad_tools", "template_kwargs") if kwargs.strip() else None
        if is_missing(kwargs, "template_kwargs", self.mender):
            kwargs = {}
        if not isinstance(kwargs, dict):
            raise RowProblem("bad_tools", f"template_kwargs are no object: {shorten(kwargs)}")
        tools = normal_tools(self.get("tools"), self.mender)
        kwargs = clean_value(kwargs, "template_kwargs", self.mender)
        return Conversation(row.source, row.place, messages, tools, kwargs)


def _from_messages(row: Row, cells: _Cells) -> Conversation:
    value = message_list(cells.need("messages"), cells.mender)
    renamed = {cells.columns[key]: key for key in _MESSAGE_KEYS if key in cells.columns}
    if renamed:
        value = [{renamed.get(k, k): v for k, v in m.items()} if isinstance(m, dict) else m for m in value]
    return cells.conversation(row, normal_messages(value, cells.text("system"), cells.mender))


def _from_alpaca(row: Row, cells: _Cells) -> Conversation:
    mender = cells.mender
    messages = [Message("system", cells.text("system"))] if cells.text("system") else []
    for pair in _history(cells.get("history"), mender):
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    parts = [cells.needed_text("instruction"), cells.text("input")]
    prompt = "\n\n".join(part for part in parts if part)
    messages += [Message("user", prompt), Message("assistant", cells.needed_text("output"))]
    return Conversation(row.source, row.place, ordered_turns(messages, mender))


def _history(value: Any, mender: Mender) -> list[tuple[str, str]]:
    if is_missing(value, "history", mender) or value == "":
        return []
    if isinstance(value, str):
        value = parsed_json(value, "messages_not_a_list", "history")
    if not isinstance(value, list):
        raise RowProblem("messages_not_a_list", f"history is {shorten(value)}")
    pairs = []
    for item in value:
        if not isinstance(item, (list, tuple)) or len(item) != 2:
            raise RowProblem("messages_not_a_list", f"history has {shorten(item)}, not a pair of texts")
        pairs.append(tuple(as_text(text, "history", mender) or "" for text in item))
    return pairs


def _from_prompt_completion(row: Row, cells: _Cells) -> Conversation:
    mender = cells.mender
    prompt, completion = cells.need("prompt"), cells.need("completion")
    messages = [*_side(prompt, "user", cells, "prompt"), *_side(completion, "assistant", cells, "completion")]
    return cells.conversation(row, normal_messages(messages, cells.text("system"), mender))


def _side(value: Any, role: str, cells: _Cells, name: str) -> list[Any]:
    """Prompt or completion as messages: it is a list of them, or the text of one."""
    if isinstance(value, list) and not all(isinstance(item, str) for item in value):
        # Of a conversation's prompt nothing is trained on, earlier answers neither.
        return [_untrained(item) if role == "user" and isinstance(item, dict) else item for item in value]
    return [{"role": role, "content": cells.needed_text(name)}]


def _untrained(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with `train: false`, unless it says itself: a null says nothing."""
    return {**message, "train": False} if message.get("train") is None else dict(message)


def _from_text(row: Row, cells: _Cells) -> Conversation:
    text = cells.needed_text("text")
    if not text.strip():
        raise RowProblem("empty_text")
    return Conversation(row.source, row.place, text=text)


def _from_tokens(row: Row, cells: _Cells) -> Conversation:
    ids = _numbers(cells.need("input_ids"), "input_ids")
    if any(isinstance(i, float) or i < 0 for i in ids):
        raise RowProblem("bad_tokens", "input_ids are not all integers of 0 or more")
    weights = [1.0] * len(ids)
    for name in ("labels", "mask", "weights"):
        if is_missing(cells.get(name), name, cells.mender):
            continue
        values = _numbers(cells.get(name), name)
        if len(values) != len(ids):
            raise RowProblem("bad_tokens", f"{len(ids)} input_ids but {len(values)} {name}")
        weights = [w * v for w, v in zip(weights, _token_weights(name, values, ids), strict=True)]
    return Conversation(row.source, row.place, token_ids=ids, token_weights=weights)


def _numbers(value: Any, name: str) -> list[Any]:
    if isinstance(value, str):
        value = parsed_json(value, "bad_tokens", name)
    if not isinstance(value, list) or not all(isinstance(item, (int, float)) for item in value):
        raise RowProblem("bad_tokens", f"{name} are no list of numbers: {shorten(value)}")
    return value


def _token_weights(name: str, values: Sequence[int | float], ids: Sequence[int]) -> list[float]:
    if name == "labels":
        for index, (label, token) in enumerate(zip(values, ids, strict=True)):
            if label not in (IGNORED_LABEL, token):
                found = f"label {index} is {label}, its token is {token} (labels are not shifted)"
                raise RowProblem("bad_tokens", found)
        return [0.0 if label == IGNORED_LABEL else 1.0 for label in values]
    for value in values:
        if not is_weight(value) or (name == "mask" and value not in (0, 1)):
            raise RowProblem("bad_tokens", f"{name} has the value {shorten(value)}")
    return [float(value) for value in values]


_BUILDERS: Mapping[str, Callable[[Row, _Cells], Conversation]] = {
    "messages": _from_messages,
    "sharegpt": _from_messages,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
    "text": _from_text,
    "tokens": _from_tokens,
}
