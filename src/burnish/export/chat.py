"""How a saved model stops: the end-of-turn token, found in what the template writes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from burnish.data.tokenizer import after_answer
from burnish.runtime import log

_SAMPLING = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "top_h": None, "typical_p": 1.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip
"""What only sampling reads, and the value at which it says nothing."""
_WAYS = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache")
"""What decides which of the others are read."""


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
    if config.pad_token_id is None or config.pad_token_id < 0:  # LLaMA's first conversions have -1
        pad: Any = tokenizer.pad_token_id
        config.pad_token_id = pad if pad is not None else (ids[0] if ids else None)
    if config.do_sample is None and config.temperature != 0:
        # Many bases have a temperature, and forget to say what it is for.
        config.do_sample = any(
            getattr(config, name, None) not in (None, idle) for name, idle in _SAMPLING.items()
        )
    return _savable(config)


def _savable(config: Any) -> GenerationConfig:
    """The config without the flags of another way of generating, such as a temperature with greedy decoding:
    transformers warns of them when it loads a base's, and refuses to save them once anything else changed."""
    kept: Any = GenerationConfig()
    for name in sorted(vars(config), key=lambda name: name not in _WAYS):
        setattr(kept, name, getattr(config, name))
        try:
            kept.validate(strict=True)
        except ValueError:
            setattr(kept, name, None)
            log.warning("generation_config.json: left out %s, which has no use there.", name)
    return kept


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, template: str | None, folder: Path) -> None:
    """Save the tokenizer with the template that was trained with.

    Raises:
        OSError: It cannot be written.
    """
    before = tokenizer.chat_template
    try:
        if template is not None:
            tokenizer.chat_template = template
        tokenizer.save_pretrained(str(folder))
    except Exception as error:
        if type(error) is not Exception:
            raise
        # All that tokenizers' writer in Rust raises, for a full disk too.
        raise OSError(f"{folder}: {error}") from error
    finally:
        tokenizer.chat_template = before
