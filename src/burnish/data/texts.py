"""Text values of rows: checked, mended where the policy says so."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, final

from burnish.config.row_rules import RULES, Policy
from burnish.data.problems import RowProblem, shorten


@final
class Mender:
    """Decides what becomes of one row's flaws, and remembers which were mended.

    Args:
        policies: Policy of every rule, by name.
    """

    def __init__(self, policies: Mapping[str, Policy]) -> None:
        self._policies = policies
        self.fixed: list[RowProblem] = []

    def mend(self, rule: str, message: str = "") -> None:
        """Note that the row is mended under this rule.

        Raises:
            RowProblem: The policy is not to mend.
        """
        problem = RowProblem(rule, message)
        if self._policies[rule] != "fix" or not RULES[rule].can_fix:
            raise problem
        self.fixed.append(problem)


def is_missing(value: Any, where: str, mender: Mender) -> bool:
    """Whether a value is not given: None, or NaN if NaN is to be mended."""
    if isinstance(value, float) and math.isnan(value):
        mender.mend("content_nan", f"{where} is NaN")
        return True
    return value is None


def clean_text(text: str, where: str, mender: Mender) -> str:
    """A text without NUL characters and lone surrogates."""
    if "\x00" in text:
        mender.mend("nul_character", f"{where} has a NUL character at {text.index(chr(0))}")
        text = text.replace("\x00", "")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            mender.mend("lone_surrogate", f"{where} has {shorten(text[error.start])} at {error.start}")
            # A pair written as two escapes is one character; what stays single is replaced.
            raw = text.encode("utf-16-le", errors="surrogatepass")
            text = raw.decode("utf-16-le", errors="replace")
    return text


def clean_value(value: Any, where: str, mender: Mender) -> Any:
    """The same for every text inside a JSON value, keys too."""
    if isinstance(value, str):
        return clean_text(value, where, mender)
    if isinstance(value, list):
        return [clean_value(item, where, mender) for item in value]
    if isinstance(value, dict):
        return {clean_value(k, where, mender): clean_value(v, where, mender) for k, v in value.items()}
    return value


def as_text(value: Any, where: str, mender: Mender) -> str | None:
    """A content as text; None where it is not given.

    Raises:
        RowProblem: It is no text, and cannot be or is not to be made one.
    """
    if isinstance(value, str):
        return clean_text(value, where, mender)
    if is_missing(value, where, mender):
        return None
    if isinstance(value, (bool, int, float)):
        mender.mend("content_not_text", f"{where} is {shorten(value)}")
        return json.dumps(value)
    if isinstance(value, list):
        return _joined_parts(value, where, mender)
    raise RowProblem("content_not_text", f"{where} is {shorten(value)}")


def _joined_parts(parts: list[Any], where: str, mender: Mender) -> str | None:
    texts = [part if isinstance(part, str) else _part_text(part, where) for part in parts]
    if not parts:
        return None
    mender.mend("content_parts", f"{where} is a list of {len(parts)} text parts")
    return clean_text("".join(texts), where, mender)


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise RowProblem("content_not_text", f"{where} has a part that is not text: {shorten(part)}")


def parsed_json(text: str, rule: str, where: str) -> Any:
    """A JSON value written as a string.

    Raises:
        RowProblem: Under this rule, if it is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowProblem(rule, f"{where} is not JSON: {shorten(text)} ({error})") from error
