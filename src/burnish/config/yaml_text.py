"""YAML as people mean it: `1e-4` is a number, `on` is a word, a key stands once.

PyYAML follows YAML 1.1, where `1e-4` is a string, `on` is true, `010` is eight and `12:30` is 750.
Here scalars follow the core schema of YAML 1.2, and a key that stands twice is an error instead
of the last one winning in silence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml

from burnish.errors import ConfigError, Problem

_CORE_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9][0-9_]*$", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.[0-9]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
    ("tag:yaml.org,2002:merge", r"^<<$", "<"),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}  # pyright: ignore


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either reader, YAML 1.1 or ours, would not take for a string."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {  # pyright: ignore
        first: list(entries) for first, entries in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _tag, _pattern, _first in _CORE_SCALARS:
    for _char in _first:
        _entry = (_tag, re.compile(_pattern))
        _Loader.yaml_implicit_resolvers.setdefault("" if _char == "\0" else _char, []).append(_entry)
        _Dumper.yaml_implicit_resolvers.setdefault("" if _char == "\0" else _char, []).append(_entry)


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML takes these line ends for printable and then folds them away, except in double quotes.
    style = '"' if re.search("[\x85\u2028\u2029\ufeff]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(str(loader.construct_scalar(node)).replace("_", ""))  # decimal, also with leading zeros


_Loader.add_constructor("tag:yaml.org,2002:int", _int)


Path = tuple[str | int, ...]
"""Where a value stands in a document: keys, and indexes into lists."""


@dataclass(frozen=True)
class Document:
    """A parsed document, and where its parts stand, for messages."""

    value: Any
    """None for an empty document."""
    lines: Mapping[Path, int] = field(default_factory=dict)
    """The line, from 1, of every key and every list item."""
    left_empty: frozenset[Path] = frozenset()
    """Keys with nothing after the colon."""


def read_yaml(text: str, name: str) -> Document:
    """Parse one YAML document.

    Args:
        text: The document.
        name: How messages call it, the file's path.

    Raises:
        ConfigError: Not YAML, more than one document, a key that stands twice, a key that is not a
            word, an unknown tag.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return Document(None)
        walk = _Walk(name)
        walk.visit(node, (), frozenset())
        if walk.problems:
            raise ConfigError(*walk.problems)
        return Document(loader.construct_document(node), walk.lines, frozenset(walk.left_empty))
    except yaml.YAMLError as error:
        raise ConfigError(_syntax_problem(error, name)) from error
    except (ValueError, RecursionError) as error:
        cure = "Write this value in another way, or in quotes."
        raise ConfigError(Problem(name, f"cannot be read as YAML: {error}", cure)) from error
    finally:
        loader.dispose()


def write_yaml(value: Mapping[str, Any]) -> str:
    """The mapping as YAML that `read_yaml` (and any YAML 1.1 reader) reads back unchanged."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def read_value(text: str) -> Any:
    """What a flag's value means: a list or mapping where it looks like one, else a scalar.

    Raises:
        ConfigError: It opens a bracket and is not a YAML (or JSON) list or mapping.
    """
    if text[:1] in ("[", "{"):
        return read_yaml(text, "the value").value
    tag = _Loader("").resolve(yaml.ScalarNode, text, (True, False))
    if tag in {"tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"} or not text:
        return text
    return read_yaml(text, "the value").value


class _Walk:
    """Notes the line of every key; finds keys that stand twice and anchors that hold themselves."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[Path, int] = {}
        self.left_empty: set[Path] = set()
        self.problems: list[Problem] = []

    def visit(self, node: yaml.Node, path: Path, above: frozenset[int]) -> None:
        line = node.start_mark.line + 1
        if id(node) in above:
            cure = "Write out what the alias stands for."
            self.problems.append(Problem(f"{self.name}:{line}", "an alias that contains itself", cure))
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.lines[(*path, index)] = item.start_mark.line + 1
                self.visit(item, (*path, index), above | {id(node)})
        elif isinstance(node, yaml.MappingNode):
            self._visit_mapping(node, path, above | {id(node)})
        elif isinstance(node, yaml.ScalarNode) and node.value == "" and node.style is None:
            self.left_empty.add(path)

    def _visit_mapping(self, node: yaml.MappingNode, path: Path, above: frozenset[int]) -> None:
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                what = f"a key must be a word, not {key_node.value!r}"
                self.problems.append(Problem(f"{self.name}:{line}", what, "Put it in quotes, or mend it."))
                continue
            key = str(key_node.value)
            if key in seen and key != "<<":
                what = f"stands twice, in {self.name}:{seen[key]} and {self.name}:{line}"
                where = ".".join(str(part) for part in (*path, key))
                self.problems.append(Problem(where, what, "Keep one of them."))
            seen.setdefault(key, line)
            self.lines.setdefault((*path, key), line)
            self.visit(value_node, (*path, key), above)


def _syntax_problem(error: yaml.YAMLError, name: str) -> Problem:
    if not isinstance(error, yaml.MarkedYAMLError):
        return Problem(name, f"cannot be read as YAML: {error}", "Save it as plain UTF-8 text.")
    mark = error.problem_mark or error.context_mark
    where = f"{name}:{mark.line + 1}" if mark else name
    what = f"is not YAML: {error.problem or error.context}"
    if "\\t" in str(error.problem):
        return Problem(where, what, "YAML is indented with spaces; replace the tab.")
    if "expected a single document" in str(error.context):
        return Problem(where, "holds more than one YAML document", "Keep one; remove the --- line.")
    return Problem(where, what, "Look at this line and the one above: indentation, a colon, a quote.")
