"""From a YAML file and dotted flags to a `Config`, or to every problem at once."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from burnish.config import names
from burnish.config.adapter_file import with_its_adapter
from burnish.config.check import check_config
from burnish.config.flags import apply_flags
from burnish.config.names import config_schema
from burnish.config.schema import Config
from burnish.config.yaml_text import Document, read_yaml, write_yaml
from burnish.errors import ConfigError, Problem

__all__ = ["config_schema", "dump_config", "load_config"]

Place = tuple[str | int, ...]

_MAX_FILE_BYTES = 10 * 2**20  # a config is kilobytes; a data file given by mistake is not read
_MAX_VALUE_CHARS = 80
_PATH_KEYS = (
    ("model", "path"),
    ("model", "tokenizer"),
    ("adapter", "path"),
    ("data", "chat_template"),
    ("data", "cache_dir"),
    ("checkpoint", "resume"),
    ("output_dir",),
)


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and flags, check them, and return the whole config.

    Args:
        path: A YAML (or JSON) file, or None where the flags say everything.
        overrides: Dotted flags, `["--optim.lr", "2e-5", "--train.epochs=2"]`; they win over the
            file, and a later one over an earlier one. Lists and mappings are given as YAML or JSON.

    Returns:
        The config; what it leaves to the adapter in `adapter.path` is taken from there.

    Raises:
        ConfigError: Every problem found, each with its key, the value and a cure: unknown keys,
            wrong types, missing keys, contradictions (`check_config`).
    """
    document = _read_file(path) if path is not None else Document({})
    tree: dict[str, Any] = copy.deepcopy(document.value)
    problems = apply_flags(tree, overrides)
    reader = _Reader(tree, document, path)
    config = reader.validate()
    problems += reader.problems
    if config is not None:
        # Where keys were wrong, their defaults stood in: keep quiet about what hangs on them.
        config, of_adapter = with_its_adapter(config)
        found = [*of_adapter, *check_config(config)]
        problems += [p for p in found if not reader.concerns_bad_key(p)]
    if problems or config is None:
        raise ConfigError(*problems)
    return config


def dump_config(config: Config) -> str:
    """The whole config as YAML that `load_config` reads back to an equal config."""
    return write_yaml(config.model_dump(mode="json"))


def _read_file(path: Path) -> Document:
    """Parse the file to a mapping. Sections left empty count as empty mappings."""
    name = str(path)
    if not path.exists():
        near = difflib.get_close_matches(path.name, _names_in(path.parent), 1)
        cure = f"Did you mean {path.parent / near[0]}?" if near else "Check the path."
        raise ConfigError(Problem(name, "there is no such file", cure))
    if not path.is_file():
        raise ConfigError(Problem(name, "is not a file", "Give the path of a YAML file."))
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(Problem(name, "is too large for a config", "Data goes under data.train."))
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        cure = "Save it as plain UTF-8 text."
        raise ConfigError(Problem(name, f"is not UTF-8 text (byte {error.start})", cure)) from error
    except OSError as error:
        cure = "Give a file that you may read."
        raise ConfigError(Problem(name, f"cannot be read: {error.strerror}", cure)) from error
    document = read_yaml(text, name)
    if document.value is None:
        raise ConfigError(Problem(name, "is empty", "`burnish init DATA` writes a config to start from."))
    if not isinstance(document.value, dict):
        kind = "a list" if isinstance(document.value, list) else "one word or number"
        cure = "Write keys with values, for example `model: {path: …}`."
        raise ConfigError(Problem(name, f"holds {kind}, not keys with values", cure))
    return document


def _names_in(folder: Path) -> list[str]:
    return [item.name for item in folder.iterdir()] if folder.is_dir() else []


