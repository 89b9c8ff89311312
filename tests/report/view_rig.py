"""A model folder made on the spot (no weights: `view` loads none), data, and headless Chromium."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from burnish.config.schema import Config

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_TEXT = ["Hello there! What is the capital of France? Paris.", "user assistant system tool"] * 5


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: a character outside its training text is several tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(_TEXT, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet))
    backend.add_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama-2's: `▁` for spaces, and tokens of single bytes for what is not in the vocabulary."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    strip = decoders.Strip(content=" ", left=1)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *bytes_], max_token_length=8
    )
    backend.train_from_iterator(_TEXT, trainer)
    described = json.loads(backend.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["id"] < 3]
    backend = Tokenizer.from_str(json.dumps(described))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """As BERT's: pieces inside a word begin with `##`."""
    names = ["[UNK]", "[SEP]", "capital", "of", "Fr", "##ance", "is", "Paris", "."]
    backend = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.add_special_tokens(["[SEP]"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]", unk_token="[UNK]")


def chat(*contents: str, **extra: Any) -> dict[str, Any]:
    """A row of messages, the user first; `extra` goes into the last one."""
    roles = ("user", "assistant")
    messages: list[dict[str, Any]] = [
        {"role": roles[i % 2], "content": content} for i, content in enumerate(contents)
    ]
    messages[-1].update(extra)
    return {"messages": messages}


def view_config(folder: Path, sources: Mapping[str, Sequence[Any]], **data: Any) -> Config:
    """A config over JSONL files of these rows (text as it is, others as JSON), by source name."""
    model = folder / "model"
    byte_level_tokenizer().save_pretrained(str(model))
    (model / "config.json").write_text('{"model_type": "llama", "vocab_size": 343}')
    paths = []
    for name, rows in sources.items():
        path = folder / f"{name}.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        paths.append(str(path))
    return Config.model_validate(
        {
            "model": {"path": str(model), "init": "random"},
            "data": {"train": paths, "chat_template": "chatml", "bad_rows": "drop", **data},
            "output_dir": str(folder / "out"),
        }
    )


class Browser:
    """Chromium without a screen, on pages in a folder, with a profile of its own for each look."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._num_looks = 0

    def dom(self, html: Path, fragment: str = "", after: str = "") -> str:
        """The document after its scripts ran, and after a script of the test, if there is one.

        The test's script goes into a copy of the page whose policy is left out.
        """
        if after:
            text = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", html.read_text("utf-8"))
            html = html.with_name(f"{html.stem}-with-script.html")
            html.write_text(text.replace("</body>", f"<script>{after}</script></body>"), "utf-8")
        self._num_looks += 1
        profile = self._folder / f"profile-{self._num_looks}"
        profile.mkdir()
        command = [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={profile}",
            "--window-size=1100,900",
            "--virtual-time-budget=3000",
            "--dump-dom",
            f"{html.as_uri()}#{fragment}",
        ]
        environment = {**os.environ, "HOME": str(profile)}
        done = subprocess.run(command, capture_output=True, timeout=120, check=True, env=environment)
        return done.stdout.decode("utf-8")


def shown_cards(dom: str) -> list[str]:
    """The markup of every example that is not hidden, in the order of the page."""
    page = dom.split("<template", maxsplit=1)[0]
    cards = re.findall(r"<article class=\"card\"[^>]*>.*?</article>", page, re.DOTALL)
    return [card for card in cards if " hidden" not in card[: card.index(">")]]


def text_of(markup: str) -> str:
    """The text of some markup."""
    return unescape(re.sub(r"<[^>]+>", "", markup))
