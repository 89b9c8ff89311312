"""What a resumed run must share with the run it goes on from, by name and as readable as can be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import xxhash

from burnish.config.schema import Config


def fingerprints(config: Config, vocabulary: str, template: str | None, data_hash: str) -> Mapping[str, str]:
    """Everything that decides which examples a step sees, in which tokens, and what they train.

    What only changes how a step is computed (ranks, ZeRO stage, packing, budgets), how fast it learns
    (rate, schedule, length of the run) or what is written is left out: a run may go on with another.
    Small values stand as they are, so that a refusal says what was and what is.

    Args:
        config: The run.
        vocabulary: The tokenizer, serialised.
        template: The chat template's text, if there is one.
        data_hash: `PreparedData.fingerprint`: of the prepared examples, whatever they came from.
    """
    data = config.data
    sources = [[s.path, s.weight] for s in data.train] if data.mix == "weighted" else data.mix
    values: dict[str, Any] = {
        "model.path": config.model.path,
        "model.revision": config.model.revision,
        "model.freeze": sorted(config.model.freeze),
        "model.pad_vocab_multiple": config.model.pad_vocab_multiple,
        "adapter": None if config.adapter is None else config.adapter.model_dump(),
        "data": data_hash,
        "data.mix": sources,
        "tokenizer": xxhash.xxh3_128_hexdigest(vocabulary.encode()),
        "data.chat_template": None if template is None else xxhash.xxh3_128_hexdigest(template.encode()),
        "batch.global_examples": config.batch.global_examples,
        "batch.global_tokens": config.batch.global_tokens,
        "train.seed": config.train.seed,
        "optim.name": config.optim.name,
        # Its factors may change; its parts decide how the optimizer's state is laid out.
        "optim.group_lr (parts)": sorted(config.optim.group_lr),
    }
    return {name: json.dumps(value) for name, value in values.items()}
