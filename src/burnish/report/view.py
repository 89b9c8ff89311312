"""What `burnish view` shows, whatever it is shown on: a terminal, lines of JSON, or a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ViewedExample:
    """One example as the model will see it."""

    source: str
    row: str
    """`file:line` or `file#index`."""
    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    """One per token; empty for the later tokens of a character that is spread over several."""
    weights: tuple[float, ...]
    """Loss weight of each token as a target; 0 where it is not trained on, always so for the first."""
    parts: Mapping[int, str] = field(default_factory=dict)
    """Position of each token that holds only part of a character: its bytes in hex."""
    warnings: tuple[str, ...] = ()
    num_tokens_cut: int = 0
    num_supervised_cut: int = 0
    part: int = 1
    """Which part of its row, from 1, where `data.too_long: split` made several …"""
    num_parts: int = 1
    """… and how many there are."""

    @property
    def num_trained(self) -> int:
        """Tokens that are targets."""
        return sum(weight > 0 for weight in self.weights)


@dataclass(frozen=True)
class LostRow:
    """A row that gives no example, and why."""

    source: str
    row: str
    rule: str
    message: str
    cure: str
    fate: str
    """`error`: training does not start while it is there. `drop`: it is left out."""

    @property
    def verdict(self) -> str:
        """What becomes of it, in words."""
        return "stops the run" if self.fate == "error" else "left out"


@dataclass(frozen=True)
class View:
    """Some examples of a run's data, and what they were made with."""

    facts: Mapping[str, str]
    """What the examples were made with, for the head: name of the fact, its value."""
    template: str | None
    """The chat template's text."""
    control_ids: frozenset[int]
    examples: Sequence[ViewedExample]
    lost: Sequence[LostRow]
    micro_batches: Sequence[Sequence[int]]
    """Positions in `examples`: how one rank would cut them, were they the window of a step."""
    packed: bool
    """Whether micro-batches hold documents end to end (one row), or one row per document."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples shown."""
        return sum(len(example.token_ids) for example in self.examples)

    @property
    def num_trained(self) -> int:
        """Targets of all examples shown."""
        return sum(example.num_trained for example in self.examples)

    @property
    def num_tokens_cut(self) -> int:
        """Tokens cut off the examples shown."""
        return sum(example.num_tokens_cut for example in self.examples)

    @property
    def num_supervised_cut(self) -> int:
        """Those of them that would have been trained on."""
        return sum(example.num_supervised_cut for example in self.examples)


def share(part: int, whole: int) -> str:
    """A share in percent, as a reader wants it: `0 %`, `< 1 %`, `37 %`."""
    if not whole or not part:
        return "0 %"
    percent = 100 * part / whole
    return "< 1 %" if percent < 1 else f"{percent:.0f} %"


def summary(view: View) -> dict[str, str]:
    """The numbers of the head: name, value in words."""
    num_warned = sum(bool(example.warnings) for example in view.examples)
    numbers = {
        "examples": f"{len(view.examples):,}",
        "tokens": f"{view.num_tokens:,}",
        "trained on": f"{view.num_trained:,} ({share(view.num_trained, view.num_tokens)})",
        "cut off": f"{view.num_tokens_cut:,} ({view.num_supervised_cut:,} of them to be learned)",
        "with a warning": f"{num_warned:,}",
        "rows without an example": f"{len(view.lost):,}",
    }
    return {name: value for name, value in numbers.items() if name != "cut off" or view.num_tokens_cut}


def json_line(example: ViewedExample) -> str:
    """One example as one line of JSON, in ASCII, so that no reader breaks a line at U+2028.

    A token that holds only part of a character has `bytes` too, in hex.
    """
    tokens: list[dict[str, Any]] = [
        {"id": token_id, "text": text, "trained": weight > 0, "weight": weight}
        for token_id, text, weight in zip(example.token_ids, example.texts, example.weights, strict=True)
    ]
    for position, raw in example.parts.items():
        tokens[position]["bytes"] = raw
    line = {
        "source": example.source,
        "row": example.row,
        "tokens": tokens,
        "warnings": list(example.warnings),
    }
    return json.dumps(line)
