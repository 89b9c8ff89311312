"""Examples in the terminal: trained tokens on green, the stronger the weight the stronger the green,
control tokens on violet, everything else as it is.

Without colours (a pipe, `NO_COLOR`) trained runs stand between `⟦` and `⟧`, with their weight if it is
not 1. Nothing that data can hold reaches the terminal as a command: control characters are shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.rule import Rule
from rich.style import Style
from rich.text import Text

from burnish.report.view import LostRow, View, ViewedExample, share, summary

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]"
)
"""Characters that steer a terminal, turn the direction of writing, or show nothing. Joiners
(U+200C, U+200D) stay: they are part of emoji and of Persian words."""

_FAINTEST, _STRONGEST = (16, 48, 34), (0, 116, 72)
"""The green of weight 0 and of weight 1."""
_WHITE = "#ffffff"
_FEW_COLOURS = ("standard", "windows")
"""Terminals of 16 colours: shades of green would become black there."""


def show(view: View, console: Console) -> None:
    """Print all of it."""
    _print_head(view, console)
    for example in view.examples:
        _print_example(example, view, console)
    if view.lost:
        console.print()
        print_verdicts(view.lost, console)


def print_verdicts(lost: Sequence[LostRow], console: Console) -> None:
    """Print why rows give no example, and what becomes of them."""
    console.print(Rule("rows without an example", style="red", align="left"))
    for row in lost:
        console.print(_verdict(row), soft_wrap=True)


def visible(text: str) -> str:
    """The text with what no one would see spelled out: `␛` for escape, `⟨U+202E⟩` for the like."""
    return _UNSEEN.sub(lambda match: _name(match[0]), text)


def _name(letter: str) -> str:
    code = ord(letter)
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def _print_head(view: View, console: Console) -> None:
    for name, value in {**view.facts, **summary(view)}.items():
        console.print(Text.assemble((f"{name:>24}  ", "dim"), visible(value)))
    legend = Text(" " * 26)
    if console.color_system is None:
        legend.append("⟦trained⟧  ⟦0.5: trained at half weight⟧  ↵ line end")
    else:
        system = console.color_system
        legend.append(" trained ", _style(1.0, False, system)).append(" ")
        legend.append(" weight 0.5 ", _style(0.5, False, system)).append(" ")
        legend.append("control token", _style(0.0, True, system)).append(" ")
        legend.append("trained control token", _style(1.0, True, system)).append("  ↵ line end")
    console.print(legend)


def _print_example(example: ViewedExample, view: View, console: Console) -> None:
    num_tokens = len(example.token_ids)
    title = Text.assemble((visible(example.source), "bold"), "  ", visible(example.row))
    if example.num_parts > 1:
        title.append(f"  part {example.part} of {example.num_parts}")
    trained = f"{example.num_trained:,} trained ({share(example.num_trained, num_tokens)})"
    title.append(f"  {num_tokens:,} tokens, {trained}", "dim")
    console.print()
    console.print(Rule(title, style="dim", align="left"))
    for warning in example.warnings:
        console.print(Text(f"⚠ {visible(warning)}", "yellow"))
    console.print(_body(example, view.control_ids, console.color_system))
    if example.num_tokens_cut:
        console.print(Text(f"✂ {example.num_tokens_cut:,} more tokens are cut off here", "yellow"))


def _body(example: ViewedExample, control_ids: frozenset[int], system: str | None) -> Text:
    body = Text(overflow="fold")
    for text, weight, is_control in _runs(example, control_ids if system else frozenset()):
        shown = visible(text).replace("\t", "⇥ ").replace("\n", "↵\n")
        if system:
            body.append(shown, _style(weight, is_control, system))
        elif weight > 0:
            body.append(f"⟦{shown}⟧" if weight == 1 else f"⟦{weight:g}: {shown}⟧")
        else:
            body.append(shown)
    if body.plain.endswith("\n"):
        body.right_crop(1)
    return body


def _runs(example: ViewedExample, control_ids: frozenset[int]) -> Iterator[tuple[str, float, bool]]:
    """Neighbouring tokens that look alike, as one."""
    texts: list[str] = []
    last: tuple[float, bool] = (0.0, False)
    for token_id, text, weight in zip(example.token_ids, example.texts, example.weights, strict=True):
        look = (weight, token_id in control_ids)
        if texts and look != last and text:
            yield "".join(texts), last[0], last[1]
            texts = []
        if text:
            last = look
            texts.append(text)
    if texts:
        yield "".join(texts), last[0], last[1]


def _style(weight: float, is_control: bool, system: str) -> Style:
    if weight <= 0:
        return _read_control(system) if is_control else Style()
    if system in _FEW_COLOURS:
        if is_control:
            return Style(color="green", bgcolor="white", bold=True)
        return Style(color="black", bgcolor="bright_green" if weight >= 1 else "green")
    part = min(weight, 1.0)
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(_FAINTEST, _STRONGEST, strict=True))
    shade = f"#{red:02x}{green:02x}{blue:02x}"
    if is_control:
        return Style(color=shade, bgcolor=_WHITE, bold=True)
    return Style(color=_WHITE, bgcolor=shade)


def _read_control(system: str) -> Style:
    """A control token that is not trained on."""
    if system in _FEW_COLOURS:
        return Style(color="black", bgcolor="magenta")
    return Style(color="#efeaff", bgcolor="#544782")


def _verdict(lost: LostRow) -> Text:
    return Text.assemble(
        (visible(lost.row), "bold"),
        f"  {visible(lost.message)} [{lost.rule}] ",
        (lost.verdict, "bold red" if lost.fate == "error" else "yellow"),
        (f"\n    {lost.cure}", "dim"),
    )
