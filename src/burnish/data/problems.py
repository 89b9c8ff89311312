"""A row that breaks a rule. The rules stand in `config/row_rules.py`, as the config names them."""

from __future__ import annotations

from burnish.config.row_rules import RULES


class RowProblem(Exception):
    """A row breaks a rule.

    Args:
        rule: Name of a rule in `RULES`.
        message: What was found there, the offending value included (shortened).
    """

    def __init__(self, rule: str, message: str = "") -> None:
        if rule not in RULES:
            raise KeyError(f"no rule is called {rule!r}")
        super().__init__(rule, message)
        self.rule = rule
        self.message = message or RULES[rule].what


def shorten(value: object, num_characters: int = 60) -> str:
    """A value as a message shows it: its `repr`, cut to so many characters."""
    text = repr(value)
    return text if len(text) <= num_characters else text[: num_characters - 1] + "…"
