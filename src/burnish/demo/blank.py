"""A folder to train a tiny base model from: architecture, tokenizer and chat template, no weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

END, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_VOCABULARY = 512
_HIDDEN = 96


def make_blank(folder: Path, texts: Sequence[str]) -> None:
    """Train a tokenizer on the texts and write it beside a small Llama's config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token=None))
    # A word begins with a space wherever it stands, so it is the same token at the start of an answer.
    spaces = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.pre_tokenizer = pre_tokenizers.Sequence([spaces, pre_tokenizers.Punctuation()])
    raw.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="always"), decoders.Fuse()])
    special = [END, USER, ASSISTANT]
    raw.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=_VOCABULARY, special_tokens=special, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
    )
    tokenizer.save_pretrained(str(folder))
    end: Any = tokenizer.eos_token_id
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=_HIDDEN,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        # About 1/sqrt(hidden): with the usual 0.02 so narrow a model takes ten times as long to start.
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(str(folder))
