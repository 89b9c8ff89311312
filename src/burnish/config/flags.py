"""Dotted flags: `--optim.lr 2e-5`, `--train.epochs=2`, `--data.train '[a.jsonl, b.jsonl]'`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from burnish.config import names
from burnish.config.yaml_text import read_value
from burnish.errors import ConfigError, Problem

_FLAG = re.compile(r"--[A-Za-z_]")


def apply_flags(tree: dict[str, Any], tokens: Sequence[str]) -> list[Problem]:
    """Put flags into a tree of plain values, the later over the earlier.

    A key that takes true or false may stand without a value. A value that begins with two dashes
    needs the form `--key=value`. Indexes reach into a list of sources: `--data.train.0.weight 2`.

    Args:
        tree: The file's values; changed in place.
        tokens: The command line after the verb and the config file.

    Returns:
        What could not be put there. Unknown keys are put there too: validation names them.
    """
    problems: list[Problem] = []
    index = 0
    while index < len(tokens):
        token = tokens[index]
        index += 1
        if not _FLAG.match(token):
            cure = "Flags look like --optim.lr 2e-5; lists like --data.train '[a.jsonl, b.jsonl]'."
            if token.endswith((".yaml", ".yml")):
                cure = (
                    f"A config stands first: burnish train {token} --optim.lr 2e-5; and there is one at most."
                )
            problems.append(Problem(token, "stands alone, without a flag before it", cure))
            continue
        name, equals, text = token[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            if index < len(tokens) and not _FLAG.match(tokens[index]):
                text = tokens[index]
                index += 1
            elif _takes(name).startswith("true or false"):
                text = "true"
            else:
                problems.append(_without_value(name))
                continue
        problem = _put(tree, name, text)
        if problem is not None:
            problems.append(problem)
    return problems


def _without_value(name: str) -> Problem:
    if _takes(name):
        return Problem(f"--{name}", "has no value", f"Write --{name} VALUE.")
    return Problem(f"--{name}", "is not a key, and has no value", names.cure_for(name))


def _takes(name: str) -> str:
    parts = tuple(int(part) if part.isdecimal() else part for part in name.split("."))
    key = names.keys_by_name().get(names.canonical(parts))
    return key.takes if key else ""


def _put(tree: dict[str, Any], name: str, text: str) -> Problem | None:
    try:
        # Text stays as typed: a revision `1234567` or a folder `2024` is not a number.
        as_text = _takes(name) in ("text", "text, or null") and text != "null"
        value = text if as_text else read_value(text)
    except ConfigError as error:
        cure = "Write a list as '[a.jsonl, b.jsonl]', a mapping as '{key: value}', each key once, in quotes."
        return Problem(f"--{name}", f"{text} cannot be read: {error.problems[0].what}", cure)
    *above, leaf = name.split(".")
    parent: Any = tree
    for depth, part in enumerate(above):
        parent = _step_into(parent, part)
        if parent is None:
            where = ".".join(above[: depth + 1])
            what = f"{where} is not a section or a list with that index here"
            return Problem(f"--{name}", what, "`burnish train --help-all` lists every key.")
    if isinstance(parent, list):
        if not leaf.isdecimal() or int(leaf) >= len(parent):
            what = f"there is no item {leaf} in a list of {len(parent)}"
            return Problem(f"--{name}", what, "Items count from 0; a new one goes into the file.")
        parent[int(leaf)] = value
    else:
        parent[leaf] = value
    return None


def _step_into(parent: Any, part: str) -> Any:
    """The mapping or list at `part`, made where nothing stands; None where something else does."""
    if isinstance(parent, list):
        if not part.isdecimal() or int(part) >= len(parent):
            return None
        key: Any = int(part)
        if isinstance(parent[key], str):  # a path, given shortly
            parent[key] = {"path": parent[key]}
    else:
        key = part
        if parent.get(key) is None:
            parent[key] = {}
    return parent[key] if isinstance(parent[key], dict | list) else None
