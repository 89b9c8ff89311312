"""Every key by its dotted name, what it takes in words, and what someone meant who wrote another."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from burnish.config.elsewhere import NAMES_ELSEWHERE, NOTES_ELSEWHERE
from burnish.config.schema import Config


@dataclass(frozen=True)
class Key:
    """One key of the config, for help, docs and messages."""

    name: str
    """Dotted; `data.train[].path` for a key of a source."""
    takes: str
    """What may stand there, in words: `a whole number above 0, or auto`."""
    choices: tuple[str, ...]
    """The words that may stand there, empty where it is not a choice."""
    default: Any
    required: bool
    doc: str


def config_schema() -> dict[str, Any]:
    """The config's JSON schema, as editors want it: `data.train` may be a path or a list of paths."""
    schema = Config.model_json_schema()
    sources = schema["$defs"]["DataConfig"]["properties"]
    for name in ("train", "eval"):
        doc = {k: sources[name][k] for k in ("description", "default") if k in sources[name]}
        one = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/SourceConfig"}]}
        forms: list[dict[str, Any]] = [*one["anyOf"], {"type": "array", "items": one, "minItems": 1}]
        if name == "eval":
            forms.append({"type": "null"})
        sources[name] = {**doc, "anyOf": forms}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


@functools.cache
def all_keys() -> tuple[Key, ...]:
    """Every key that takes a value, in the order of the schema."""
    schema = config_schema()
    return tuple(_keys_of(schema, schema, ""))


@functools.cache
def keys_by_name() -> Mapping[str, Key]:
    """`all_keys` by dotted name; the keys of a source under `data.train[]`."""
    return {key.name: key for key in all_keys()}


def canonical(path: tuple[str | int, ...]) -> str:
    """The name of a key, without the index of a source: `("data", "eval", 1, "path")` is
    `data.train[].path`, because sources are alike."""
    if len(path) > 2 and path[:1] == ("data",) and isinstance(path[2], int):
        return ".".join(["data.train[]", *(str(part) for part in path[3:])])
    return ".".join(str(part) for part in path)


def dotted(path: tuple[str | int, ...]) -> str:
    """A path as people write it: `data.train[0].weight`."""
    out = ""
    for part in path:
        out += f"[{part}]" if isinstance(part, int) else (f".{part}" if out else part)
    return out


def suggest(name: str) -> str | None:
    """The key that someone probably meant who wrote `name`, or None.

    In this order: what other tools call it, the one key elsewhere with the same last word, a name
    spelled alike in the same section, and one spelled alike anywhere.
    """
    head, _, leaf = name.rpartition(".")
    if leaf in NOTES_ELSEWHERE and leaf not in NAMES_ELSEWHERE:
        return None
    names = [key.name for key in all_keys()]
    sections = sorted({n.partition(".")[0] for n in names if "." in n})
    known: dict[str, list[str]] = {}
    for full in names:
        known.setdefault(full.rpartition(".")[2], []).append(full)
    for word in (name, name.replace(".", "_"), leaf):
        if word in NAMES_ELSEWHERE:
            return NAMES_ELSEWHERE[word]
    if head in NAMES_ELSEWHERE and f"{NAMES_ELSEWHERE[head]}.{leaf}" in names:
        return f"{NAMES_ELSEWHERE[head]}.{leaf}"
    if len(known.get(leaf, ())) == 1 and known[leaf] != [name]:
        return known[leaf][0]
    siblings = [n for n in names if n.rpartition(".")[0] == head] if head else sections + names
    for candidates, likeness in ((siblings, 0.7), (names, 0.75)):
        close = difflib.get_close_matches(name, candidates, 1, likeness)
        if close:
            return close[0]
    close = difflib.get_close_matches(leaf, list(known), 1, 0.8)
    return known[close[0]][0] if close else None


def cure_for(name: str) -> str:
    """What to do about a key that does not exist: the one that was probably meant, and how it differs."""
    near = suggest(name)
    note = NOTES_ELSEWHERE.get(name.rpartition(".")[2], "")
    if near is None:
        return note or "`burnish train --help-all` lists every key."
    return f"Did you mean {near}? {note}".rstrip()


def _keys_of(root: Mapping[str, Any], section: Mapping[str, Any], prefix: str) -> Iterator[Key]:
    for name, prop in section["properties"].items():
        full = f"{prefix}{name}"
        inner = _section_of(root, prop)
        if inner is not None and full not in ("data.train", "data.eval"):
            yield from _keys_of(root, inner, f"{full}.")
            continue
        if inner is None:
            takes, choices = _describe(prop)
        else:
            takes, choices = "a path, a list of paths, or a list of sources", []
        yield Key(
            full,
            takes,
            tuple(choices),
            prop.get("default"),
            name in section.get("required", ()),
            prop.get("description", "").replace("\n", " "),
        )
        if full == "data.train":
            yield from _keys_of(root, root["$defs"]["SourceConfig"], "data.train[].")


def _section_of(root: Mapping[str, Any], prop: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for form in (prop, *prop.get("anyOf", ())):
        if "$ref" in form:
            return root["$defs"][form["$ref"].rpartition("/")[2]]
    return None


def _describe(prop: Mapping[str, Any]) -> tuple[str, list[str]]:
    """What a JSON schema property takes, in words, and the fixed words among it."""
    words: list[str] = []
    choices: list[str] = []
    for form in prop.get("anyOf", [prop]):
        fixed = form.get("enum", [form["const"]] if "const" in form else [])
        if fixed:
            choices += [str(word) for word in fixed]
        else:
            words.append(_describe_one(form))
    null = ["null"] if "null" in words else []
    words = [word for word in words if word != "null"]
    if choices:
        words.append(("one of " if len(choices) > 1 else "") + ", ".join(choices))
    return ", or ".join(words + null), choices


def _describe_one(form: Mapping[str, Any]) -> str:
    kind = form.get("type")
    if kind == "array" and "prefixItems" in form:
        one = _describe(form["prefixItems"][0])[0]
        return f"a list of {len(form['prefixItems'])} values, each {one}"
    if kind == "array":
        return f"a list, each item {_describe(form['items'])[0]}"
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _bounds(form)
    return {"string": "text", "boolean": "true or false", "null": "null", "object": "a mapping"}[str(kind)]


def _bounds(form: Mapping[str, Any]) -> str:
    low, high = form.get("minimum"), form.get("maximum")
    if low is not None and high is not None:
        return f" from {low:g} to {_number(high)}"
    parts = []
    if "exclusiveMinimum" in form:
        parts.append(f"above {form['exclusiveMinimum']:g}")
    if low is not None:
        parts.append(f"of at least {low:g}")
    if "exclusiveMaximum" in form:
        parts.append(f"below {form['exclusiveMaximum']:g}")
    if high is not None:
        parts.append(f"at most {_number(high)}")
    return (" " + " and ".join(parts)) if parts else ""


def _number(value: int | float) -> str:
    """A bound as people write it: 1, 100,000, 10^9."""
    digits = f"{value:,}" if isinstance(value, int) else f"{value:g}"
    return digits if len(digits) < 10 else f"10^{round(math.log10(value))}"
