"""Which policy every rule has in this run, and what becomes of a row that breaks one."""

from __future__ import annotations

from collections.abc import Mapping

from burnish.config.row_rules import RULES, Policy, misnamed_rules
from burnish.config.schema import DataConfig
from burnish.errors import ConfigError


def resolve_policies(data: DataConfig) -> dict[str, Policy]:
    """Policy of every rule: `bad_row_rules`, else what another key implies, else the default.

    Raises:
        ConfigError: `bad_row_rules` names a rule that is none, or `fix` for one that has no fix.
    """
    problems = [*misnamed_rules(data.bad_row_rules)]
    if problems:
        raise ConfigError(*problems)
    policies: dict[str, Policy] = {name: rule.default or data.bad_rows for name, rule in RULES.items()}
    if data.too_long == "error":
        policies["too_long"] = "error"
    elif data.too_long == "drop":
        policies["too_long"] = "drop"
    if data.control_tokens == "error":
        policies["control_tokens"] = "error"
    return {**policies, **data.bad_row_rules}


def fate(rule: str, policies: Mapping[str, Policy], data: DataConfig) -> Policy:
    """What becomes of a row that breaks a rule and was not mended: `error` or `drop`."""
    policy = policies[rule]
    return data.bad_rows if policy == "fix" else policy


def counts_as_bad(rule: str, data: DataConfig) -> bool:
    """Whether a dropped row counts against `max_bad_fraction`.

    Rows that `too_long: drop` leaves out were not bad: the config asked for them to go.
    """
    return not (rule == "too_long" and data.too_long == "drop")
