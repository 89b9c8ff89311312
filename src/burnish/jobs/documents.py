"""YAML documents that people read: keys in our order, long texts as blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import yaml


@final
class _Dumper(yaml.SafeDumper):
    """Writes a text of several lines as a literal block."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def write_document(value: Mapping[str, Any], comment: str) -> str:
    """The mapping as YAML under a comment of one or more lines."""
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    return lines + yaml.dump(dict(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
