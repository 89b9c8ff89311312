"""What is prepared: rows in Alpaca's format, and the tokenizer and template for them."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML with marks, which TRL needs. Burnish uses the same."""
MAX_TOKENS = 4096

_VERBS = ("Describe", "Explain", "List", "Compare", "Summarise", "Rewrite", "Classify", "Translate")
_NOUNS = ("river", "engine", "market", "garden", "theory", "bridge", "recipe", "planet", "library", "story")
_TEXT = (
    "the of and a to in is that it was for on are with as his they be at one have this from or had by hot "
    "word but what some we can out other were all there when up use your how said an each she which their "
    "time will way about many then them write would like so these her long make thing see him two has look "
    "more day could go come did number sound no most people my over know water than call first who may down"
)
_WORDS = _TEXT.split()


def made_up_rows(num: int) -> list[dict[str, str]]:
    """Rows in Alpaca's format, with answers of about its lengths (log-normal, mean near 100 words)."""
    rng = random.Random(0)
    rows = []
    for i in range(num):
        size = min(700, max(3, int(rng.lognormvariate(4.3, 0.8))))
        words = [rng.choice(_WORDS) if rng.random() < 0.85 else f"{rng.choice(_NOUNS)}s" for _ in range(size)]
        for stop in range(11, size, 12):
            words[stop] += "."
        ask = f"{rng.choice(_VERBS)} a {rng.choice(_NOUNS)} for a {rng.choice(_NOUNS)} in {i} words."
        given = " ".join(rng.choices(_WORDS, k=20)) if rng.random() < 0.4 else ""
        rows.append({"instruction": ask, "input": given, "output": " ".join(words).capitalize() + "."})
    return rows


def read_rows(path: str | None, num: int) -> list[dict[str, str]]:
    """An Alpaca file's rows (JSON or JSON lines), repeated to `num`; made-up ones without a file."""
    if path is None:
        return made_up_rows(num)
    text = Path(path).read_text("utf-8")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    rows = [row for row in rows if row["instruction"] and row["output"]]
    return list(itertools.islice(itertools.cycle(rows), num))


def tokenizer_for(folder: str | None, rows: Sequence[Mapping[str, str]]) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder with ChatML's two tokens added, or a byte-level BPE made from the rows."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    control = ["<|im_start|>", "<|im_end|>"]
    if folder is not None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=8000, initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator([row["output"] for row in rows[:2000]], trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"additional_special_tokens": control})
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def as_messages(row: Mapping[str, str]) -> list[dict[str, str]]:
    """A row as the two messages that Burnish makes of it."""
    ask = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
    return [{"role": "user", "content": ask}, {"role": "assistant", "content": row["output"]}]