class _Reader:
    """Validates a tree of plain values and words what pydantic finds."""

    def __init__(self, tree: dict[str, Any], document: Document, path: Path | None) -> None:
        self.tree = tree
        self.lines = document.lines
        self.left_empty = document.left_empty
        self.file = path
        self.problems: list[Problem] = []
        self.bad_keys: set[str] = set()

    def validate(self) -> Config | None:
        """The config; where some keys are wrong, the config without them, or None."""
        self._fill_empty_sections()
        self._find_misplaced_booleans()
        for place in _PATH_KEYS:
            _expand_user(self.tree, place)
        try:
            return Config.model_validate(self.tree)
        except ValidationError as error:
            self._translate(error)
        try:
            return Config.model_validate(self.tree)  # without the wrong keys, for the other checks
        except ValidationError:
            return None

    def concerns_bad_key(self, problem: Problem) -> bool:
        """Whether a contradiction may only come from a wrong key's default."""
        text = f"{problem.where} {problem.what} {problem.cure}"
        return any(re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", text) for key in self.bad_keys)

    def _fill_empty_sections(self) -> None:
        for name, value in list(self.tree.items()):
            if value is not None or not _is_section((name,)):
                continue
            if name != "adapter":
                self.tree[name] = {}
            elif (name,) in self.left_empty:
                cure = "Write `adapter: {}` for LoRA with its defaults, or leave the key out for none."
                self._add((name,), "is left empty", cure)

    def _find_misplaced_booleans(self) -> None:
        """Python counts true as 1, so pydantic takes `epochs: true`; people do not mean that."""
        for place, value in list(_leaves(self.tree, ())):
            key = names.keys_by_name().get(names.canonical(place))
            if isinstance(value, bool) and key and "true or false" not in key.takes:
                self._add(place, f"is {str(value).lower()}", f"It takes {key.takes}.")
                _remove(self.tree, place)

    def _translate(self, error: ValidationError) -> None:
        done: set[Place] = set()
        for item in error.errors(include_url=False, include_context=False):
            place = self._place(item["loc"], item["type"])
            if item["type"] == "missing" and isinstance(place[-1], int):  # a list too short
                place, item["type"] = place[:-1], "too_short"
            if place in done:  # a union reports once per member
                continue
            done.add(place)
            if item["type"] == "missing":
                self._missing(place)
            elif item["type"] == "extra_forbidden":
                self._unknown(place)
            else:
                self._wrong(place)
        for place in sorted(done, key=str, reverse=True):  # later list items first
            _remove(self.tree, place)

    def _place(self, loc: Place, kind: str) -> Place:
        """pydantic's location without the names of union members that it puts in between."""
        place: Place = ()
        for index, part in enumerate(loc):
            unknown_leaf = kind == "extra_forbidden" and index == len(loc) - 1
            takes_any = names.canonical(place) in ("data.bad_row_rules", "data.train[].columns")
            in_list = isinstance(part, int) and not isinstance(_get(self.tree, place), str)
            if unknown_leaf or takes_any or in_list or _is_known((*place, part)):
                place = (*place, part)
        return place

    def _missing(self, place: Place) -> None:
        name = names.canonical(place)
        for key in names.all_keys():
            inside = key.name.startswith(f"{name}.") and "[]" not in key.name.removeprefix(name)
            if key.required and (key.name == name or inside):
                where = names.dotted(place) + key.name.removeprefix(name)
                self.problems.append(Problem(where, "is missing", f"It must be given: {key.doc}"))

    def _unknown(self, place: Place) -> None:
        name = names.canonical(place)
        near = names.suggest(name)
        if near == name:
            head, _, leaf = name.partition(".")
            self._add(place, "is a dotted key", f"In a file keys are nested: `{head}: {{{leaf}: …}}`.")
            return
        if near:
            self.bad_keys.add(near)
        self._add(place, "is not a key", names.cure_for(name))

    def _wrong(self, place: Place) -> None:
        name = names.canonical(place)
        value = _get(self.tree, place)
        shown = _show(value)
        key = names.keys_by_name().get(name)
        if key is None and isinstance(place[-1], int):
            key = names.keys_by_name().get(names.canonical(place[:-1]))
        if _is_section(place):
            inner = [
                k.name.removeprefix(f"{name}.") for k in names.all_keys() if k.name.startswith(f"{name}.")
            ]
            self._add(place, f"is {shown}, but it is a section", f"Its keys: {', '.join(inner)}.")
            return
        if key is None:
            self._add(place, f"is {shown}, which cannot stand here", "")
            return
        cure = f"It takes {key.takes}."
        near = difflib.get_close_matches(str(value), key.choices, 1, 0.6)
        if near:
            cure += f" Did you mean {near[0]}?"
        elif key.takes.startswith("text") and isinstance(value, int | float):
            cure += f' Put it in quotes: "{value}".'
        elif value in ([], ()):
            cure += " At least one."
        self._add(place, f"is {shown}", cure)

    def _add(self, place: Place, what: str, cure: str) -> None:
        line = self.lines.get(place)
        if line is not None and self.file is not None:
            what += f" ({self.file}:{line})"
        self.bad_keys.add(names.canonical(place))
        self.problems.append(Problem(names.dotted(place), what, cure))


def _is_section(place: Place) -> bool:
    name = names.canonical(place)
    return bool(name) and any(key.startswith(f"{name}.") for key in names.keys_by_name())


def _is_known(place: Place) -> bool:
    return names.canonical(place) in names.keys_by_name() or _is_section(place)


def _leaves(value: Any, place: Place) -> Any:
    """Every (place, value) below `value` that is no mapping and no list."""
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        yield place, value
    for part, inner in items:
        yield from _leaves(inner, (*place, part))


def _get(tree: Any, place: Place) -> Any:
    for part in place:
        if isinstance(tree, Mapping):
            tree = tree.get(part)
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
        elif not (part == 0 and isinstance(tree, str)):  # one path stands for a list of one
            return None
    return tree


def _remove(tree: Any, place: Place) -> None:
    parent = _get(tree, place[:-1])
    if isinstance(parent, dict):
        parent.pop(place[-1], None)
    elif isinstance(parent, list) and isinstance(place[-1], int) and place[-1] < len(parent):
        parent.pop(place[-1])


def _expand_user(tree: dict[str, Any], place: Place) -> None:
    parent, value = _get(tree, place[:-1]), _get(tree, place)
    if isinstance(parent, dict) and isinstance(value, str) and value.startswith("~/"):
        parent[place[-1]] = str(Path(value).expanduser())


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_CHARS else f"{text[:_MAX_VALUE_CHARS]}…"
