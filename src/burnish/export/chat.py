"""How a saved model stops: the end-of-turn token, found in what the template writes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from burnish.data.tokenizer import after_answer


def end_of_turn_ids(tokenizer: Any, template: str | None) -> list[int]:
    """Ids of the control token that the template writes after an assistant's answer, if it does."""
    after = after_answer(tokenizer, template)  # nothing: the tokenizer's own EOS has to do
    added = sorted(tokenizer.get_added_vocab().items(), key=lambda item: -len(item[0]))
    return next(([number] for name, number in added if name and after.startswith(name)), [])


def generation_config(
    base: GenerationConfig | None, tokenizer: Any, template: str | None
) -> GenerationConfig:
    """The base's generation config, made to stop where this tokenizer and template stop."""
    config: Any = copy.deepcopy(base) if base is not None else GenerationConfig()
    own: Any = config.eos_token_id
    own = [own] if isinstance(own, int) else list(own or [])
    eos: Any = tokenizer.eos_token_id
    known = set(tokenizer.get_added_vocab().values())
    own = [number for number in own if number in known]  # another tokenizer's may be a plain word here
    wanted = [*end_of_turn_ids(tokenizer, template), *([eos] if isinstance(eos, int) else []), *own]
    ids = list(dict.fromkeys(wanted))
    config.eos_token_id = ids[0] if len(ids) == 1 else (ids or None)
    if config.pad_token_id is None:
        pad: Any = tokenizer.pad_token_id
        config.pad_token_id = pad if pad is not None else (ids[0] if ids else None)
    if config.do_sample is False or config.do_sample is None:
        # transformers refuses to save a temperature with greedy decoding; many bases have both.
        sampling = (config.temperature, config.top_p, config.top_k)
        config.do_sample = any(value is not None for value in sampling)
    return config


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, template: str | None, folder: Path) -> None:
    """Save the tokenizer with the template that was trained with."""
    before = tokenizer.chat_template
    try:
        if template is not None:
            tokenizer.chat_template = template
        tokenizer.save_pretrained(str(folder))
    finally:
        tokenizer.chat_template = before
