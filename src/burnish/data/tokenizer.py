"""The tokenizer and the chat template of a run."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from burnish.config.adapter_file import token_rows_of
from burnish.config.schema import AdapterConfig, DataConfig, ModelConfig
from burnish.data.sandbox import probe_template
from burnish.data.vocabulary import add_tokens
from burnish.errors import DataError, Problem
from burnish.hub import not_loaded, only_cached
from burnish.records import Vocabulary
from burnish.runtime import log

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_CONTROL = re.compile(r"<\|[\w.-]+\|>")
"""How templates write control tokens that people add to a tokenizer."""
_MARK = "burnish7answer"
"""A content that no template trims or contains."""


def builtin_templates() -> dict[str, str]:
    """Names of the templates that come with Burnish, and their text."""
    folder = resources.files("burnish.data") / "templates"
    return {
        item.name.removesuffix(".jinja"): item.read_text(encoding="utf-8").rstrip("\n")
        for item in sorted(folder.iterdir(), key=lambda item: item.name)
        if item.name.endswith(".jinja")
    }


def load_tokenizer(model: ModelConfig, data: DataConfig) -> tuple[PreTrainedTokenizerBase, str | None]:
    """Load the tokenizer, and find the chat template that conversations are written with.

    Args:
        model: Its `tokenizer`, or else its `path`, names the tokenizer; its `add_tokens` are added.
        data: Its `chat_template` is a file, a built-in name, or null for the tokenizer's own.

    Returns:
        The tokenizer, and the template's text; None where there is none, which only data of plain
        text or ready-made tokens can do without (`Encoder` says so at the first conversation).

    Raises:
        DataError: The tokenizer cannot be loaded, has no fast (Rust) form, or the template is neither
            a file nor a built-in name, or does not keep within `sandbox.py`'s limits.
    """
    tokenizer = _load(model)
    add_tokens(tokenizer, model)
    template = _find_template(tokenizer, data.chat_template)
    if template is not None and template not in builtin_templates().values():
        probe_template(template)
    _tell_of_spelled_end(tokenizer, template)
    return tokenizer, template


def after_answer(tokenizer: Any, template: str | None) -> str:
    """What a template writes behind an assistant's answer, without space in front; empty where it writes
    nothing, or refuses the question."""
    if template is None:
        return ""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
    try:
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    except (TemplateError, ValueError, TypeError, KeyError):
        return ""
    return str(text).rpartition(_MARK)[2].lstrip()


def _tell_of_spelled_end(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Say so where the end of a turn is a control token in the template only."""
    end = after_answer(tokenizer, template)
    marks = dict.fromkeys(_CONTROL.findall(template or ""))
    known = tokenizer.get_vocab()
    lacking = [mark for mark in marks if mark not in known]
    if lacking and any(end.startswith(mark) for mark in lacking):
        log.info(
            "Warning: data.chat_template: answers end in %s, which is no token of this tokenizer: a model "
            "has to spell it, generation does not stop there, and whoever types it ends a turn."
            "\n    Set model.add_tokens: %s.",
            end.split()[0],
            lacking,
        )


def vocabulary_of(
    tokenizer: PreTrainedTokenizerBase, model: ModelConfig, adapter: AdapterConfig | None = None
) -> Vocabulary:
    """What a tokenizer that `load_tokenizer` gave asks of the model's embedding, and what an adapter that
    the run begins with brings rows for."""
    brought = frozenset(token_rows_of(adapter))
    if not model.add_tokens:
        return Vocabulary(brought, brought, model.pad_vocab_multiple)
    known = frozenset(_load(model).get_vocab().values())
    numbers: Any = tokenizer.convert_tokens_to_ids(list(model.add_tokens))
    named = frozenset(numbers)
    return Vocabulary(named | brought, (named - known) | brought, model.pad_vocab_multiple)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills padded rows; any token will do, because no attention and no loss sees it."""
    own: Any = tokenizer.pad_token_id
    return own if isinstance(own, int) else 0


def serialised(tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything that decides which tokens a text becomes, as one text."""
    fast: Any = tokenizer
    return fast.backend_tokenizer.to_str()


def _load(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer as it was published."""
    from transformers import AutoTokenizer

    path = model.tokenizer or model.path
    where = "model.tokenizer" if model.tokenizer else "model.path"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            local_files_only=only_cached(path),
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        cure = "Give a folder or hub name with a tokenizer.json, or set model.tokenizer."
        raise DataError(not_loaded(where, path, "tokenizer", error, cure)) from error
    if not tokenizer.is_fast:
        raise DataError(
            Problem(
                where,
                f"{path}: this tokenizer has no fast form, so tokens cannot be traced to characters",
                "Save it with a tokenizer.json, or set model.tokenizer to one that has it.",
            )
        )
    return tokenizer


def _find_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> str | None:
    if name is None:
        return _own_template(tokenizer)
    file = Path(name)
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            cure = "Give a file of UTF-8 text that you may read, or a built-in name."
            what = f"{name}: cannot be read: {error}"
            raise DataError(Problem("data.chat_template", what, cure)) from error
    builtin = builtin_templates()
    if name in builtin:
        return builtin[name]
    what = "no such built-in template" if _NAME.fullmatch(name) else "no such file"
    cure = f"Give a file, or one of the built-in names: {', '.join(builtin)}."
    raise DataError(Problem("data.chat_template", f"{name!r}: {what}", cure))


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's template; of several, the one called `default`."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        return own.get("default")
    return own or None
