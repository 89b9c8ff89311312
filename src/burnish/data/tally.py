"""Counts of one source: what became of its rows, rule by rule, with places to look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from burnish.config.row_rules import RULES, Policy
from burnish.config.schema import DataConfig
from burnish.data.encode import BatchResult, Finding
from burnish.data.policies import fate
from burnish.errors import DataError, Problem, counted

NUM_PLACES = 5
"""Places named per rule in the report."""
NUM_SHOWN = 20
"""Rows shown in an error; the rest are counted."""


@final
class Tally:
    """Adds up the findings of one source's batches.

    Args:
        data: For what becomes of rows that could not be mended.
        policies: Of every rule.
    """

    def __init__(self, data: DataConfig, policies: Mapping[str, Policy]) -> None:
        self._data = data
        self._policies = policies
        self.num_rows = 0
        self.num_kept = 0
        self.num_control_tokens = 0
        self.dropped: dict[str, dict[str, Any]] = {}
        self.fixed: dict[str, dict[str, Any]] = {}
        self.warnings: dict[str, dict[str, Any]] = {}
        self.errors: list[Finding] = []
        """The first ones only."""
        self.num_errors: dict[str, int] = {}

    def add(self, result: BatchResult) -> None:
        """Add a batch."""
        self.num_rows += result.num_rows
        self.num_kept += result.num_kept
        self.num_control_tokens += result.num_control_tokens
        for finding in result.findings:
            self._add_finding(finding)
        for text, place in result.warnings:
            entry = self.warnings.setdefault(text, {"examples": 0, "places": []})
            entry["examples"] += 1
            if len(entry["places"]) < NUM_PLACES:
                entry["places"].append(place)

    def _add_finding(self, finding: Finding) -> None:
        if not finding.fixed and fate(finding.rule, self._policies, self._data) == "error":
            self.num_errors[finding.rule] = self.num_errors.get(finding.rule, 0) + 1
            if len(self.errors) < NUM_SHOWN:
                self.errors.append(finding)
            return
        table = self.fixed if finding.fixed else self.dropped
        empty = {"rows": 0, "tokens": 0, "supervised_tokens": 0, "places": []}
        entry = table.setdefault(finding.rule, empty)
        entry["rows"] += 1
        entry["tokens"] += finding.num_tokens
        entry["supervised_tokens"] += finding.num_supervised
        if len(entry["places"]) < NUM_PLACES:
            entry["places"].append({"place": finding.place, "what": finding.message})

    def to_dict(self) -> dict[str, Any]:
        """The counts as JSON; every rule's rows, tokens lost and first places."""
        return {
            "rows": self.num_rows,
            "rows_kept": self.num_kept,
            "control_tokens_typed": self.num_control_tokens,
            "dropped": self.dropped,
            "fixed": self.fixed,
            "warnings": self.warnings,
        }


def rows_error(tallies: list[Tally]) -> DataError | None:
    """All rows whose policy is `error`, over all sources: the first ones, and a count per rule. None
    where there are none."""
    findings = [finding for tally in tallies for finding in tally.errors][:NUM_SHOWN]
    totals: dict[str, int] = {}
    for tally in tallies:
        for rule, count in tally.num_errors.items():
            totals[rule] = totals.get(rule, 0) + count
    problems = [Problem(f.place, f"{f.message} [{f.rule}]") for f in findings]
    hidden = sum(totals.values()) - len(findings)
    if hidden:
        problems.append(Problem("", f"... and {counted(hidden, 'more row')}"))
    problems += [_rule_problem(rule, count) for rule, count in totals.items()]
    num_rows = counted(sum(totals.values()), "row")
    breaks = f"{num_rows} that cannot be trained on, {counted(len(totals), 'rule')} broken"
    return DataError(*problems, heading=breaks) if problems else None


def _rule_problem(name: str, count: int) -> Problem:
    rule = RULES[name]
    policies = f"{rule.cure} Or set data.bad_row_rules.{name}: drop leaves the row out"
    if rule.can_fix:
        policies += f"; fix: {rule.fix}"
    return Problem(name, f"{counted(count, 'row')}: {rule.what}", f"{policies}.")
