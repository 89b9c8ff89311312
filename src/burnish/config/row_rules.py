"""What can be wrong with a row: every rule by name, what becomes of the row, and the cure.

A row that cannot be trained on as it stands breaks exactly one rule. Its fate is a policy:
`error` (the program ends with a list of all such rows), `drop` (the row is left out and counted) or
`fix` (the row is mended as the rule says, and counted). The policy is `data.bad_row_rules.NAME` if
set, else the rule's own default, else `data.bad_rows`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from burnish.errors import Problem

Policy = Literal["error", "drop", "fix"]


@dataclass(frozen=True)
class Rule:
    """One thing that can be wrong with a row."""

    name: str
    """How `data.bad_row_rules` calls it."""
    what: str
    """What is wrong, in a few words."""
    cure: str
    """What the user can do about it."""
    fix: str = ""
    """What the policy `fix` does; empty where the rule cannot be mended."""
    default: Policy | None = None
    """Policy where `data.bad_row_rules` is silent; None follows `data.bad_rows`."""

    @property
    def can_fix(self) -> bool:
        """Whether the policy `fix` means anything for this rule."""
        return bool(self.fix)


_READING = (
    Rule("invalid_json", "the line is not JSON", "Mend or delete the line; the last one may be cut off."),
    Rule(
        "unreadable_rest",
        "nothing can be read from here to the end of the file",
        "Mend the file, or copy or download it again.",
        # Even with bad_rows: drop, half a file is not lost unless its owner says so by name.
        default="error",
    ),
    Rule(
        "invalid_csv",
        "the line has more or fewer cells than the header, or a quote out of place",
        "Put quotes around a cell that holds commas or line ends, and double the quotes inside; "
        "write an empty cell where one is missing.",
    ),
    Rule(
        "invalid_utf8",
        "the line is not UTF-8",
        "Save the file as UTF-8.",
        fix="what cannot be read becomes U+FFFD",
    ),
    Rule(
        "byte_order_mark",
        "a byte order mark stands before the first row",
        "Save the file as UTF-8 without BOM.",
        fix="the mark is left out",
        default="fix",
    ),
    Rule(
        "lone_surrogate",
        "half of a surrogate pair, which no tokenizer can encode",
        "Write the character whole.",
        fix="it becomes U+FFFD",
    ),
    Rule("nul_character", "a NUL character in a text", "Take it out.", fix="it is taken out"),
    Rule("null_row", "the row is null or not an object", "Delete the row."),
)

_SHAPE = (
    Rule(
        "missing_column",
        "the row lacks a column of its source's format",
        "Fill the column, or say with `columns` how it is called.",
    ),
    Rule(
        "messages_as_text",
        "messages are a JSON string instead of a list",
        "Write them as a list.",
        fix="the string is read as JSON",
        default="fix",
    ),
    Rule("messages_not_a_list", "messages are not a list", "Give a list of {role, content} objects."),
    Rule("empty_messages", "the conversation has no messages", "Delete the row."),
    Rule("message_not_an_object", "a message is not an object", "Give {role, content} objects."),
    Rule(
        "unknown_role",
        "a message has a role nobody knows",
        "Use system, developer, user, assistant or tool.",
    ),
    Rule("content_missing", "a message has no content", "Fill it in, or delete the row."),
    Rule(
        "content_not_text",
        "a content is neither text nor text parts",
        "Make it a string.",
        fix="numbers and booleans become text",
    ),
    Rule(
        "content_parts",
        "a content is a list of text parts",
        "Make it a string.",
        fix="the parts are joined, nothing between them",
        default="fix",
    ),
    Rule(
        "content_nan",
        "a text is NaN, an empty cell as pandas writes it",
        "Fill it in, or delete the row.",
        fix="the cell counts as not given",
        default="fix",
    ),
    Rule("empty_answer", "an assistant's turn is empty", "Delete the row.", fix="the turn is kept, empty"),
    Rule("empty_prompt", "a prompt is empty", "Delete the row.", fix="the prompt is kept, empty"),
    Rule("empty_text", "the text is empty", "Delete the row."),
    Rule("no_assistant_turn", "no turn of an assistant: nothing to learn", "Delete the row."),
    Rule(
        "assistant_first",
        "the assistant speaks first, without a prompt",
        "Put a user's turn before it.",
        fix="the conversation is kept as it is",
    ),
    Rule(
        "repeated_role",
        "two turns in a row of one role",
        "Join the turns.",
        fix="the turns are joined by an empty line",
    ),
    Rule(
        "last_turn_not_assistant",
        "the last turn is not an assistant's",
        "Cut the conversation after the last answer.",
        fix="what follows the last answer is left out",
        default="fix",
    ),
    Rule("bad_tool_calls", "tool calls are not what templates expect", "Use OpenAI's tool_calls."),
    Rule("bad_tools", "tools are not a list of definitions", "Use OpenAI's tools, a list of objects."),
    Rule(
        "bad_weight", "train or weight of a message is not usable", "train: true or false; weight: 0 or more."
    ),
    Rule("bad_tokens", "token ids or their masks are not usable", "Integers, and one mask value per token."),
)

_ENCODING = (
    Rule("template_error", "the chat template refuses the row", "Mend the row, or set data.chat_template."),
    Rule(
        "mask_unproved",
        "which tokens are the assistant's cannot be proved",
        "Use a template with {% generation %} marks (data.chat_template).",
    ),
    Rule(
        "control_tokens",
        "a text contains a control token of the tokenizer",
        "data.control_tokens: escape makes it plain text.",
    ),
    Rule("token_out_of_range", "a token id is beyond the vocabulary", "Use the tokenizer of this model."),
    Rule(
        "too_long",
        "longer than data.max_tokens",
        "Raise data.max_tokens, or set data.too_long to truncate, drop or split.",
    ),
    Rule(
        "prompt_too_long",
        "the prompt alone fills data.max_tokens: no token of an answer is left",
        "Raise data.max_tokens.",
        default="drop",
    ),
    Rule(
        "no_supervised_tokens",
        "no token of the row is trained on",
        "Look at data.train_on and at train and weight of the messages.",
        default="drop",
    ),
)

RULES: Mapping[str, Rule] = MappingProxyType({rule.name: rule for rule in (*_READING, *_SHAPE, *_ENCODING)})
"""Every rule by name, in the order in which a row meets them."""


def misnamed_rules(chosen: Mapping[str, Policy]) -> Iterator[Problem]:
    """What is wrong with `data.bad_row_rules`: a rule that is none, or `fix` for one that has no fix."""
    for name, policy in chosen.items():
        key = f"data.bad_row_rules.{name}"
        if name not in RULES:
            near = difflib.get_close_matches(name, RULES, n=1)
            cure = f"Did you mean {near[0]}?" if near else f"Rules are: {', '.join(RULES)}."
            yield Problem(key, "there is no such rule", cure)
        elif policy == "fix" and not RULES[name].can_fix:
            yield Problem(key, "this rule has no fix", "Use drop or error.")
