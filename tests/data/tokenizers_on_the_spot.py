"""Small tokenizers made for tests: byte-level BPE with a family's control tokens, and a Llama-2 kind."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_TEXT = [
    "The quick brown fox jumps over the lazy dog. What is the weather in Paris today? It is sunny.",
    "user assistant system model tool think answer question hello world\n\n  spaces   and\ttabs\n",
    '{"name": "get_weather", "arguments": {"city": "Paris"}} 0123456789 +-*/ <b>bold</b> äöü 你好',
] * 4


@functools.cache
def _byte_level(control: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(_TEXT, trainer)
    # As real families have it: most are special, the tags of reasoning and tools are not.
    tokenizer.add_tokens(
        [AddedToken(t, special="|" in t or "｜" in t or "turn" in t, normalized=False) for t in control]
    )
    return tokenizer.to_str()


def byte_level(
    control: Sequence[str], bos: str = "<|bos|>", eos: str = "<|eos|>", pad: str | None = None
) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer that knows these control tokens, BOS and EOS among them."""
    names = tuple(dict.fromkeys([*control, bos, eos]))
    backend = Tokenizer.from_str(_byte_level(names))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad)


@functools.cache
def _sentencepiece_kind() -> str:
    alphabet = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *alphabet], max_token_length=8
    )
    tokenizer.train_from_iterator([line.replace("\n", " ") for line in _TEXT], trainer)
    return tokenizer.to_str()


def llama2_kind() -> PreTrainedTokenizerBase:
    """A sentencepiece-like tokenizer: `▁` for spaces, byte fall-back, control tokens in the vocabulary,
    a BOS in front of every text."""
    import json

    described = json.loads(_sentencepiece_kind())
    described["added_tokens"] = [t for t in described["added_tokens"] if t["id"] < 3]
    backend = Tokenizer.from_str(json.dumps(described))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
